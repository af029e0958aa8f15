"""The PPO loop: it learns, repeats, resumes, and scores what it sampled. Numbers in names: rules of the checklist."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_lm
from tiny_ppo import (
    PROMPTS,
    assert_equal_weights,
    brevity,
    corpus,
    count_a,
    draw_targets,
    gradients,
    hand_made,
    learners_of,
    roll,
    rows_of,
    small,
    train,
    weights_of,
)
from tiny_world import make_lm, make_stage

from qinglan.core.device import Device
from qinglan.core.errors import InputError
from qinglan.learn import ppo
from qinglan.learn.advantages import adapt_kl_coef
from qinglan.learn.ppo import PPOConfig, train_ppo
from qinglan.learn.ppo_update import (
    Targets,
    accumulate_gradients,
    update,
)
from qinglan.learn.rollout import rollout_logprobs, state_values
from qinglan.models.generate import SamplingConfig
from qinglan.models.heads import as_scorer, scalar_model_from, score_sequences, token_values
from qinglan.models.language_model import (
    LanguageModel,
    TokenSequence,
    hidden_states,
    load_language_model,
    target_logprobs,
    target_states,
)
from qinglan.models.tokens import collate

# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize(("estimator", "value_model", "scorer", "name"), [
    ("gae", "separate", count_a, "score"),
    ("gae", "shared_trunk", count_a, "score"),
    ("rloo", "separate", count_a, "score"),
    ("grpo", "separate", count_a, "score"),
    ("reinforce_pp", "separate", brevity, "finish_eos"),
])  # fmt: skip
def test_every_estimator_learns_a_known_token_or_to_stop_and_repeats(tmp_path, estimator, value_model, scorer, name):
    config = small(
        estimator=estimator,
        value_model=value_model,
        num_iterations=14,
        episodes_per_iteration=64,
        minibatch_episodes=32,
        samples_per_prompt=4,
        sampling=SamplingConfig(max_new_tokens=3),
        learning_rate=2.5e-2,
        kl_coef=0.02,
        missing_eos="keep",
        checkpoint_every=100,
    )
    first = train(tmp_path / "1", config, scorer=scorer).policy
    rows = rows_of(tmp_path / "1")
    assert rows[0][name] < 0.1 and rows[-1][name] > 0.6
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5) and rows[-1]["kl"] > 1
    short = config.model_copy(update={"num_iterations": 3})
    again = train(tmp_path / "2", short, scorer=scorer).policy
    assert rows_of(tmp_path / "2") == rows[:3]
    assert again.name == first.name == "ppo"


def test_the_result_is_an_ordinary_directory_and_a_finished_stage_is_reused(tmp_path):
    config = small(num_iterations=2)
    result = train(tmp_path, config)
    opened = load_language_model(tmp_path / "stages" / "ppo" / "model", result.policy.device)
    assert_equal_weights(opened, result.policy)
    assert not list((tmp_path / "stages" / "ppo" / "checkpoints").glob("*"))
    again = train(tmp_path, config, scorer=lambda prompts, completions: 1 / 0)
    assert_equal_weights(again.policy, result.policy)
    assert again.alarms == result.alarms


def test_start_reference_reward_model_and_scorer_stay_as_they_were(tmp_path):
    lm, reference = make_lm(), make_lm()
    value_start = scalar_model_from(lm, seed=0)
    before = weights_of(lm), weights_of(reference), value_start.model.score.weight.clone()
    train_ppo(
        lm, reference, brevity, PROMPTS, small(num_iterations=1),
        stage=make_stage(tmp_path, "ppo"), seed=0, value_start=value_start,
    )  # fmt: skip
    for kept, model in zip(before[:2], (lm, reference), strict=True):
        assert all(torch.equal(kept[name], p) for name, p in model.model.named_parameters())
    assert torch.equal(before[2], value_start.model.score.weight)


def test_with_beta_0_and_learning_rate_0_nothing_changes(tmp_path):
    lm = make_lm()
    result = train(tmp_path, small(num_iterations=2, learning_rate=0.0, value_learning_rate=0.0, kl_coef=0.0), lm=lm)
    assert_equal_weights(result.policy, lm)
    assert [row["kl"] for row in rows_of(tmp_path)] == pytest.approx([0.0, 0.0], abs=1e-5)


# -------------------------------------------------------------------------------------------------------------- resume


class Killed(BaseException):
    """Stands for whatever ends a process."""


RICH = small(
    num_iterations=4,
    minibatch_episodes=8,
    returned="ema",
    ema_decay=0.5,
    target_kl_per_completion=0.05,
    kl_horizon=50,
    scale_scores=True,
    ptx_coef=0.5,
    ptx_ratio=1,
    samples_every=1,
    warmup_iterations=2,
)


def train_rich(directory: Path, scorer=brevity, config: PPOConfig = RICH) -> LanguageModel:
    lm = make_lm()
    value = scalar_model_from(lm, seed=3)
    return train(directory, config, lm=lm, scorer=scorer, value_start=value, pretrain=corpus, gold=count_a).policy


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    train_rich(directory)
    return directory


@pytest.mark.parametrize(("deaths", "checkpoint_every"), [((1, 2, 3), 1), ((3,), 2)])
def test_rule_15_and_31_killed_at_any_iteration_it_ends_bit_identical(
    tmp_path, uninterrupted, deaths, checkpoint_every
):
    config = RICH.model_copy(update={"checkpoint_every": checkpoint_every})
    first = 0  # iteration that the next start begins with: where the newest checkpoint stands
    for iteration in deaths:
        calls = []

        def dying(prompts, completions, calls=calls, last=iteration - first + 1):
            calls.append(1)
            if len(calls) == last:
                raise Killed
            return brevity(prompts, completions)

        with pytest.raises(Killed):
            train_rich(tmp_path, dying, config)
        first = iteration - iteration % checkpoint_every
    resumed = train_rich(tmp_path, brevity, config)
    whole = load_language_model(uninterrupted / "stages" / "ppo" / "model", resumed.device)
    assert_equal_weights(whole, resumed)
    # Every number logged agrees, those of the KL controller and the running statistics among them.
    assert rows_of(tmp_path) == rows_of(uninterrupted)
    assert len({row["kl_coef"] for row in rows_of(tmp_path)}) == 4
    assert (tmp_path / "samples.jsonl").read_text() == (uninterrupted / "samples.jsonl").read_text()


def test_a_killed_run_with_a_shared_trunk_ends_bit_identical(tmp_path):
    config = RICH.model_copy(update={"value_model": "shared_trunk"})
    calls = []

    def dying(prompts, completions):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return brevity(prompts, completions)

    whole = train_rich(tmp_path / "whole", brevity, config)
    with pytest.raises(Killed):
        train_rich(tmp_path / "killed", dying, config)
    assert_equal_weights(whole, train_rich(tmp_path / "killed", brevity, config))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def test_rule_31_kill_9_and_resume_in_another_process(tmp_path, uninterrupted):
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
import test_ppo
calls = []
def dying(prompts, completions):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return test_ppo.brevity(prompts, completions)
test_ppo.train_rich(Path({str(tmp_path)!r}), dying)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    resumed = train_rich(tmp_path)
    assert_equal_weights(load_language_model(uninterrupted / "stages" / "ppo" / "model", resumed.device), resumed)
    assert rows_of(tmp_path) == rows_of(uninterrupted)


def test_rule_14_the_controller_reads_the_kl_of_whole_completions(uninterrupted):
    rows = rows_of(uninterrupted)
    for now, following in itertools.pairwise(rows):
        expected = adapt_kl_coef(now["kl_coef"], now["kl"], target=0.05, horizon=50, num_episodes=16)
        assert following["kl_coef"] == pytest.approx(expected, rel=1e-12)


def test_samples_are_written_every_few_iterations(uninterrupted):
    rows = [json.loads(line) for line in (uninterrupted / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [i for i in range(4) for _ in range(4)]
    assert set(rows[0]) == {"stage", "step", "prompt", "completion", "score"}
    assert rows[0]["prompt"] in {prompt.messages[0].content for prompt in PROMPTS}


# ---------------------------------------------------------------------------------- what is scored is what was sampled


def test_rule_1_logprobs_equal_a_loop_of_one_token_at_a_time():
    lm = make_tiny_lm("llama")
    rollout = roll(lm, temperature=0.7)
    for row, sequence in enumerate(rollout.sequences):
        for t, token in enumerate(sequence.token_ids[sequence.num_prompt_tokens :]):
            before = torch.tensor([sequence.token_ids[: sequence.num_prompt_tokens + t]])
            with torch.no_grad():
                logits = lm.model(before).logits[0, -1] / 0.7
            assert rollout.logprobs[row, t].item() == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rule_2_and_11_padding_changes_neither_logprobs_nor_values_nor_scores(architecture):
    lm = make_tiny_lm(architecture)
    scalar = scalar_model_from(lm, seed=0)
    sequences = roll(lm).sequences[:4]

    def seen(extra_columns: int) -> torch.Tensor:
        batch = collate(sequences, extra_columns=extra_columns)
        found = target_logprobs(lm.model, target_states(lm.model, batch), batch)
        values = token_values(scalar, hidden_states(scalar.model, batch))[batch.real_mask]
        return torch.cat([found.logprobs, found.entropy, values]).detach()

    plain = seen(0)
    assert plain.isfinite().all()
    for extra_columns in (3, 17):
        torch.testing.assert_close(seen(extra_columns), plain, atol=1e-5, rtol=1e-4)


def test_rule_3_pad_token_equal_to_the_end_token_changes_nothing(tmp_path):
    for pad_is_eos in (False, True):
        train(tmp_path / str(pad_is_eos), small(num_iterations=2), lm=make_tiny_lm("gpt2", pad_is_eos=pad_is_eos))
    assert rows_of(tmp_path / "True") == rows_of(tmp_path / "False")


def test_rule_4_the_end_token_is_an_action_and_what_follows_it_is_not():
    lm = make_lm()
    end = lm.chat.end_id
    learners = learners_of(lm, estimator="rloo")
    alone = hand_made(lm, [[10, 11, end]])
    with_longer = hand_made(lm, [[10, 11, end], [20, 21, 22, 23, 24, 25]])
    only_end = Targets(torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), torch.zeros(1, 3), None)
    accumulate_gradients(learners, alone, only_end, [0], small(estimator="rloo"))
    assert learners.policy.model.get_output_embeddings().weight.grad[end].abs().sum() > 1e-4
    lone = gradients(learners)
    # In a batch with a longer row, padding follows the end token; whatever stands there, nothing changes.
    poisoned = torch.full((2, 6), torch.nan)
    poisoned[0, :3] = only_end.advantages[0]
    poisoned[1, :6] = 0.0
    targets = Targets(poisoned, torch.zeros(2, 6), torch.zeros(2, 6), None)
    accumulate_gradients(learners, with_longer, targets, [0, 1], small(estimator="rloo"))
    torch.testing.assert_close(gradients(learners) * 9 / 3, lone, atol=1e-6, rtol=1e-4)


def test_rule_8_at_another_temperature_the_ratio_is_1_and_a_forgotten_temperature_is_caught(tmp_path, monkeypatch):
    train(tmp_path, small(num_iterations=2, sampling=SamplingConfig(temperature=0.7, max_new_tokens=5)))
    rows = rows_of(tmp_path)
    assert all(row["start_ratio_error"] < 1e-5 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5), "the reference is tempered alike: no KL to itself"
    real = ppo.rollout_logprobs
    monkeypatch.setattr(ppo, "rollout_logprobs", lambda lm, rollout, temperature, n: real(lm, rollout, 1.0, n))
    with pytest.raises(InputError, match="ratio"):
        train(tmp_path / "1", small(sampling=SamplingConfig(temperature=0.7, max_new_tokens=5)), lm=make_tiny_lm())


@pytest.mark.parametrize("changes", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.0}])
def test_rule_8_sampling_from_another_distribution_is_refused(changes):
    with pytest.raises(ValueError, match="sampling"):
        PPOConfig(sampling=SamplingConfig(**changes))


def test_rule_9_old_logprobs_that_are_not_the_policys_stop_the_run(tmp_path, monkeypatch):
    real = ppo.draw_rollout

    def off_by_a_little(*arguments, **named):
        rollout = real(*arguments, **named)
        return rollout._replace(logprobs=rollout.logprobs + 0.001)

    monkeypatch.setattr(ppo, "draw_rollout", off_by_a_little)
    with pytest.raises(InputError, match=r"ppo, iteration 0: .*ratio .*sampler and trainer disagree"):
        train(tmp_path, small())
    train(tmp_path / "recomputed", small(num_iterations=1, old_logprobs="recompute"))
    assert rows_of(tmp_path / "recomputed")[0]["start_ratio_error"] < 1e-5


def test_rule_9_dropout_left_on_is_caught_at_the_first_minibatch():
    lm = make_tiny_lm("gpt2")
    learners, rollout = learners_of(lm), roll(lm)
    for module in learners.policy.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    learners.policy.model.train()
    config = small(episodes_per_iteration=12)
    with torch.random.fork_rng(), pytest.raises(InputError, match="ratio"):
        update(learners, None, rollout, draw_targets(rollout), config, 0, 0, where="here")


def test_rule_10_entropy_is_that_of_the_tempered_policy_over_sampled_tokens_only():
    lm = make_tiny_lm("llama")
    rollout = roll(lm, temperature=0.7)
    config = small(episodes_per_iteration=12, sampling=SamplingConfig(temperature=0.7))
    tally = accumulate_gradients(learners_of(lm), rollout, draw_targets(rollout), range(12), config)
    expected = []
    for sequence in rollout.sequences:
        with torch.no_grad():
            logits = lm.model(torch.tensor([sequence.token_ids])).logits[0, sequence.num_prompt_tokens - 1 : -1]
        expected.append(torch.distributions.Categorical(logits=logits / 0.7).entropy())
    assert tally.entropy / tally.num_tokens == pytest.approx(float(torch.cat(expected).mean()), abs=1e-4)


def test_rule_23_training_sees_exactly_the_sampled_ids(tmp_path, monkeypatch):
    lm = make_tiny_lm("llama")  # its tokenizer has several ways to write one text
    trained: list[TokenSequence] = []
    real = ppo.update

    def spy(learners, pretrain, rollout, *others, **named):
        trained.extend(rollout.sequences)
        return real(learners, pretrain, rollout, *others, **named)

    monkeypatch.setattr(ppo, "update", spy)
    seen = []

    def scorer(prompts, completions):
        seen.extend(completions)
        return brevity(prompts, completions)

    train(tmp_path, small(num_iterations=2, sampling=SamplingConfig(max_new_tokens=12)), lm=lm, scorer=scorer)
    assert [tuple(s.token_ids[s.num_prompt_tokens :]) for s in trained] == [c.token_ids for c in seen]
    would_change = [c for c in seen if tuple(lm.chat.completion_ids(c.text)) != c.token_ids]
    assert would_change, "the test wants completions whose text would be tokenised otherwise"


def test_rule_24_the_reward_model_reads_what_it_was_trained_on():
    lm = make_lm()
    rollout, scalar = roll(lm), scalar_model_from(lm, seed=0)
    scores = as_scorer(scalar)(rollout.prompts, rollout.completions)
    assert scores == pytest.approx(score_sequences(scalar, rollout.sequences).tolist(), abs=1e-6)


def test_rule_26_the_value_after_the_last_token_is_the_reward_models_score_at_step_0():
    lm = make_lm()
    scalar = scalar_model_from(lm, seed=0)._replace(offset=0.7)
    rollout = roll(lm)
    learners = learners_of(lm, scalar)
    states = state_values(learners.value, rollout, 4096)
    torch.testing.assert_close(states.end_values, score_sequences(scalar, rollout.sequences), atol=1e-5, rtol=1e-5)
    # The state before token t ends in token t - 1: the value there is the score of the sequence cut before t.
    cut = [TokenSequence(s.token_ids[: s.num_prompt_tokens + 1], 1) for s in rollout.sequences]
    has_second = rollout.lengths > 1
    expected = score_sequences(scalar, cut)[has_second]
    torch.testing.assert_close(states.values[has_second, 1], expected, atol=1e-5, rtol=1e-5)


def test_without_a_reward_model_every_state_starts_at_0():
    lm = make_lm()
    states = state_values(learners_of(lm).value, roll(lm), 4096)
    assert not states.values.any() and not states.end_values.any()


def test_rule_27_reference_logprobs_stay_constant_while_the_policy_trains(tmp_path):
    lm = make_lm()
    rollout = roll(lm)
    before = rollout_logprobs(lm, rollout, 1.0, 4096)
    policy = train(tmp_path, small(num_iterations=1), lm=lm).policy
    assert torch.equal(rollout_logprobs(lm, rollout, 1.0, 4096), before)
    assert not torch.allclose(rollout_logprobs(policy, rollout, 1.0, 4096), before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_rule_29_logprobs_are_fp32_and_close_whatever_the_matmuls(tmp_path, dtype, tolerance):
    lm = make_lm()._replace(device=Device(torch.device("cpu"), dtype))
    rollout = roll(lm)
    again = rollout_logprobs(lm, rollout, 1.0, 4096)
    assert rollout.logprobs.dtype == again.dtype == torch.float32
    assert (again - rollout.logprobs)[rollout.completion_mask].abs().max() < tolerance
    train(tmp_path, small(num_iterations=2), lm=lm)
    assert all(row["start_ratio_error"] < tolerance for row in rows_of(tmp_path))
