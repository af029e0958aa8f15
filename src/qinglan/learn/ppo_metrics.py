"""What `train_ppo` logs of scores, lengths, KL, advantages and values of a rollout."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

import torch
from jaxtyping import Float
from torch import Tensor

from qinglan.core.records import Scorer
from qinglan.learn.advantages import explained_variance, kl_k1, kl_k3, moments_of
from qinglan.learn.ppo_update import Targets
from qinglan.learn.rollout import Rollout
from qinglan.learn.scoring import ask_scorer

LARGE_KL = 10.0
"""A token whose log-ratio to the reference is larger, in nats, is counted; none is clamped."""


def score_metrics(
    gold: Scorer | None,
    score_range: tuple[float, float] | None,
    rollout: Rollout,
    scores: list[float],
    charged: list[float],
    where: str,
) -> dict[str, float]:
    """Return what is logged of scores, gold scores and how completions ended; here the gold scorer is asked."""
    known = moments_of(torch.tensor(scores))
    metrics = {"score": known.mean, "score_std": known.std, "score_error": error_of_mean(rollout, scores)}
    metrics["charged_score"] = fmean(charged)
    if score_range is not None:
        low, high = score_range
        metrics["score_outside_range"] = fmean([float(not low <= score <= high) for score in scores])
    if gold is not None:
        what = f"{where}: the gold scorer"
        answers = ask_scorer(gold, rollout.prompts, rollout.completions, what=what, allow_unscored=True)
        golds = torch.tensor(answers)
        measured = moments_of(golds, ~golds.isnan())
        metrics["num_golds"] = measured.num_values
        if measured.num_values:
            error = error_of_mean(rollout, answers)
            metrics |= {"gold": measured.mean, "gold_std": measured.std, "gold_error": error}
    for reason in ("eos", "stop", "length"):
        metrics[f"finish_{reason}"] = rollout.finish_reasons.count(reason) / len(scores)
    return metrics


def error_of_mean(rollout: Rollout, values: Sequence[float]) -> float:
    """Return the standard error of a rollout's mean over prompts, whose samples are alike; NaN counts for nothing."""
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in zip(rollout.prompts, values, strict=True):
        if not math.isnan(value):
            by_prompt.setdefault(prompt.id, []).append(value)
    means = [fmean(found) for found in by_prompt.values()]
    return pstdev(means) / len(means) ** 0.5


def rollout_metrics(
    rollout: Rollout, reference_logprobs: Float[Tensor, "E T"], targets: Targets, kl_coef: float
) -> dict[str, float]:
    """Return what is logged of lengths, KL (nats per completion), advantages and values."""
    mask = rollout.completion_mask
    k1 = torch.where(mask, kl_k1(rollout.logprobs, reference_logprobs), 0.0)
    k3 = torch.where(mask, kl_k3(rollout.logprobs, reference_logprobs), 0.0)
    returns = moments_of(targets.returns, mask)
    return {
        "kl": float(k1.sum(dim=1).mean()),
        "kl_k3": float(k3.sum(dim=1).mean()),
        "kl_coef": kl_coef,
        "large_kl_share": float((k1.abs() > LARGE_KL).sum() / mask.sum()),
        "length": float(rollout.lengths.float().mean()),
        "length_max": float(rollout.lengths.max()),
        "return": returns.mean,
        "return_std": returns.std,
        "advantage_std": moments_of(targets.advantages, mask).std,
        "value": moments_of(targets.old_values, mask).mean,
        "explained_variance": explained_variance(targets.old_values, targets.returns, mask),
    }
