"""Public data that nobody of this project wrote: each set loads, and what is skipped is skipped for a reason."""

import os
from pathlib import Path

import pytest

from qinglan.core.records import pairs_of
from qinglan.data.check import check_file
from qinglan.data.load import load_comparisons, load_demonstrations, load_prompts
from qinglan.data.prompts import PromptConfig, check_disjoint, filter_prompts, split_by_group
from qinglan.data.write import write_comparisons

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real():
    folder = os.environ.get("QINGLAN_REAL_DATA")
    if not folder:
        pytest.skip("QINGLAN_REAL_DATA is not set: real data is NOT tested")
    return Path(folder)


@pytest.mark.parametrize(
    ("name", "format", "share"),
    [
        ("preferences/hh_rlhf_harmless_test", "hh_transcripts", 0.99),
        ("preferences/alpaca_eval_gpt4/gpt4.jsonl.gz", "alpaca_eval", 0.99),
        ("preferences/pandalm/testset-v1.json", "pandalm", 0.95),
        ("preferences/auto_j/testdata_pairwise.jsonl", "auto_j", 1.0),
        ("preferences/llamafactory_pref_demo/dpo_en_demo.json", "sharegpt_preference", 1.0),
        ("instructions/oasst_en_100", "oasst_trees", 1.0),
    ],
)
def test_comparisons(real, tmp_path, name, format, share):
    report = check_file(real / name)
    loaded = load_comparisons(real / name, on_bad="skip")
    assert loaded.format == format
    assert report.num_rows_ok >= share * report.num_rows > 0
    assert len(loaded.skipped) == len(report.broken)
    assert report.num_comparisons == len(loaded.records)
    assert any(pairs_of(group.comparison.label) for group in loaded.records)
    some = loaded.records[:200]
    write_comparisons(tmp_path / "again.jsonl", some)
    assert load_comparisons(tmp_path / "again.jsonl").records == some


@pytest.mark.parametrize(
    ("name", "format", "share"),
    [
        ("instructions/alpaca_en_demo", "alpaca", 1.0),
        ("instructions/code_alpaca", "alpaca", 0.99),
        ("instructions/self_instruct/seed_tasks.jsonl", "self_instruct", 1.0),
        ("instructions/self_instruct/user_oriented_instructions.jsonl", "self_instruct", 1.0),
        ("instructions/gsm8k/test.jsonl", "question_answer", 1.0),
        ("instructions/octopack_oasst", "trl_prompt_completion", 1.0),
        ("instructions/oasst_en_100", "oasst_trees", 1.0),
    ],
)
def test_demonstrations(real, name, format, share):
    loaded = load_demonstrations(real / name, on_bad="skip")
    assert loaded.format == format
    assert len(loaded.records) >= share * (len(loaded.records) + len(loaded.skipped)) > 0


def test_thumbs_and_samples_without_votes_are_prompts_only(real):
    for name in ("preferences/llamafactory_pref_demo/kto_en_demo.json", "instructions/tulu_eval_instances"):
        assert load_prompts(real / name).format == "unpaired"


def test_hh_prompts_are_taken_at_the_last_assistant_turn(real):
    groups = load_comparisons(real / "preferences/hh_rlhf_harmless_test", on_bad="skip").records
    multi = [group for group in groups if len(group.prompt.messages) > 1]
    assert len(multi) > len(groups) / 2
    assert all(group.prompt.messages[-1].role == "user" for group in groups)
    assert not any("\n\nHuman:" in item.text for group in groups for item in group.completions)
    sides = split_by_group(groups, {"train": 0.8, "test": 0.2}, 0)
    check_disjoint(sides)
    openings = [{group.prompt.messages[0].content for group in side} for side in sides.values()]
    assert not openings[0] & openings[1]


def test_one_instruction_is_one_group_across_data_sets(real):
    judged = load_comparisons(real / "preferences/pandalm/testset-v1.json", on_bad="skip").records
    written = load_demonstrations(real / "instructions/self_instruct/user_oriented_instructions.jsonl").records
    groups = {group.prompt.prompt_group_id for group in judged}
    shared = groups & {one.prompt.prompt_group_id for one in written}
    assert len(shared) > len(groups) / 2


def test_filters_drop_little_of_clean_prompts(real):
    prompts = load_prompts(real / "instructions/gsm8k/train.jsonl").records
    found = filter_prompts(prompts, PromptConfig())
    assert len(found.kept) + sum(found.dropped.values()) == len(prompts)
    assert len(found.kept) > 0.95 * len(prompts)
    assert found.dropped.get("personal data", 0) < 5
