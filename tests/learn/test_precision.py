"""bf16 products: log-probabilities, losses and gradients stay fp32 and near those of fp32, and trainers learn."""

import math

import pytest
import torch
from test_dpo import encoded, mixed_groups
from test_dpo import make_groups as preferred
from test_reward import make_groups as ranked
from test_sft import mapping
from tiny_ppo import draw_targets, learners_of, roll, rows_of, small, train
from tiny_world import make_lm, make_stage

from qinglan.core.device import Device
from qinglan.learn import ppo_update
from qinglan.learn.dpo import DPOConfig, policy_loss, train_dpo
from qinglan.learn.optimize import OptimizerConfig
from qinglan.learn.reward import RewardConfig, encode_groups, score_groups, train_reward_model
from qinglan.learn.sft import SFTConfig, accumulate_gradients, encode_demonstrations, train_sft
from qinglan.models.adapters import LoRAConfig
from qinglan.models.heads import scalar_model_from
from qinglan.models.language_model import LanguageModel, completion_logprobs

BF16 = Device(torch.device("cpu"), torch.bfloat16)
FAST = OptimizerConfig(learning_rate=1e-2)


def both(kind: str) -> list[LanguageModel]:
    """One model, with fp32 and with bf16 matmuls."""
    lm = make_lm(kind, hidden=32)
    with torch.no_grad():  # weights as large as trained ones, so that rounding shows
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return [lm, lm._replace(device=BF16)]


def error_of(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.dtype == other.dtype == torch.float32
    return float((one - other).abs().max())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_logprobs_losses_scores_and_gradients_are_fp32_and_near(kind):
    exact, rounded = both(kind)
    examples = encode_demonstrations(exact, mapping(8), None, "sft")
    logprobs = [torch.cat(completion_logprobs(lm, examples)) for lm in (exact, rounded)]
    # bf16 has 8 bits: relative 2^-9 at each product; logits here have a standard deviation near 1.
    assert 0 < error_of(*logprobs) < 0.1

    losses, gradients = [], []
    for lm in (exact, rounded):
        losses.append(accumulate_gradients(lm, examples, [], SFTConfig(), 0).loss)
        gradients.append(torch.cat([p.grad.flatten() for p in lm.model.parameters()]))
        lm.model.zero_grad()
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99

    config = RewardConfig()
    groups = encode_groups(exact, mixed_groups(), config, {}, "rm")
    scalar = scalar_model_from(exact, seed=0)
    scores = [score_groups(scalar._replace(device=lm.device), groups, config) for lm in (exact, rounded)]
    assert error_of(*scores) < 0.1

    config = DPOConfig(sft_coef=1.0)
    groups = encoded(exact, config)
    found = [policy_loss(lm, groups, len(groups), config) for lm in (exact, rounded)]
    assert error_of(*(one.logratios for one in found)) < 0.3
    assert found[1].tally.loss == pytest.approx(found[0].tally.loss, abs=0.05)


@pytest.mark.parametrize("rank", [0, 8])
def test_every_trainer_learns_with_bf16_products(tmp_path, rank):
    lora = LoRAConfig(rank=rank, merge=True)
    lm = make_lm()._replace(device=BF16)
    config = SFTConfig(optimizer=FAST, num_epochs=8, batch_size=4, lora=lora)
    stage = make_stage(tmp_path, "sft")
    trained = train_sft(lm, mapping(8), config, stage=stage, seed=0)
    rows = stage.run.metrics("sft")
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.1
    assert all(p.dtype == torch.float32 for p in trained.model.parameters()), "weights stay fp32"

    stage = make_stage(tmp_path, "rm")
    config = RewardConfig(optimizer=FAST, num_epochs=2, lora=lora)
    train_reward_model(lm, ranked(60), config, stage=stage, seed=0, valid=ranked(20, seed=7))
    rows = stage.run.metrics("rm")
    assert rows[-1]["valid_loss"] < rows[0]["valid_loss"]

    stage = make_stage(tmp_path, "dpo")
    config = DPOConfig(optimizer=FAST, num_epochs=2, lora=lora)
    train_dpo(lm, preferred(40), config, stage=stage, seed=0, valid=preferred(20, seed=7))
    rows = stage.run.metrics("dpo")
    assert rows[0]["start/logratio_error"] < 0.01
    assert rows[-1]["valid_loss"] < rows[0]["valid_loss"] and rows[-1]["valid_accuracy"] > 0.6


def test_in_bf16_one_update_a_rollout_takes_its_own_logprobs_for_the_old_ones(tmp_path):
    lm = make_lm()._replace(device=BF16)
    rollout = roll(lm)
    config = small(estimator="rloo", episodes_per_iteration=12, minibatch_episodes=12)
    gradients = []
    for shift in (0.0, 0.3):  # the sampler's log-probabilities do not reach the gradient
        learners = learners_of(lm, estimator="rloo")
        shifted = rollout._replace(logprobs=rollout.logprobs + shift)
        tally = ppo_update.accumulate_gradients(learners, shifted, draw_targets(rollout), range(12), config)
        assert tally.ratio / tally.num_tokens == 1.0 and tally.clip_fraction == 0.0
        # |exp(new - sampled) - 1|: 1 - exp(-0.3) = 0.26 where the sampler's are shifted, rounding where they are not
        assert tally.ratio_error / tally.num_tokens == pytest.approx(1 - math.exp(-shift), abs=0.05)
        gradients.append({name: p.grad for name, p in learners.policy.model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    train(tmp_path, small(estimator="rloo", num_iterations=2, minibatch_episodes=16), lm=lm)
    assert all(0 < row["start_ratio_error"] < 0.1 and row["ratio"] == 1.0 for row in rows_of(tmp_path))
