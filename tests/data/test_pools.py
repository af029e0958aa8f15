"""The pools of a run from files: what is kept apart, and what is said when nothing is left."""

import json

import pytest

from qinglan.core.errors import InputError
from qinglan.data.pools import pools_from_files
from qinglan.data.prompts import PromptConfig, group_of, side_of

SHARES = {"train": 0.8, "valid": 0.05, "test": 0.15}


def pools(prompts=None, demonstrations=None, comparisons=None, max_tokens=100):
    return pools_from_files(
        prompts, demonstrations, comparisons, PromptConfig(max_tokens=max_tokens), seed=0, on_bad="stop",
        num_tokens=lambda prompt: len(prompt.messages[-1].content.split()),
    )  # fmt: skip


def pairs(path, groups):
    """Write one comparison for each prompt group."""
    rows = [{"prompt": f"Question {g}?", "chosen": "Yes.", "rejected": "No.", "user_id": g} for g in groups]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def groups_on(side, count):
    """Return names of prompt groups that fall on one side."""
    return [name for name in map(str, range(1000)) if side_of(name, SHARES, 0) == side][:count]


def test_no_group_stands_in_training_and_in_a_measuring_pool(tmp_path):
    found = pools(comparisons=pairs(tmp_path / "pairs.jsonl", map(str, range(200))))
    trained = {group_of(one) for one in [*found.comparisons, *found.rl_prompts]}
    measured = {group_of(one) for one in [*found.held_out_comparisons, *found.test_prompts, *found.valid_prompts]}
    assert not trained & measured and len(trained) + len(measured) == 200
    assert {group_of(one) for one in found.valid_prompts}.isdisjoint(group_of(one) for one in found.test_prompts)


def test_without_validation_prompts_the_test_prompts_choose_nothing(tmp_path):
    names = [*groups_on("train", 30), *groups_on("test", 5)]
    found = pools(comparisons=pairs(tmp_path / "pairs.jsonl", names))
    assert len(found.test_prompts) == 5
    assert found.valid_prompts == found.rl_prompts[:20]


@pytest.mark.parametrize("kind", ["prompts", "comparisons"])
def test_a_file_of_which_nothing_is_left_for_training_is_named(tmp_path, kind):
    path = pairs(tmp_path / "pairs.jsonl", groups_on("test", 2))
    with pytest.raises(InputError, match=r"pairs.jsonl: none of 2 rows is left for training.*more prompt groups"):
        pools(**{kind: path})
    with pytest.raises(InputError, match=r"raise hygiene.max_tokens"):
        pools(**{kind: pairs(path, groups_on("train", 3))}, max_tokens=1)
