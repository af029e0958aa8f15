"""Losses of supervised fine-tuning and of the reward model: pure functions, the equation beside the line.

Letters: N targets of a batch, P pairs, S scored completions, G prompts (groups).

One loss serves every source of preferences: for a pair (i, j) of one prompt with target p = P(i is better),
s = r_i - r_j, loss = -[p log sigmoid(s) + (1 - p) log sigmoid(-s)]. With p in {0, 1} this is InstructGPT's equation 1;
with soft p it takes the labels of a feedback model or a weak model as they are. PPO's losses: `policy_losses.py`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid


def cross_entropy(logprobs: Float[Tensor, "N"], weights: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """Return -sum(weights * logprobs), in nats.

    With weight 1 / (targets of the whole optimizer batch) on each target, the losses of the micro-batches add up to the
    token mean of the batch, however it was cut.
    """
    return -(weights * logprobs).sum()


def pairwise_loss(margins: Float[Tensor, "P"], p_first_better: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Return the loss of each pair, in nats; `margins` are score(first) - score(second), in logits.

    -[p log sigmoid(s) + (1 - p) log sigmoid(-s)]                                        (InstructGPT, equation 1)
    """
    return -(p_first_better * logsigmoid(margins) + (1.0 - p_first_better) * logsigmoid(-margins))


class PairTargets(NamedTuple):
    """The counted pairs of a batch of groups. Indices point into the batch's scores, S of them."""

    first: Int[Tensor, "P"]
    second: Int[Tensor, "P"]
    p_first_better: Float[Tensor, "P"]
    weights: Float[Tensor, "P"]
    """Weight of the pair in the batch's loss: group weight / pairs of its group / groups of the optimizer batch."""


class GroupLoss(NamedTuple):
    """The loss with what is logged beside it."""

    loss: Float[Tensor, ""]
    num_correct: Float[Tensor, ""]
    """Decided pairs (p other than one half) whose better item scores higher; equal scores count one half."""
    num_decided: int


def group_ranking_loss(scores: Float[Tensor, "S"], pairs: PairTargets) -> GroupLoss:
    """Return the reward model's loss over all pairs of the prompts in a batch, from one score per completion.

    L = 1/G * sum over groups g of w_g / |pairs_g| * sum over pairs of pairwise_loss(r_i - r_j, p)

    InstructGPT, equation 1. The divisor counts the pairs that stand in `pairs`: ties that were dropped do not count
    (the paper leaves this open). Adding a constant to all scores changes nothing.
    """
    margins = scores[pairs.first] - scores[pairs.second]
    loss = (pairs.weights * pairwise_loss(margins, pairs.p_first_better)).sum()
    with torch.no_grad():
        decided = pairs.p_first_better != 0.5
        towards = torch.where(pairs.p_first_better > 0.5, margins, -margins)[decided]
        num_correct = (towards > 0).sum() + 0.5 * (towards == 0).sum()
    return GroupLoss(loss, num_correct, int(decided.sum()))
