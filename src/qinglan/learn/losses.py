"""Losses of supervised fine-tuning, of the reward model and of DPO: pure functions, the equation beside the line.

Letters: N targets of a batch, P pairs, S scored completions, G prompts (groups).

One loss serves every source of preferences: for a pair (i, j) of one prompt with target p = P(i is better),
s = r_i - r_j, loss = -[p log sigmoid(s) + (1 - p) log sigmoid(-s)]. With p in {0, 1} this is InstructGPT's equation 1;
with soft p it takes the labels of a feedback model or a weak model as they are. PPO's losses: `policy_losses.py`.
"""

from typing import Literal, NamedTuple

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
    margins: Float[Tensor, ""]
    """Sum over the decided pairs of the margin towards the better item, in logits."""


def group_ranking_loss(scores: Float[Tensor, "S"], pairs: PairTargets) -> GroupLoss:
    """Return the reward model's loss over all pairs of the prompts in a batch, from one score per completion.

    L = 1/G * sum over groups g of w_g / |pairs_g| * sum over pairs of pairwise_loss(r_i - r_j, p)

    InstructGPT, equation 1. The divisor counts the pairs that stand in `pairs`: ties that were dropped do not count
    (the paper leaves this open). Adding a constant to all scores changes nothing.
    """
    margins = scores[pairs.first] - scores[pairs.second]
    loss = (pairs.weights * pairwise_loss(margins, pairs.p_first_better)).sum()
    return _group_loss(loss, margins, pairs)


def _group_loss(loss: Float[Tensor, ""], margins: Float[Tensor, "P"], pairs: PairTargets) -> GroupLoss:
    """Return the loss with the number of decided pairs whose margin points to the better item."""
    with torch.no_grad():
        decided = pairs.p_first_better != 0.5
        towards = torch.where(pairs.p_first_better > 0.5, margins, -margins)[decided]
        num_correct = (towards > 0).sum() + 0.5 * (towards == 0).sum()
    return GroupLoss(loss, num_correct, int(decided.sum()), towards.sum())


# Losses of a policy on comparisons. h = log pi(y)/pi_ref(y) - log pi(y')/pi_ref(y') is the pair's gap, in nats.


def dpo_loss(
    gaps: Float[Tensor, "P"], p_first_better: Float[Tensor, "P"], beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, "P"]:
    """Return DPO's loss of each pair, in nats.

    -[p log sigmoid(beta h) + (1 - p) log sigmoid(-beta h)]                  (Rafailov et al. 2023, equation 7: p = 1)
    With label smoothing e, a share e of the labels is taken to be swapped: p becomes (1 - e) p + e (1 - p), so that
    p = 1 gives -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)        (Mitchell 2023, conservative DPO)
    """
    p = (1.0 - label_smoothing) * p_first_better + label_smoothing * (1.0 - p_first_better)
    return pairwise_loss(beta * gaps, p)


def ipo_loss(gaps: Float[Tensor, "P"], p_first_better: Float[Tensor, "P"], tau: float) -> Float[Tensor, "P"]:
    """Return IPO's loss of each pair, in squared nats.

    (h - (2 p - 1) / (2 tau))^2                                              (Azar et al. 2024, equation 17: p = 1)
    A soft p is the mean of the paper's loss over labels drawn with that probability, up to a constant.
    """
    return (gaps - (2.0 * p_first_better - 1.0) / (2.0 * tau)).square()


def group_policy_loss(
    logratios: Float[Tensor, "S"],
    pairs: PairTargets,
    *,
    kind: Literal["dpo", "ipo"],
    beta: float,
    label_smoothing: float = 0.0,
) -> GroupLoss:
    """Return DPO's or IPO's loss over all pairs of the prompts in a batch, weighted as in `group_ranking_loss`.

    `logratios` are log pi(y) - log pi_ref(y) of whole completions, in nats. beta times it is the score of the reward
    model that the policy is secretly, so that with "dpo" this is `group_ranking_loss` of those scores.
    """
    gaps = logratios[pairs.first] - logratios[pairs.second]
    if kind == "dpo":
        losses = dpo_loss(gaps, pairs.p_first_better, beta, label_smoothing)
    else:
        losses = ipo_loss(gaps, pairs.p_first_better, beta)
    return _group_loss((pairs.weights * losses).sum(), beta * gaps, pairs)
