"""PPO's losses: hand-worked numbers, gradients, and properties."""

import math

import pytest
import torch

from qinglan.core.rng import stream
from qinglan.learn.policy_losses import clipped_surrogate, value_loss


def draw(n: int, key: str) -> torch.Tensor:
    return torch.randn(n, generator=stream(0, key), dtype=torch.float64)


def test_ratio_1_gives_minus_the_advantage_and_the_plain_policy_gradient():
    logprobs = draw(5, "l").requires_grad_()
    advantages = draw(5, "a")
    result = clipped_surrogate(logprobs, logprobs.detach(), advantages, 0.2)
    torch.testing.assert_close(result.loss.detach(), -advantages)
    torch.testing.assert_close(torch.autograd.grad(result.loss.sum(), logprobs)[0], -advantages)
    assert not result.is_clipped.any() and (result.ratio == 1).all() and not result.approx_kl.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "is_clipped"),
    [
        (1.5, 2.0, -2.4, 0.0, True),  # good and already likelier: kept at 1.2 * 2, no gradient
        (0.5, 2.0, -1.0, -1.0, False),  # good but less likely: pulled back, gradient -ratio * A
        (1.5, -2.0, 3.0, 3.0, False),  # bad and likelier: full gradient
        (0.5, -2.0, 1.6, 0.0, True),  # bad and already less likely: kept at 0.8 * 2
    ],
)
def test_the_four_corners_of_the_clip(ratio, advantage, loss, slope, is_clipped):
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    result = clipped_surrogate(logprobs, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]), 0.2)
    assert result.loss.item() == pytest.approx(loss)
    assert torch.autograd.grad(result.loss.sum(), logprobs)[0].item() == pytest.approx(slope)
    assert result.is_clipped.item() is is_clipped


def test_approx_kl_is_never_negative_and_exact_in_expectation():
    old, new = draw(4, "o").log_softmax(0), draw(4, "n").log_softmax(0)
    result = clipped_surrogate(new, old, torch.ones(4), 0.2)
    assert (result.approx_kl >= 0).all()
    torch.testing.assert_close((old.exp() * result.approx_kl).sum(), (old.exp() * (old - new)).sum())


def test_value_loss_has_the_half_and_its_gradient_is_the_error():
    values = torch.tensor([1.0, 4.0], requires_grad=True)
    result = value_loss(values, values.detach(), torch.tensor([3.0, 3.0]))
    assert result.loss.tolist() == [2.0, 0.5]
    assert torch.autograd.grad(result.loss.sum(), values)[0].tolist() == [-2.0, 1.0]
    assert not result.is_clipped.any()


def test_rule_19_value_clip_takes_the_larger_loss_and_counts_it():
    # old value 0, clip 0.2; V = 1 is read as 0.2 in the bounded branch
    values, old = torch.tensor([1.0, 1.0, 0.1], requires_grad=True), torch.zeros(3)
    returns = torch.tensor([2.0, 0.5, 2.0])
    result = value_loss(values, old, returns, clip=0.2)
    # max((1-2)^2, (0.2-2)^2)/2 = 1.62 clipped; max(0.25, 0.09)/2 = 0.125 not; (0.1-2)^2/2 = 1.805 inside the clip
    assert result.loss.tolist() == pytest.approx([1.62, 0.125, 1.805])
    assert result.is_clipped.tolist() == [True, False, False]
    assert torch.autograd.grad(result.loss.sum(), values)[0].tolist() == pytest.approx([0.0, 0.5, -1.9])
