"""The losses of PPO, per token: clipped surrogate and value loss (Schulman et al. 2017).

Every function returns one number a token and leaves the mean to the caller, who divides the sum by the number of tokens
of the whole optimizer batch: the gradient then does not depend on how that batch was cut into micro-batches.

The entropy of the same tempered distribution comes with the log-probabilities, from `target_logprobs`.

Legend: N sampled tokens of a flat batch.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class PolicyLoss(NamedTuple):
    """The clipped surrogate with what a log wants; only `loss` carries a gradient."""

    loss: Float[Tensor, " N"]
    ratio: Float[Tensor, " N"]
    is_clipped: Bool[Tensor, " N"]
    approx_kl: Float[Tensor, " N"]
    """k3 of the old policy against the new one, in nats per token."""


class ValueLoss(NamedTuple):
    """The value loss; only `loss` carries a gradient."""

    loss: Float[Tensor, " N"]
    is_clipped: Bool[Tensor, " N"]


def clipped_surrogate(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip: float,
) -> PolicyLoss:
    """Return -min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A) per token (PPO, eq. 7).

    Both log-probabilities are in fp32 and of the same tempered distribution.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()  # r(theta) = pi(a|s) / pi_old(a|s)
    plain = ratio * advantages
    bounded = ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    with torch.no_grad():
        approx_kl = torch.expm1(log_ratio) - log_ratio
    return PolicyLoss(-torch.minimum(plain, bounded), ratio.detach(), (bounded < plain).detach(), approx_kl)


def value_loss(
    values: Float[Tensor, " N"],
    old_values: Float[Tensor, " N"],
    returns: Float[Tensor, " N"],
    clip: float | None = None,
) -> ValueLoss:
    """Return (V - R)^2 / 2 per token.

    With `clip`, the larger of that and the loss of V kept within `clip` of the old value. `clip` is in the units of the
    returns: a fixed 0.2 stalls the value model where returns are larger, so the caller scales it by their deviation.
    """
    plain = (values - returns).square()
    if clip is None:
        return ValueLoss(plain / 2, torch.zeros_like(values, dtype=torch.bool))
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return ValueLoss(torch.maximum(plain, bounded) / 2, (bounded > plain).detach())
