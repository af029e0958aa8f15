"""Reward model: one pass per completion, exact gradients however a batch is cut, resume, and it learns to rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import LETTERS, make_demonstration, make_group, make_lm, make_stage
from torch import Tensor

from qinglan.core.errors import InputError
from qinglan.core.records import ComparisonGroup, PreferenceProbability, Ranking
from qinglan.core.rng import numpy_stream
from qinglan.learn import reward
from qinglan.learn.losses import group_ranking_loss
from qinglan.learn.optimize import OptimizerConfig
from qinglan.learn.reward import (
    EncodedGroup,
    RewardConfig,
    encode_groups,
    evaluate_groups,
    micro_batches,
    pair_targets,
    score_groups,
    set_mean_score,
    train_reward_model,
)
from qinglan.models import kernels
from qinglan.models.heads import ScalarModel, as_scorer, load_scalar_model, scalar_model_from, token_values
from qinglan.models.language_model import hidden_states
from qinglan.models.prompt_sharing import ARCHITECTURES, can_share_prompt
from qinglan.models.sizes import filled_up
from qinglan.models.tokens import collate

TREES = sorted(ARCHITECTURES)
ROWS = ["mistral_sliding", "gemma3"]


def random_text(generator: Any, low: int, high: int) -> str:
    return "".join(generator.choice(list(LETTERS[:26]), generator.integers(low, high)))


def make_groups(count: int, seed: int = 0, k: int = 4) -> list[ComparisonGroup]:
    """Rankings by the number of letters "a": more is better."""
    generator = numpy_stream(seed, "groups")
    groups = []
    for number in range(count):
        numbers_of_a = generator.permutation(k)
        answers = ["".join(generator.permutation([*"a" * n, *random_text(generator, 2, 6)])) for n in numbers_of_a]
        label = Ranking(groups=tuple((int(i),) for i in (-numbers_of_a).argsort()))
        groups.append(make_group(f"{number}{random_text(generator, 2, 8)}", answers, label))
    return groups


def mixed_groups() -> list[ComparisonGroup]:
    ranking = Ranking(groups=((3,), (0, 2), (1,)))
    return [
        make_group("one", ["x", "yyy", "zz", "www w"], ranking),
        make_group("two two", ["abc", "d"], PreferenceProbability(p_first_better=0.3), source="weak_model"),
        make_group("3", ["e", "ff", "g hijk lm"], Ranking(groups=((2,), (0,)))),
    ]


def make_scalar(kind: str = "llama") -> ScalarModel:
    return scalar_model_from(make_lm(kind), seed=1)


def gradients(scalar: ScalarModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in scalar.model.named_parameters() if p.grad is not None}
    scalar.model.zero_grad()
    return found


def batch_gradients(
    scalar: ScalarModel, groups: list[EncodedGroup], config: RewardConfig
) -> tuple[float, dict[str, Tensor]]:
    loss = 0.0
    for part in micro_batches(groups, config.max_tokens):
        result = group_ranking_loss(score_groups(scalar, part, config), pair_targets(part, len(groups), scalar))
        result.loss.backward()
        loss += result.loss.item()
    return loss, gradients(scalar)


def naive_gradients(scalar: ScalarModel, groups: list[EncodedGroup]) -> tuple[float, dict[str, Tensor]]:
    """Every pair by itself, both completions read again each time, one row at a time: the slow obvious loop."""
    total = 0.0
    for group in groups:
        for first, second, p in group.pairs:
            scores = []
            for item in (first, second):
                batch = collate([group.sequences[item]])
                scores.append(token_values(scalar, hidden_states(scalar.model, batch))[0, -1])
            margin = scores[0] - scores[1]
            loss = -(p * torch.log(torch.sigmoid(margin)) + (1 - p) * torch.log(torch.sigmoid(-margin)))
            loss = loss * group.weight / len(group.pairs) / len(groups)
            loss.backward()
            total += loss.item()
    return total, gradients(scalar)


def assert_same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]], atol: float) -> None:
    assert one[0] == pytest.approx(other[0], abs=atol)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("kind", TREES + ROWS)
@pytest.mark.parametrize("share", [True, False])
def test_loss_and_gradients_equal_the_naive_pairs(kind, share):
    scalar = make_scalar(kind)
    config = RewardConfig(share_prompt=share, ties="half")
    groups = encode_groups(make_lm(kind), mixed_groups(), config, {"weak_model": 0.5}, "rm")
    assert_same(batch_gradients(scalar, groups, config), naive_gradients(scalar, groups), atol=1e-5)


def test_which_architectures_share_the_prompt():
    assert all(can_share_prompt(make_scalar(kind).model) for kind in TREES)
    assert not any(can_share_prompt(make_scalar(kind).model) for kind in ROWS)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 40, 100])
def test_micro_batches_do_not_change_the_gradient(share, max_tokens):
    scalar = make_scalar()
    config = RewardConfig(share_prompt=share)
    groups = encode_groups(make_lm(), make_groups(6), config, {}, "rm")
    small = config.model_copy(update={"max_tokens": max_tokens})
    assert len(list(micro_batches(groups, small.max_tokens))) > len(list(micro_batches(groups, config.max_tokens)))
    assert_same(batch_gradients(scalar, groups, small), batch_gradients(scalar, groups, config), atol=1e-6)


def count_work(monkeypatch: pytest.MonkeyPatch, scalar: ScalarModel, work: Callable[[], object]) -> tuple[int, int]:
    """Return completions scored (last tokens read) and tokens run through the trunk."""
    counts = [0, 0]
    inner = reward.token_values

    def embeddings(module: Any, args: tuple[Tensor]) -> None:
        counts[1] += args[0].numel()

    def head(scalar: ScalarModel, hidden: Tensor) -> Tensor:
        counts[0] += len(hidden)
        return inner(scalar, hidden)

    monkeypatch.setattr("qinglan.learn.reward.token_values", head)
    monkeypatch.setattr("qinglan.models.heads.token_values", head)
    handle = scalar.model.get_input_embeddings().register_forward_pre_hook(embeddings)
    work()
    handle.remove()
    return counts[0], counts[1]


@pytest.mark.usefixtures("both_ways")
def test_k_completions_cost_k_passes(monkeypatch):
    scalar = make_scalar()
    answers = ["abcd", "bcda", "cdab", "dabc", "aabb"]  # K = 5, 10 pairs, 4 letters and an end token each
    group = make_group("prompt", answers, Ranking(groups=tuple((k,) for k in range(5))))
    alone, shared = 5 * (8 + 5), 8 + 5 * 5  # <u> prompt <a>: 8 tokens
    in_runs = kernels.library() is not None  # a list of tokens, filled up to few sizes
    costs = [filled_up(alone, 5), filled_up(shared, 5)] if in_runs else [alone, filled_up(shared)]
    for share, tokens in zip((False, True), costs, strict=True):
        config = RewardConfig(share_prompt=share)
        encoded = encode_groups(make_lm(), [group], config, {}, "rm")
        assert len(encoded[0].pairs) == 10
        work = count_work(monkeypatch, scalar, lambda c=config, e=encoded: score_groups(scalar, e, c))
        assert work == (5, tokens)


def test_scores_equal_those_of_the_scorer():
    lm = make_lm()
    scalar = make_scalar()._replace(offset=0.75)
    groups = make_groups(5)
    encoded = encode_groups(lm, groups, RewardConfig(), {}, "rm")
    prompts = [group.prompt for group in groups for _ in group.completions]
    completions = [completion for group in groups for completion in group.completions]
    expected = torch.tensor(as_scorer(scalar)(prompts, completions))
    for share in (True, False):
        scores = score_groups(scalar, encoded, RewardConfig(share_prompt=share))
        torch.testing.assert_close(scores.detach(), expected, atol=1e-5, rtol=0)


def test_ties_are_dropped_or_count_half_and_unranked_items_are_not_read():
    groups = mixed_groups()
    dropped = encode_groups(make_lm(), groups, RewardConfig(), {}, "rm")
    half = encode_groups(make_lm(), groups, RewardConfig(ties="half"), {}, "rm")
    assert [len(group.pairs) for group in dropped] == [5, 1, 1]
    assert [len(group.pairs) for group in half] == [6, 1, 1]
    assert len(dropped[2].sequences) == 2
    assert dropped[2].pairs[0] == (1, 0, 1.0)  # items 2 and 0, renumbered


def test_groups_without_a_decided_pair_are_left_out_and_counted(capsys):
    tied = make_group("tied", ["a", "b"], Ranking(groups=((0, 1),)))
    long = make_group("long" * 40, ["a", "b"], Ranking(groups=((0,), (1,))))
    kept = encode_groups(make_lm(), [tied, long, *make_groups(1)], RewardConfig(), {}, "rm")
    assert len(kept) == 1
    assert "1 without a decided pair, 1 over 128 tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match="none of 1 comparisons"):
        encode_groups(make_lm(), [tied], RewardConfig(), {}, "rm")


def test_an_unknown_source_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="no such source 'humans'; did you mean 'human'"):
        encode_groups(make_lm(), make_groups(1), RewardConfig(), {"humans": 1.0}, "rm")


def learning_config(**changes: Any) -> RewardConfig:
    return RewardConfig(optimizer=OptimizerConfig(learning_rate=3e-3), **changes)


def test_it_learns_to_rank_by_a_simple_property_and_repeats(tmp_path):
    train, valid = make_groups(120, seed=1), make_groups(30, seed=2)
    config = learning_config()
    first, second = (
        train_reward_model(make_lm(), train, config, stage=make_stage(tmp_path / name, "rm"), seed=3, valid=valid)
        for name in ("one", "two")
    )
    assert_equal_weights(first, second)
    rows = make_stage(tmp_path / "one", "rm").run.metrics("rm")
    assert rows[0]["valid_accuracy"] < 0.7
    assert rows[-1]["valid_accuracy"] > 0.9
    assert rows[-1]["valid_loss"] < rows[0]["valid_loss"]
    assert rows[-1]["valid_accuracy/human"] == rows[-1]["valid_accuracy"]
    assert len(rows) == 1 + 15


def assert_equal_weights(one: ScalarModel, other: ScalarModel) -> None:
    assert one.offset == other.offset
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


class Killed(Exception):
    """Stands for the end of the process."""


def train_to_be_killed(directory: Path) -> ScalarModel:
    config = learning_config(batch_size=2, checkpoint_every=2)
    demonstrations = [make_demonstration("q", "aa")]
    stage = make_stage(directory, "rm")
    return train_reward_model(make_lm(), make_groups(16), config, stage=stage, seed=0, demonstrations=demonstrations)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ScalarModel:
    """Return the model of a run that was never stopped."""
    return train_to_be_killed(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("killed_at", [1, 4, 7])
def test_a_killed_stage_resumes_bit_identical(tmp_path, monkeypatch, whole, killed_at):
    inner, steps = reward.update, []

    def killing(*args: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) > killed_at:
            raise Killed
        return inner(*args)

    monkeypatch.setattr(reward, "update", killing)
    with pytest.raises(Killed):
        train_to_be_killed(tmp_path)
    monkeypatch.setattr(reward, "update", inner)
    assert_equal_weights(whole, train_to_be_killed(tmp_path))
    # A third start finds the result and trains nothing.
    assert_equal_weights(whole, train_to_be_killed(tmp_path))


def test_demonstrations_score_zero_on_average_and_still_do_after_loading(tmp_path):
    demonstrations = [make_demonstration("q", "one"), make_demonstration("r s", "two"), make_demonstration("t", "3")]
    stage = make_stage(tmp_path, "rm")
    trained = train_reward_model(
        make_lm(), make_groups(8), RewardConfig(), stage=stage, seed=0, demonstrations=demonstrations
    )
    loaded = load_scalar_model(stage.dir / "model", trained.device)
    assert trained.offset != 0.0
    for scalar in (trained, loaded):
        prompts, completions = zip(*demonstrations, strict=True)
        assert sum(as_scorer(scalar)(prompts, completions)) / 3 == pytest.approx(0.0, abs=1e-5)
    # Setting it again changes nothing.
    assert set_mean_score(trained, demonstrations).offset == pytest.approx(trained.offset, abs=1e-6)


def test_no_demonstrations_is_refused():
    with pytest.raises(InputError, match="expected at least one"):
        set_mean_score(make_scalar(), [])


def test_a_loss_that_is_not_finite_names_stage_and_step(tmp_path):
    config = RewardConfig(optimizer=OptimizerConfig(learning_rate=1e30, max_grad_norm=1e30), batch_size=2)
    with pytest.raises(InputError, match=r"^rm, step \d+: ") as caught:
        train_reward_model(make_lm(), make_groups(8), config, stage=make_stage(tmp_path, "rm"), seed=0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "stages" / "rm" / "model").exists()


def test_accuracy_by_source():
    scalar = make_scalar()
    groups = encode_groups(make_lm(), mixed_groups(), RewardConfig(), {}, "rm")
    metrics = evaluate_groups(scalar, groups, RewardConfig())
    pooled = (6 * metrics["valid_accuracy/human"] + metrics["valid_accuracy/weak_model"]) / 7
    assert metrics["valid_accuracy"] == pytest.approx(pooled)
    assert evaluate_groups(scalar, [], RewardConfig()) == {}


def test_paper_values():
    config = RewardConfig.paper()
    assert (config.optimizer.learning_rate, config.num_epochs, config.batch_size) == (9e-6, 1, 64)
    assert config.optimizer.final_lr_fraction == 0.1
    assert config.optimizer.betas == (0.9, 0.95)
