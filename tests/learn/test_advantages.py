"""Advantages: hand-worked numbers, slow oracles, properties. A number in a name is a rule of the PPO checklist."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qinglan.core.rng import stream
from qinglan.learn.advantages import (
    NO_MOMENTS,
    adapt_kl_coef,
    estimate_advantages,
    explained_variance,
    gae,
    grpo_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    mask_of_lengths,
    moments_of,
    pad_rows,
    returns_to_go,
    rloo_advantages,
    token_rewards,
    whiten,
)


def draw(*shape: int, key: str = "x") -> torch.Tensor:
    return torch.randn(*shape, generator=stream(0, key), dtype=torch.float64)


def ragged_mask(lengths: list[int], width: int) -> torch.Tensor:
    return mask_of_lengths(torch.tensor(lengths), width)


# ------------------------------------------------------------------------------------------------------------ rewards


def test_rule_5_score_lands_on_the_last_real_action_and_nowhere_else():
    mask = ragged_mask([2, 4, 1], 4)
    policy, reference = torch.zeros(3, 4), torch.tensor([[0.5] * 4, [1.0] * 4, [-1.0] * 4])
    rewards = token_rewards(policy, reference, torch.tensor([10.0, 20.0, 30.0]), mask, kl_coef=0.1)
    # -beta * (0 - reference) is 0.05, 0.1, -0.1 a token; the score is added at places 1, 3 and 0.
    expected = [[0.05, 10.05, 0.0, 0.0], [0.1, 0.1, 0.1, 20.1], [29.9, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_rule_5_four_token_gae_by_hand():
    # values 1, 2, 3, 4; the score 10 at the last action; V after the end is 0; discount 1, lambda 0.5
    # deltas: 0+2-1 = 1, 0+3-2 = 1, 0+4-3 = 1, 10+0-4 = 6
    # A3 = 6, A2 = 1 + 0.5*6 = 4, A1 = 1 + 0.5*4 = 3, A0 = 1 + 0.5*3 = 2.5; returns = A + V
    rewards, values = torch.tensor([[0.0, 0.0, 0.0, 10.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    result = gae(rewards, values, ragged_mask([4], 4), gae_lambda=0.5)
    torch.testing.assert_close(result.advantages, torch.tensor([[2.5, 3.0, 4.0, 6.0]]))
    torch.testing.assert_close(result.returns, torch.tensor([[3.5, 5.0, 7.0, 10.0]]))


def test_rule_7_bootstrapped_end_uses_the_value_after_the_last_token():
    # delta_1 = 0 + 5 - 2 = 3 where cut short, 0 + 0 - 2 = -2 where it ended; delta_0 = 2 - 1 = 1; lambda 1
    rewards, values = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    result = gae(rewards, values, ragged_mask([2, 2], 2), gae_lambda=1.0, end_values=torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(result.advantages, torch.tensor([[4.0, 3.0], [-1.0, -2.0]]))


def slow_gae(rewards: list[float], values: list[float], discount: float, gae_lambda: float) -> list[float]:
    """Eq. 16 as a double sum: A_t = sum_l (gamma lambda)^l delta_{t+l}."""
    after = [*values[1:], 0.0]
    deltas = [r + discount * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    return [
        sum((discount * gae_lambda) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))
    ]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    discount=st.floats(0.5, 1.0),
    gae_lambda=st.floats(0.0, 1.0),
)
def test_gae_equals_the_slow_double_sum(lengths, discount, gae_lambda):
    width = max(lengths)
    rewards, values = draw(len(lengths), width, key="r"), draw(len(lengths), width, key="v")
    result = gae(rewards, values, ragged_mask(lengths, width), discount=discount, gae_lambda=gae_lambda)
    for row, length in enumerate(lengths):
        slow = slow_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), discount, gae_lambda)
        assert result.advantages[row, :length].tolist() == pytest.approx(slow, abs=1e-9)


def test_rule_18_gaps_are_stepped_over_as_if_the_row_were_compacted():
    rewards, values = draw(1, 7, key="r"), draw(1, 7, key="v")
    mask = torch.tensor([[True, True, False, False, True, False, True]])
    whole = gae(rewards, values, mask)
    compact = gae(rewards[mask][None], values[mask][None], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(whole.advantages[mask], compact.advantages[0])
    torch.testing.assert_close(whole.returns[mask], compact.returns[0])
    assert not whole.advantages[~mask].any()


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo", "reinforce_pp"])
def test_rule_11_and_20_padding_full_of_nan_changes_nothing(estimator):
    lengths, scores = [3, 1, 4, 2], draw(4, key="s")
    policy, reference, values = draw(4, 4, key="p"), draw(4, 4, key="q"), draw(4, 4, key="v")

    def advantages(pad: float, extra: int) -> torch.Tensor:
        mask = ragged_mask(lengths, 4 + extra)
        filled = [torch.where(mask, torch.nn.functional.pad(x, (0, extra)), pad) for x in (policy, reference, values)]
        rewards = token_rewards(filled[0], filled[1], scores, mask, 0.1)
        result = estimate_advantages(estimator, rewards, mask, num_samples=2, values=filled[2])
        assert result.advantages.isfinite().all() and result.returns.isfinite().all()
        assert not result.advantages[~mask].any(), "nothing may be learnt from what lies after the end"
        assert not result.returns[~mask].any()
        return torch.cat([whiten(result.advantages, mask)[mask], result.returns[mask]])

    clean = advantages(0.0, 0)
    torch.testing.assert_close(advantages(float("nan"), 0), clean)
    torch.testing.assert_close(advantages(float("nan"), 17), clean)


# --------------------------------------------------------------------------------------------------------- estimators


def test_rloo_by_hand_and_sums_to_zero():
    # others' means: (2+6)/2 = 4, (1+6)/2 = 3.5, (1+2)/2 = 1.5
    result = rloo_advantages(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    torch.testing.assert_close(result, torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]))


def test_grpo_by_hand_and_equal_group_is_zero():
    # mean 2, population std sqrt((1+0+1)/3)
    result = grpo_advantages(torch.tensor([1.0, 2.0, 3.0, 7.0, 7.0, 7.0]), 3, eps=1e-12)
    scale = (2 / 3) ** 0.5
    torch.testing.assert_close(result, torch.tensor([-1 / scale, 0.0, 1 / scale, 0.0, 0.0, 0.0]))


def test_reinforce_pp_is_the_return_from_each_token_on():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 5.0, 9.0]])
    mask = ragged_mask([3, 2], 3)
    result = estimate_advantages("reinforce_pp", rewards, mask, num_samples=1)
    torch.testing.assert_close(result.advantages, torch.tensor([[7.0, 6.0, 4.0], [6.0, 5.0, 0.0]]))
    torch.testing.assert_close(returns_to_go(rewards, mask, 0.5)[0], torch.tensor([1 + 1 + 1.0, 2 + 2.0, 4.0]))


def test_rloo_charges_the_kl_of_the_whole_completion():
    mask = ragged_mask([2, 1], 2)
    rewards = token_rewards(torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([3.0, 3.0]), mask, kl_coef=0.5)
    # returns 3 - 0.5*2 = 2 and 3 - 0.5*1 = 2.5
    result = estimate_advantages("rloo", rewards, mask, num_samples=2)
    torch.testing.assert_close(result.advantages, torch.tensor([[-0.5, -0.5], [0.5, 0.0]]))


def test_gae_without_values_is_refused():
    with pytest.raises(ValueError, match="values"):
        estimate_advantages("gae", torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), num_samples=1)


# ---------------------------------------------------------------------------------------------------------- whitening


def test_rule_16_whitened_has_mean_0_and_population_variance_1():
    values, mask = draw(5, 9) * 7 + 3, ragged_mask([9, 1, 4, 3, 8], 9)
    whitened = whiten(values, mask)
    assert float(whitened[mask].mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(whitened[mask].var(correction=0)) == pytest.approx(1.0, abs=1e-6)
    assert not whitened[~mask].any()


def test_rule_16_two_processes_whiten_like_one():
    values, mask = draw(6, 5), ragged_mask([5, 1, 2, 4, 3, 5], 5)
    halves = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    merged = NO_MOMENTS
    for part, part_mask in halves:
        merged = merged.merge(moments_of(part, part_mask))
    both = torch.cat([whiten(part, part_mask, moments=merged) for part, part_mask in halves])
    torch.testing.assert_close(both, whiten(values, mask))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=20), st.integers(0, 9))
def test_rule_17_whitening_of_rewards_keeps_their_mean(numbers, junk):
    values = torch.tensor([[*numbers, 1e6 * junk]], dtype=torch.float64)
    mask = ragged_mask([len(numbers)], len(numbers) + 1)
    kept = whiten(values, mask, shift_mean=False)
    assert float(kept[mask].mean()) == pytest.approx(float(values[mask].mean()), abs=1e-6)
    shifted = whiten(values, mask)
    torch.testing.assert_close(kept[mask] - kept[mask].mean(), shifted[mask], atol=1e-5, rtol=1e-5)


@given(st.lists(st.lists(st.floats(-100, 100), max_size=6), max_size=5))
def test_moments_merge_as_if_counted_together(parts):
    merged = NO_MOMENTS
    for part in parts:
        merged = merged.merge(moments_of(torch.tensor(part, dtype=torch.float64)))
    everything = torch.tensor([x for part in parts for x in part], dtype=torch.float64)
    assert merged.num_values == len(everything)
    if len(everything):
        assert merged.mean == pytest.approx(float(everything.mean()), abs=1e-9)
        assert merged.variance == pytest.approx(float(everything.var(correction=0)), abs=1e-7)


def test_explained_variance_of_perfect_constant_and_wrong_values():
    returns, mask = draw(3, 4), ragged_mask([4, 2, 3], 4)
    assert explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(3, 4), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(3, 4), mask) == 0.0


# ----------------------------------------------------------------------------------------------------------------- KL


def test_rule_14_ziegler_controller_clips_at_a_fifth():
    # within the clip: kl 6.6 against 6 is +10%; 256 episodes of horizon 10,000: 0.15 * (1 + 0.1 * 0.0256)
    assert adapt_kl_coef(0.15, 6.6, target=6, horizon=10_000, num_episodes=256) == pytest.approx(0.15 * 1.00256)
    assert adapt_kl_coef(0.15, 99.0, target=6, horizon=10_000, num_episodes=256) == pytest.approx(0.15 * 1.00512)
    assert adapt_kl_coef(0.15, -3.0, target=6, horizon=10_000, num_episodes=256) == pytest.approx(0.15 * 0.99488)
    assert adapt_kl_coef(0.15, 6.0, target=6, horizon=10_000, num_episodes=256) == 0.15


def enumerable() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a policy over three tokens, log-probabilities of a reference, rewards."""
    logits = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.9, 0.2, -0.4], dtype=torch.float64).log_softmax(0)
    return logits, reference, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def test_rule_12_estimators_have_the_right_means():
    logits, reference, _ = enumerable()
    logprobs = logits.log_softmax(0).detach()
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((logprobs.exp() * estimator(logprobs, reference)).sum(), exact)
    assert (kl_k1(logprobs, reference) < 0).any() and (kl_k3(logprobs, reference) >= 0).all()


def test_rule_12_k1_in_the_reward_is_the_gradient_of_the_regularised_objective_and_k3_is_not():
    logits, reference, rewards = enumerable()
    logprobs, coef = logits.log_softmax(0), 0.7
    objective = (logprobs.exp() * (rewards - coef * (logprobs - reference))).sum()
    exact = gradient(objective, logits)
    fixed = logprobs.detach()

    def policy_gradient(penalty: torch.Tensor) -> torch.Tensor:
        # E over the policy of grad log pi(a) * (r(a) - beta * penalty(a)), by enumeration
        return gradient((fixed.exp() * logprobs * (rewards - coef * penalty)).sum(), logits)

    torch.testing.assert_close(policy_gradient(kl_k1(fixed, reference)), exact)
    assert not torch.allclose(policy_gradient(kl_k3(fixed, reference)), exact, atol=1e-2)


def test_rule_12_as_losses_k2_has_the_gradient_of_the_kl_and_k3_of_the_other_direction():
    logits, reference, _ = enumerable()
    logprobs = logits.log_softmax(0)
    sampled = logprobs.detach().exp()  # tokens are drawn from the policy; no gradient through the drawing
    forward = gradient((logprobs.exp() * (logprobs - reference)).sum(), logits)
    backward = gradient((reference.exp() * (reference - logprobs)).sum(), logits)
    torch.testing.assert_close(gradient((sampled * kl_k2(logprobs, reference)).sum(), logits), forward)
    torch.testing.assert_close(gradient((sampled * kl_k3(logprobs, reference)).sum(), logits), backward)


# -------------------------------------------------------------------------------------------------------------- masks


def test_rule_3_masks_come_from_lengths():
    padded, mask = pad_rows([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0, 2.0]), torch.tensor([5.0])])
    assert mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert padded.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 2.0], [5.0, 0.0, 0.0]]
