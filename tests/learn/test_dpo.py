"""DPO: hand-worked losses, gradients against a slow loop, prompts shared, resume, and that it learns a preference."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import LETTERS, make_group, make_lm, make_stage
from torch import Tensor

from qinglan.core.errors import InputError
from qinglan.core.records import ComparisonGroup, PreferenceProbability, Ranking
from qinglan.core.rng import numpy_stream
from qinglan.learn import dpo
from qinglan.learn.dpo import (
    DPOConfig,
    as_implicit_scorer,
    best_of,
    evaluate_groups,
    policy_loss,
    reference_logprobs,
    train_dpo,
)
from qinglan.learn.losses import PairTargets, dpo_loss, group_policy_loss, group_ranking_loss, ipo_loss
from qinglan.learn.optimize import OptimizerConfig
from qinglan.learn.reward import EncodedGroup, encode_groups, micro_batches
from qinglan.models.language_model import LanguageModel, completion_logprobs, load_language_model

LOG_2 = math.log(2)


# ---------------------------------------------------------------------------------------------------------- losses


def test_dpo_by_hand():
    # log-ratios: chosen +3 nats, rejected -1, so h = 4; beta 0.5: sigmoid(2) = 0.880797, -log = 0.126928
    gaps = torch.tensor([4.0, 4.0, 4.0, 0.0])
    p = torch.tensor([1.0, 0.0, 0.75, 0.75])
    # p = 0: -log sigmoid(-2) = 2.126928; p = 0.75: 0.75 * 0.126928 + 0.25 * 2.126928 = 0.626928; h = 0: log 2 for any p
    torch.testing.assert_close(dpo_loss(gaps, p, 0.5), torch.tensor([0.126928, 2.126928, 0.626928, LOG_2]))


def test_label_smoothing_by_hand():
    # e = 0.1, p = 1, beta h = 2: 0.9 * 0.126928 + 0.1 * 2.126928 = 0.326928
    smoothed = dpo_loss(torch.tensor([4.0]), torch.tensor([1.0]), 0.5, 0.1)
    torch.testing.assert_close(smoothed, torch.tensor([0.326928]))
    # At e the smoothed loss is least where the policy gives the swap a chance of e: beta h = log(0.9 / 0.1).
    gap = torch.tensor([math.log(9.0) / 0.5], requires_grad=True)
    dpo_loss(gap, torch.tensor([1.0]), 0.5, 0.1).sum().backward()
    assert gap.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_ipo_by_hand():
    # tau 0.25: the target is 1 / (2 * 0.25) = 2 nats for p = 1, -2 for p = 0, and 0.5 * 2 = 1 for p = 0.75
    gaps = torch.tensor([3.0, 3.0, 3.0, 2.0])
    p = torch.tensor([1.0, 0.0, 0.75, 1.0])
    torch.testing.assert_close(ipo_loss(gaps, p, 0.25), torch.tensor([1.0, 25.0, 4.0, 0.0]))


def test_a_soft_label_is_the_mean_of_ipos_loss_over_labels_up_to_a_constant():
    gaps = torch.linspace(-3, 3, 7)
    p = 0.3
    mean = p * ipo_loss(gaps, torch.ones(7), 0.4) + (1 - p) * ipo_loss(gaps, torch.zeros(7), 0.4)
    rest = mean - ipo_loss(gaps, torch.full((7,), p), 0.4)
    # (h - c)^2 p + (h + c)^2 (1 - p) - (h - (2p - 1) c)^2 = c^2 (1 - (2p - 1)^2), with c = 1 / (2 tau) = 1.25
    torch.testing.assert_close(rest, torch.full((7,), 1.25**2 * (1 - 0.4**2)), atol=1e-5, rtol=0)


def test_dpo_is_the_reward_models_loss_of_beta_times_the_logratios():
    pairs = PairTargets(
        torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.2, 0.3, 0.5])
    )
    logratios = torch.tensor([0.3, -1.2, 2.0])
    ours = group_policy_loss(logratios, pairs, kind="dpo", beta=0.7)
    theirs = group_ranking_loss(0.7 * logratios, pairs)
    assert ours.loss == pytest.approx(theirs.loss) and ours[1:3] == theirs[1:3]
    # margins of the two decided pairs: 0.7 * (0.3 + 1.2) = 1.05 and 0.7 * (0.3 - 2.0) = -1.19
    assert ours.margins.item() == pytest.approx(1.05 - 1.19)


def test_smoothing_is_refused_for_ipo():
    with pytest.raises(ValueError, match='label_smoothing belongs to loss "dpo"'):
        DPOConfig(loss="ipo", label_smoothing=0.1)


# ------------------------------------------------------------------------------------------- one batch, against a loop


def mixed_groups() -> list[ComparisonGroup]:
    ranking = Ranking(groups=((3,), (0, 2), (1,)))
    return [
        make_group("one", ["x", "yyy", "zz", "www w"], ranking),
        make_group("two two", ["abc", "d"], PreferenceProbability(p_first_better=0.3), source="weak_model"),
        make_group("3", ["e", "ff", "g hijk lm"], Ranking(groups=((2,), (0,)))),
        make_group("4", ["e", "fghijk"], Ranking(groups=((1,), (0,)))),
    ]


def encoded(lm: LanguageModel, config: DPOConfig, groups: list[ComparisonGroup] | None = None) -> list[EncodedGroup]:
    """Groups with the log-probabilities of a reference that is another model than `lm`."""
    found = encode_groups(lm, groups or mixed_groups(), config, {"weak_model": 0.5}, "dpo")
    reference = make_lm(lm.name.removeprefix("tiny-"))
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.mul_(0.9)
    return dpo.with_reference(found, reference_logprobs(reference, found, config))


def gradients(lm: LanguageModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    return found


def batch_gradients(
    lm: LanguageModel, groups: list[EncodedGroup], config: DPOConfig
) -> tuple[float, dict[str, Tensor]]:
    loss = 0.0
    for part in micro_batches(groups, config.max_tokens):
        found = policy_loss(lm, part, len(groups), config)
        found.loss.backward()
        loss += found.tally.loss
    return loss, gradients(lm)


def naive_gradients(
    lm: LanguageModel, groups: list[EncodedGroup], config: DPOConfig
) -> tuple[float, dict[str, Tensor]]:
    """Every pair by itself, both completions read again each time by the model's own forward pass: the slow loop."""

    def logprob(sequence: Any) -> Tensor:
        ids = torch.tensor([sequence.token_ids])
        logprobs = lm.model(ids).logits[0, :-1].log_softmax(-1)
        return logprobs[torch.arange(len(logprobs)), ids[0, 1:]][sequence.num_prompt_tokens - 1 :]

    total = 0.0
    for group in groups:
        for first, second, p in group.pairs:
            h = logprob(group.sequences[first]).sum() - group.reference_logprobs[first]
            h = h - (logprob(group.sequences[second]).sum() - group.reference_logprobs[second])
            if config.loss == "ipo":
                loss = (h - (2 * p - 1) / (2 * config.beta)) ** 2
            else:
                q = p * (1 - config.label_smoothing) + (1 - p) * config.label_smoothing
                s = torch.sigmoid(config.beta * h)
                loss = -(q * torch.log(s) + (1 - q) * torch.log(1 - s))
            loss = loss * group.weight / len(group.pairs) / len(groups)
            loss.backward()
            total += loss.item()
        best = [item for item, is_best in enumerate(best_of(group)) if is_best]
        for item in best:
            loss = -logprob(group.sequences[item]).mean() * config.sft_coef * group.weight / len(best) / len(groups)
            loss.backward()
            total += loss.item()
    return total, gradients(lm)


def assert_same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]], atol: float) -> None:
    assert one[0] == pytest.approx(other[0], abs=atol)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma", "mistral_sliding", "gemma3"])
@pytest.mark.parametrize(("loss", "share"), [("dpo", True), ("dpo", False), ("ipo", True)])
def test_loss_and_gradients_equal_the_naive_pairs(kind, loss, share):
    lm = make_lm(kind)
    smoothing = 0.1 if loss == "dpo" else 0.0
    config = DPOConfig(loss=loss, share_prompt=share, ties="half", sft_coef=0.5, beta=0.3, label_smoothing=smoothing)
    groups = encoded(lm, config)
    assert_same(batch_gradients(lm, groups, config), naive_gradients(lm, groups, config), atol=1e-5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 40, 100])
def test_micro_batches_do_not_change_the_gradient(share, max_tokens):
    lm = make_lm()
    config = DPOConfig(share_prompt=share, sft_coef=1.0)
    groups = encoded(lm, config, make_groups(8))
    small = config.model_copy(update={"max_tokens": max_tokens})
    assert len(list(micro_batches(groups, small.max_tokens))) > len(list(micro_batches(groups, config.max_tokens)))
    assert_same(batch_gradients(lm, groups, small), batch_gradients(lm, groups, config), atol=1e-6)


def test_reference_logprobs_are_those_of_the_completions_in_order():
    lm = make_lm()
    groups = encode_groups(lm, mixed_groups(), DPOConfig(), {}, "dpo")
    expected = [values.sum().item() for group in groups for values in completion_logprobs(lm, list(group.sequences))]
    for max_tokens in (1, 8192):
        found = reference_logprobs(lm, groups, DPOConfig(max_tokens=max_tokens))
        assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_completion_is_best_if_no_pair_prefers_another():
    groups = encode_groups(make_lm(), mixed_groups(), DPOConfig(ties="half"), {}, "dpo")
    assert [best_of(group) for group in groups] == [
        [False, False, False, True],
        [False, True],  # the first is better with probability 0.3
        [False, True],  # the unranked completion is left out
        [False, True],
    ]


# --------------------------------------------------------------------------------------------------------- learning


def random_text(generator: Any, low: int, high: int) -> str:
    return "".join(generator.choice(list(LETTERS[:26]), generator.integers(low, high)))


def make_groups(count: int, seed: int = 0, k: int = 4) -> list[ComparisonGroup]:
    """Rankings by the number of letters "a" among four letters: more is better."""
    generator = numpy_stream(seed, "groups")
    groups = []
    for number in range(count):
        numbers_of_a = generator.permutation(k)
        others = [list(generator.choice(list(LETTERS[1:26]), 4 - n)) for n in numbers_of_a]
        answers = [
            "".join(generator.permutation(["a"] * n + rest)) for n, rest in zip(numbers_of_a, others, strict=True)
        ]
        label = Ranking(groups=tuple((int(i),) for i in (-numbers_of_a).argsort()))
        groups.append(make_group(f"{number}{random_text(generator, 2, 8)}", answers, label))
    return groups


def assert_equal_weights(one: LanguageModel, other: LanguageModel) -> None:
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_it_learns_what_is_preferred_on_prompts_it_has_not_seen_and_repeats(tmp_path, loss):
    config = DPOConfig(loss=loss, optimizer=OptimizerConfig(learning_rate=3e-3), num_epochs=2)
    train, valid = make_groups(60, seed=1), make_groups(30, seed=2)
    start = make_lm()
    one, two = (
        train_dpo(start, train, config, stage=make_stage(tmp_path / name, "dpo"), seed=3, valid=valid)
        for name in ("one", "two")
    )
    assert_equal_weights(one, two)
    assert_equal_weights(start, make_lm())  # where it started is not changed
    assert_equal_weights(one, load_language_model(tmp_path / "one" / "stages" / "dpo" / "model", one.device))
    rows = make_stage(tmp_path / "one", "dpo").run.metrics("dpo")
    first, last = rows[0], rows[-1]
    assert first["start/logratio_error"] < 1e-5
    assert first["start/loss"] == pytest.approx(LOG_2 if loss == "dpo" else (1 / (2 * 0.1)) ** 2, abs=1e-3)
    assert first["valid_loss"] == pytest.approx(first["start/loss"], abs=1e-3)
    assert first["valid_margin"] == pytest.approx(0.0, abs=1e-4)
    assert last["valid_accuracy"] > 0.9 and last["valid_loss"] < 0.9 * first["valid_loss"]
    assert last["valid_margin"] > 0.1
    assert last["valid_chosen_logratio"] > last["valid_rejected_logratio"]
    assert len(rows) == 1 + 16


def test_the_sft_term_raises_the_likelihood_of_the_best(tmp_path):
    last = {}
    for coef in (0.0, 1.0):
        config = DPOConfig(optimizer=OptimizerConfig(learning_rate=3e-3), num_epochs=2, sft_coef=coef)
        stage = make_stage(tmp_path / str(coef), "dpo")
        train_dpo(make_lm(), make_groups(60, seed=1), config, stage=stage, seed=3)
        last[coef] = stage.run.metrics("dpo")[-1]
    assert last[1.0]["chosen_logratio"] > last[0.0]["chosen_logratio"] + 0.5
    assert last[1.0]["loss"] == pytest.approx(last[1.0]["preference_loss"] + last[1.0]["sft_loss"], rel=1e-5)
    assert "sft_loss" not in last[0.0]


def test_another_reference_is_where_kl_is_measured_to(tmp_path):
    reference = make_lm()
    with torch.no_grad():
        reference.model.get_output_embeddings().weight.mul_(1.5)
    stage = make_stage(tmp_path, "dpo")
    train_dpo(make_lm(), make_groups(8), DPOConfig(), stage=stage, seed=0, reference=reference)
    assert stage.run.metrics("dpo")[0]["start/logratio_error"] > 0.01


def test_a_policy_that_is_not_its_reference_stops_the_run(tmp_path, monkeypatch):
    inner = dpo.reference_logprobs
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *args: inner(*args) + 0.01)
    with pytest.raises(InputError, match=r"^dpo: before any update the policy must score completions as its reference"):
        train_dpo(make_lm(), make_groups(4), DPOConfig(), stage=make_stage(tmp_path, "dpo"), seed=0)


def test_a_loss_that_is_not_finite_names_stage_and_step(tmp_path):
    config = DPOConfig(optimizer=OptimizerConfig(learning_rate=1e30, max_grad_norm=1e30), batch_size=2)
    with pytest.raises(InputError, match=r"^dpo, step \d+: ") as caught:
        train_dpo(make_lm(), make_groups(8), config, stage=make_stage(tmp_path, "dpo"), seed=0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "stages" / "dpo" / "model").exists()


def test_the_implicit_reward_of_a_completion_is_beta_times_its_logratio():
    lm, config = make_lm(), DPOConfig()
    groups = mixed_groups()[:1]
    [group] = encoded(lm, config, groups)
    reference = make_lm()
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.mul_(0.9)
    found = as_implicit_scorer(lm, reference, 0.3)([groups[0].prompt] * 4, groups[0].completions)
    assert found == pytest.approx((0.3 * policy_loss(lm, [group], 1, config).logratios).tolist(), abs=1e-5)


def test_nothing_is_measured_without_held_out_groups():
    assert evaluate_groups(make_lm(), [], DPOConfig()) == {}


def test_paper_values():
    config = DPOConfig.paper()
    assert (config.beta, config.batch_size, config.optimizer.learning_rate) == (0.1, 64, 1e-6)
    assert config.optimizer.final_lr_fraction == 1.0


# ----------------------------------------------------------------------------------------------------------- resume


def train_to_be_killed(directory: Path) -> LanguageModel:
    """All that could break a resume: two epochs, a ragged last batch, warm-up, decay, held-out groups."""
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_fraction=0.2, weight_decay=0.1)
    config = DPOConfig(optimizer=optimizer, num_epochs=2, batch_size=3, sft_coef=0.3, checkpoint_every=2)
    stage = make_stage(directory, "dpo")
    return train_dpo(make_lm(), make_groups(10), config, stage=stage, seed=0, valid=make_groups(3, seed=5))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    directory = tmp_path_factory.mktemp("whole")
    train_to_be_killed(directory)
    return directory


CHILD = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import test_dpo
inner = test_dpo.dpo.update
def dying(*args):
    if args[-1] == f"dpo, step {sys.argv[2]}":
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args)
test_dpo.dpo.update = dying
test_dpo.train_to_be_killed(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("step", [2, 6])
def test_kill_9_and_resume_ends_bit_identical(tmp_path, monkeypatch, whole, step):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(step), *paths]
    ended = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    if step > 2:  # the checkpoint keeps what the reference said
        monkeypatch.setattr(dpo, "reference_logprobs", lambda *args: pytest.fail("asked the reference again"))
    resumed = train_to_be_killed(tmp_path)
    assert_equal_weights(load_language_model(whole / "stages" / "dpo" / "model", resumed.device), resumed)
    logs = [make_stage(directory, "dpo").run.metrics("dpo") for directory in (whole, tmp_path)]
    assert logs[0] == logs[1]
    # A third start finds the result and trains nothing.
    assert_equal_weights(resumed, train_to_be_killed(tmp_path))
