"""Bad scorers, step-0 checks and alarms of PPO: each stops or warns with one line that says what is wrong."""

import math

import pytest
import torch
from conftest import make_tiny_lm
from tiny_ppo import PROMPTS, brevity, count_a, roll, rows_of, small, train
from tiny_world import make_lm, make_prompt, make_stage

from qinglan.core.errors import InputError
from qinglan.learn.alarms import AlarmConfig, find_alarms
from qinglan.learn.checks import (
    check_disjoint_splits,
    check_end_token_supervised,
    check_padding_invariance,
    check_ratio,
    check_start,
    masked_row_share,
    ratio_errors,
)
from qinglan.learn.ppo import PPOConfig, train_ppo
from qinglan.learn.ppo_metrics import error_of_mean
from qinglan.learn.rollout import Rollout
from qinglan.learn.scoring import ask_scorer, charge_missing_eos
from qinglan.models import language_model
from qinglan.models.generate import SamplingConfig
from qinglan.models.heads import scalar_model_from
from qinglan.models.language_model import TokenSequence
from qinglan.models.tokens import collate

# ------------------------------------------------------------------------------------------------------------ scorers


def broken_at(text: str, answer):
    """A scorer that gives (or raises) `answer` for one prompt and 1 for all others."""

    def scorer(prompts, completions):
        scores = []
        for prompt in prompts:
            wrong = prompt.messages[-1].content == text
            if wrong and isinstance(answer, Exception):
                raise answer
            scores.append(answer if wrong else 1.0)
        return scores

    return scorer


@pytest.mark.parametrize("answer", [math.nan, math.inf, None, "good", ZeroDivisionError("oops")])
def test_a_scorer_that_raises_or_gives_no_number_is_named_with_the_prompt(answer):
    with pytest.raises(InputError, match=r"the scorer: .*p-who\? \('who\?'\)") as error:
        ask_scorer(broken_at("who?", answer), PROMPTS, [None] * len(PROMPTS))
    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_wrong_number_of_scores_and_a_batch_only_failure():
    with pytest.raises(InputError, match=r"2 scores for 6 completions.*p-x y"):
        ask_scorer(lambda prompts, completions: [1.0, 2.0], PROMPTS, [None] * 6)

    def only_alone(prompts, completions):
        if len(prompts) > 1:
            raise RuntimeError("one at a time")
        return [1.0]

    with pytest.raises(InputError, match=r"RuntimeError: one at a time at a whole batch"):
        ask_scorer(only_alone, PROMPTS, [None] * 6)


def test_numbers_of_any_kind_are_taken_and_an_input_error_passes_through():
    assert ask_scorer(lambda p, c: torch.arange(6), PROMPTS, [None] * 6) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(InputError, match="mine"):
        ask_scorer(broken_at("abc", InputError("mine")), PROMPTS, [None] * 6)


def test_a_bad_scorer_stops_the_run_and_leaves_checkpoints_whole(tmp_path):
    calls = []

    def breaks_later(prompts, completions):
        calls.append(1)
        return [math.nan] * len(prompts) if len(calls) == 2 else brevity(prompts, completions)

    with pytest.raises(InputError, match=r"ppo, iteration 1: the scorer: gave nan for prompt p-"):
        train(tmp_path, small(), scorer=breaks_later)
    assert [row["step"] for row in rows_of(tmp_path)] == [0]
    train(tmp_path, small())
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2]


def test_gold_only_measures_and_unscored_is_not_wrong(tmp_path):
    def gold(prompts, completions):
        return [math.nan if i % 2 else 4.0 for i in range(len(prompts))]

    with_gold = train(tmp_path / "1", small(num_iterations=1), gold=gold).policy
    without = train(tmp_path / "2", small(num_iterations=1)).policy
    for a, b in zip(with_gold.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)
    row = rows_of(tmp_path / "1")[0]
    assert (row["gold"], row["num_golds"], row["gold_error"]) == (4.0, 8, 0.0)


def test_the_error_of_a_mean_is_over_prompts_since_samples_of_one_are_alike():
    # Two prompts, two samples each: means 1 and 3 (the NaN left out), spread 1, so 1 / sqrt(2) and not 1.2 / sqrt(3).
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    rollout = Rollout(prompts, [], [], [], torch.ones(4, 1, dtype=torch.bool), torch.zeros(4, 1))
    assert error_of_mean(rollout, [0.0, 2.0, 3.0, math.nan]) == pytest.approx(0.5**0.5)


def test_charging_by_finish_reason():
    reasons = ["eos", "length", "stop"]
    assert charge_missing_eos([1.0, 2.0, 3.0], reasons, "subtract", 0.5) == [1.0, 1.5, 3.0]
    assert charge_missing_eos([1.0, 2.0, 3.0], reasons, "replace", 1.0) == [1.0, -1.0, 3.0]
    assert charge_missing_eos([1.0, 2.0, 3.0], reasons, "keep", 1.0) == [1.0, 2.0, 3.0]


# -------------------------------------------------------------------------------------------------------------- input


def test_bad_input_is_refused_before_anything_is_sampled(tmp_path):
    lm, stage = make_lm(), make_stage(tmp_path, "ppo")
    with pytest.raises(InputError, match="no prompts"):
        train_ppo(lm, lm, brevity, [], small(), stage=stage, seed=0)
    with pytest.raises(InputError, match=r"prompt p-a{130}: 132 tokens and 5 new ones exceed the context of 128"):
        train_ppo(lm, lm, brevity, [*PROMPTS, make_prompt("a" * 130)], small(), stage=stage, seed=0)
    with pytest.raises(InputError, match="no pretraining corpus"):
        train_ppo(lm, lm, brevity, PROMPTS, small(ptx_coef=1.0), stage=stage, seed=0)
    with pytest.raises(InputError, match="no pretraining sequence"):
        train(tmp_path, small(ptx_coef=1.0), pretrain=lambda start, count: [[5]] * count)
    with pytest.raises(InputError, match=r"tiny-llama writes conversations otherwise than tiny-llama"):
        train_ppo(lm, make_tiny_lm("llama"), brevity, PROMPTS, small(), stage=stage, seed=0)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    huge = small(num_iterations=4)
    with pytest.raises(InputError, match=r"ppo, iteration 0: the norm of .* gradient is (nan|inf)"):
        train(tmp_path, huge, scorer=lambda prompts, completions: [3e38] * len(prompts))


# ------------------------------------------------------------------------------------------------------ step-0 checks


def test_start_metrics_are_logged_with_the_first_iteration(tmp_path):
    train(tmp_path, small(num_iterations=1), value_start=scalar_model_from(make_lm(), seed=0))
    row = rows_of(tmp_path)[0]
    assert row["start/padding_error"] < 1e-4 and row["start/masked_row_share"] == 0.0
    assert row["start_ratio_error"] < 1e-5 and row["ratio"] == pytest.approx(1.0, abs=0.05)


def test_ratio_check_knows_rounding_from_disagreement():
    logprobs = torch.linspace(-5, -1, 50)
    check_ratio(*ratio_errors(logprobs, logprobs + 1e-6), torch.float32, "here")
    with pytest.raises(InputError, match=r"here: .*must be 1"):  # one token only
        check_ratio(*ratio_errors(logprobs, logprobs + 1e-3 * (torch.arange(50) == 7)), torch.float32, "here")
    with pytest.raises(InputError, match="must be 1"):  # all a little
        check_ratio(*ratio_errors(logprobs, logprobs + 5e-5), torch.float32, "here")
    with pytest.raises(InputError, match="must be 1"):
        check_ratio(*ratio_errors(logprobs * torch.nan, logprobs), torch.float32, "here")


def test_padding_that_leaks_is_caught(monkeypatch):
    lm = make_lm()
    scalar = scalar_model_from(lm, seed=0)
    sequences = roll(lm).sequences[:4]
    assert check_padding_invariance(lm, scalar, sequences, "here") < 1e-4
    real = language_model.target_states
    monkeypatch.setattr(
        language_model, "target_states", lambda model, batch: real(model, batch) + batch.real_mask.sum()
    )
    with pytest.raises(InputError, match=r"here: log-probabilities of tiny-llama change .*padding"):
        check_padding_invariance(lm, scalar, sequences, "here")


def test_an_end_token_that_is_not_taught_is_caught():
    lm = make_lm()
    end = lm.chat.end_id
    check_end_token_supervised(lm.chat, collate([TokenSequence([5, 6, end], 1)]), "here")
    for sequence in (TokenSequence([5, 6, 7], 1), TokenSequence([5, 6, end], 3)):
        with pytest.raises(InputError, match=r"here: a completion ends in token"):
            check_end_token_supervised(lm.chat, collate([sequence]), "here")


def test_rows_without_a_target_are_counted_and_all_of_them_stop_the_run():
    lm = make_lm()
    with_target, without = TokenSequence([5, 6, 7], 1), TokenSequence([5, 6, 7], 3)
    assert masked_row_share([collate([with_target, without]), collate([without, without])]) == 0.75
    with pytest.raises(InputError, match="no sequence has a token to learn from"):
        check_start(lm, None, [without], "here")


def test_a_prompt_group_on_two_sides_is_named():
    check_disjoint_splits({"train": PROMPTS[:3], "test": PROMPTS[3:]})
    with pytest.raises(InputError, match="prompt group x y stands in both train and test"):
        check_disjoint_splits({"train": PROMPTS[:3], "test": PROMPTS[2:]})


# ------------------------------------------------------------------------------------------------------------- alarms


def history(count: int = 12, **series) -> list[dict[str, float]]:
    """Quiet iterations; `series` maps a metric to a function of the iteration."""
    quiet = {"kl": 0.1, "length": 20.0, "entropy": 2.0, "large_kl_share": 0.0, "score": 0.5, "gold": 0.5}
    quiet |= {"score_error": 0.3 / 128**0.5, "gold_error": 0.3 / 128**0.5, "score_outside_range": 0.0}
    return [quiet | {name: value(i) for name, value in series.items()} for i in range(count)]


@pytest.mark.parametrize(("kind", "series"), [
    ("kl_jump", {"kl": lambda i: 0.5 * i + (6.0 if i == 11 else 0.0)}),
    ("large_kl_tokens", {"large_kl_share": lambda i: 0.02}),
    ("length_drift", {"length": lambda i: 20.0 + 3 * i}),
    ("length_drift", {"length": lambda i: 20.0 / (1 + i)}),
    ("entropy_collapse", {"entropy": lambda i: 2.0 * 0.7**i}),
    ("score_out_of_range", {"score_outside_range": lambda i: 0.3}),
    ("gold_falls", {"gold": lambda i: 0.5 - 0.03 * i, "score": lambda i: 0.5 + 0.1 * i}),
])  # fmt: skip
def test_each_alarm_is_raised_by_its_cause_alone(kind, series):
    found = find_alarms(history(**series), AlarmConfig())
    assert list(found) == [kind]
    assert found[kind].startswith(f"{kind}: iteration 11: ")


@pytest.mark.parametrize("series", [
    {},
    {"kl": lambda i: 1.5 * i},
    {"length": lambda i: 20 + 0.5 * i},
    {"gold": lambda i: 0.5 + 0.02 * i, "score": lambda i: 0.5 + 0.1 * i},
    {"gold": lambda i: 0.5 - 0.03 * i, "score": lambda i: 0.5 - 0.1 * i},  # both fall: a bad run, but no exploit
    {"gold": lambda i: 0.5 + 0.02 * (-1) ** i, "score": lambda i: 0.5 + 0.1 * i},  # noise
])  # fmt: skip
def test_quiet_or_honest_runs_raise_nothing(series):
    rows = history(**series)
    assert all(not find_alarms(rows[: i + 1], AlarmConfig()) for i in range(len(rows)))


def learning(**changes) -> PPOConfig:
    return small(
        estimator="rloo",
        samples_per_prompt=4,
        num_iterations=14,
        episodes_per_iteration=64,
        minibatch_episodes=32,
        sampling=SamplingConfig(max_new_tokens=3),
        missing_eos="keep",
        checkpoint_every=100,
        alarms=AlarmConfig(window=3),
        **changes,
    )


def at_most_one_a(prompts, completions) -> list[float]:
    """The truth behind `count_a`: one "a" is right, more of them spoil the completion."""
    return [{0: 0.3, 1: 1.0}.get(completion.text.count("a"), 0.0) for completion in completions]


def test_rule_32_a_hackable_score_trips_the_alarm(tmp_path, capsys):
    config = learning(learning_rate=2e-2, kl_coef=0.0)
    result = train(tmp_path, config, scorer=count_a, gold=at_most_one_a, score_range=(0.0, 0.4))
    kinds = {alarm.split(":")[0] for alarm in result.alarms}
    assert {"gold_falls", "score_out_of_range"} <= kinds
    assert "ppo: alarm: gold_falls: iteration" in capsys.readouterr().err


def test_rule_32_a_clean_run_raises_nothing(tmp_path):
    config = learning(learning_rate=1e-2, kl_coef=0.05)
    result = train(tmp_path, config, scorer=count_a, gold=count_a, score_range=(0.0, 1.0))
    assert result.alarms == []
    rows = rows_of(tmp_path)
    assert rows[-1]["score"] > rows[0]["score"] + 0.1, "the run must have learnt, or its silence says nothing"
