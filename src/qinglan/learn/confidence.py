"""Targets of weak-to-strong learning: pure functions, the equation beside the line (Burns et al. 2023, section 4.3).

Letters: n cases of an optimizer batch, m predictions in the buffer. z is the student's logit of class 1, q the weak
label in [0, 1]. The loss is always the cross-entropy of sigmoid(z) against a target; the methods differ in the target:

naive        q
confidence   (1 - a) q + a h,   h = 1[z > t], with no gradient through h
product      proportional to p^beta q^alpha, normalised, with no gradient through p (released code only)
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Ramp = Literal["linear", "jump"]


def confidence_weight(step: int, num_steps: int, largest: float, ramp_fraction: float, ramp: Ramp) -> float:
    """Return a at update `step` (from 0) of `num_steps`.

    "linear": from 0 to `largest` over the first `ramp_fraction` of training, then constant (the paper).
    "jump": `largest` times the share of training done, until `ramp_fraction` of it, then `largest` at once: what the
    released code does, which its pull request 33 calls unintended.
    """
    done = step / num_steps
    if done >= ramp_fraction if ramp == "linear" else done > ramp_fraction:
        return largest
    return largest * (done / ramp_fraction if ramp == "linear" else done)


def balanced_threshold(logits: Float[Tensor, "m"], share: float) -> float:
    """Return t such that a share `share` of the logits, to within 1/m, lies above it.

    It stands half-way between two neighbours, so that none of them is on the edge.
    """
    ordered = logits.double().sort(descending=True).values
    count = round(share * len(ordered))
    if count == 0:
        return float("inf")
    if count == len(ordered):
        return float("-inf")
    return float((ordered[count - 1] + ordered[count]) / 2)


def confidence_targets(
    weak: Float[Tensor, "n"], logits: Float[Tensor, "n"], threshold: float, weight: float
) -> Float[Tensor, "n"]:
    """Return (1 - a) q + a 1[z > t]; no gradient flows into it. With a = 0 it is q, bit for bit."""
    hardened = (logits.detach() > threshold).to(weak)
    return (1.0 - weight) * weak + weight * hardened


def product_targets(weak: Float[Tensor, "n"], logits: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return p q / (p q + (1 - p)(1 - q)) = sigmoid(z + logit(q)); no gradient flows into it."""
    return torch.sigmoid(logits.detach() + torch.logit(weak))
