"""What is measured, each value with its 95% interval and the number of items it stands on.

Sources: win rates and agreement, InstructGPT section 4 and Stiennon et al. 2020; calibration, Guo et al. 2017;
performance gap recovered, Burns et al. 2023. Win rates at equal lengths are in `length_control.py`.

Throughout, `groups` names the prompt group (user, question) of each item and is what the bootstrap draws again. NaN
means "could not be scored": such items are left out and do not count in `n`.
"""

import math
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import expit

from qinglan.core.records import Comparison, ComparisonGroup, pairs_of
from qinglan.core.run import Measure
from qinglan.evals.intervals import (
    Groups,
    Values,
    bootstrap_interval,
    percentile_interval,
    rate_interval,
    resample,
    scored_items,
    sum_by_group,
    wilson_interval,
)
from qinglan.supervisors.agreement import count_agreement

NOT_MEASURED = Measure(None, None, None, 0)
GAP_EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, math.inf)
"""Buckets of the score gap, in logits."""


def mean_with_interval(values: Values, groups: Groups = None, *, seed: int, unit: str = "") -> Measure:
    """Return the mean of `values` [n] with its interval.

    Values in {0, 1} are a rate and get Wilson's interval (with the effective number of items where there are groups).
    Others get the bootstrap over groups; where all of them lie in {0, 0.5, 1} and are the same, Wilson's over groups,
    so that five wins of five are not certainty. One group of other values has no interval.
    """
    (kept_values,), index, num_groups = scored_items(groups, values)
    n = len(kept_values)
    if n == 0:
        return NOT_MEASURED._replace(unit=unit)
    value = float(kept_values.mean())
    if np.isin(kept_values, (0.0, 1.0)).all():
        interval = rate_interval(kept_values, index, num_groups)
    elif (kept_values == 0.5).all():
        interval = wilson_interval(0.5, num_groups)
    else:
        sums, counts = (sum_by_group(x, index, num_groups) for x in (kept_values, np.ones(n)))
        interval = bootstrap_interval(lambda w: (w @ sums) / (w @ counts), num_groups, seed)
    return Measure(value, *interval, n, unit)


def mean_difference(first: Values, second: Values, groups: Groups = None, *, seed: int, unit: str = "") -> Measure:
    """Return the mean of `first` minus `second`, paired item by item, with the bootstrap over groups."""
    (a, b), index, num_groups = scored_items(groups, first, second)
    if len(a) == 0:
        return NOT_MEASURED._replace(unit=unit)
    sums, counts = sum_by_group(a - b, index, num_groups), sum_by_group(np.ones(len(a)), index, num_groups)
    interval = bootstrap_interval(lambda w: (w @ sums) / (w @ counts), num_groups, seed)
    return Measure(float((a - b).mean()), *interval, len(a), unit)


def win_rate(preferences: Values, groups: Groups = None, *, seed: int) -> Measure:
    """Return the share of prompts won by the first side; `preferences` are in [0, 1] and a tie is 0.5."""
    return mean_with_interval(preferences, groups, seed=seed, unit="win rate")


class PairTable(NamedTuple):
    """Every pair that labels decide, one entry each; a gap is the preferred item's score minus the other's."""

    gaps: np.ndarray
    prompt_groups: Sequence[str]
    sources: Sequence[str]
    labeler_groups: Sequence[str]


def scored_pairs(groups: Sequence[ComparisonGroup], scores: Sequence[Sequence[float]]) -> PairTable:
    """Return the decided pairs of `groups`; `scores[i][k]` is the score of `groups[i].completions[k]`, in logits.

    Undecided pairs (ties, probability 0.5) are left out; a soft label counts by its more probable side.
    """
    gaps, prompt_groups, sources, labeler_groups = [], [], [], []
    for group, values in zip(groups, scores, strict=True):
        for pair in pairs_of(group.comparison.label):
            if pair.p_first_better != 0.5:
                gap = values[pair.first] - values[pair.second]
                gaps.append(gap if pair.p_first_better > 0.5 else -gap)
                prompt_groups.append(group.prompt.prompt_group_id)
                sources.append(group.comparison.source)
                labeler_groups.append(group.comparison.labeler_group or "none")
    return PairTable(np.array(gaps, dtype=float), prompt_groups, sources, labeler_groups)


def pair_accuracy(table: PairTable, *, seed: int) -> Measure:
    """Return the share of decided pairs in which the preferred item has the higher score; equal scores count half."""
    return mean_with_interval(_correct(table.gaps), table.prompt_groups, seed=seed, unit="accuracy")


def pair_accuracy_by(
    table: PairTable, key: Literal["source", "labeler_group", "score_gap"], *, seed: int
) -> dict[str, Measure]:
    """Return the pair accuracy for each source, labeler group, or bucket of the absolute score gap (`GAP_EDGES`)."""
    keys: Sequence[str]
    if key == "score_gap":
        names = [f"{low:g} to {high:g}" for low, high in pairwise(GAP_EDGES)]
        # NaN sorts behind the last edge and gets the name that is not asked for.
        bucket = np.searchsorted(GAP_EDGES, np.abs(table.gaps), side="right") - 1
        keys = [[*names, "unscored"][b] for b in bucket]
    else:
        keys = table.sources if key == "source" else table.labeler_groups
        names = sorted(set(keys))
    correct = _correct(table.gaps)
    found = {}
    for name in names:
        chosen = [i for i, k in enumerate(keys) if k == name]
        if chosen:
            groups = [table.prompt_groups[i] for i in chosen]
            found[name] = mean_with_interval(correct[chosen], groups, seed=seed, unit="accuracy")
    return found


class Bin(NamedTuple):
    """One bin of a reliability plot: predictions in [low, high), their mean, and how often they came true."""

    low: float
    high: float
    mean_predicted: float
    observed: Measure


class Calibration(NamedTuple):
    """Reliability of probabilities. Both errors are 0 when perfect; a sample's ECE is above 0 even then."""

    bins: tuple[Bin, ...]
    expected_error: Measure
    """ECE: mean over items of |observed - predicted| of their bin."""
    brier: Measure
    """Mean squared difference of probability and outcome."""


def calibration(
    probabilities: Values,
    outcomes: Values,
    groups: Groups = None,
    *,
    seed: int,
    num_bins: int = 10,
    lowest: float = 0.0,
) -> Calibration:
    """Return reliability bins of equal width over [lowest, 1], ECE and Brier score (Guo et al. 2017).

    The bootstrap adds noise to each bin and so pushes the ECE up; its interval is shifted back by that amount.
    """
    (p, y), index, num_groups = scored_items(groups, probabilities, outcomes)
    if len(p) == 0:
        return Calibration((), NOT_MEASURED, NOT_MEASURED)
    edges = np.linspace(lowest, 1.0, num_bins + 1)
    which = np.clip(np.searchsorted(edges, p, side="right") - 1, 0, num_bins - 1)
    bins = []
    for b in np.unique(which):
        chosen = which == b
        observed = mean_with_interval(y[chosen], index[chosen].tolist(), seed=seed)
        bins.append(Bin(float(edges[b]), float(edges[b + 1]), float(p[chosen].mean()), observed))
    in_bin = np.eye(num_bins)[which]  # [n, bins]
    signed = np.stack([sum_by_group(column * (y - p), index, num_groups) for column in in_bin.T], axis=1)
    counts = sum_by_group(np.ones(len(p)), index, num_groups)

    def expected_error(weights: np.ndarray) -> np.ndarray:
        # sum over bins of (n_b / n) |observed_b - predicted_b| = sum over bins of |sum of (y - p)| / n
        return np.abs(weights @ signed).sum(axis=1) / (weights @ counts)

    value = float(expected_error(np.ones((1, num_groups)))[0])
    low = high = None
    if num_groups > 1:
        draws = resample(expected_error, num_groups, seed)
        low, high = percentile_interval(np.maximum(0.0, draws - (draws.mean() - value)), num_groups)
    brier = mean_with_interval((y - p) ** 2, index.tolist(), seed=seed, unit="squared probability")
    return Calibration(tuple(bins), Measure(value, low, high, len(p), "probability"), brier)


def pair_calibration(table: PairTable, *, seed: int, num_bins: int = 10) -> Calibration:
    """Return the calibration of sigmoid(score gap) over [0.5, 1]: the probability of the side that the scores prefer.

    Looking from the scores' side, and not from the label's, keeps the label out of the prediction.
    """
    outcomes = _correct(table.gaps)
    return calibration(
        expit(np.abs(table.gaps)), outcomes, table.prompt_groups, seed=seed, num_bins=num_bins, lowest=0.5
    )


def labeler_agreement(comparisons: Sequence[Comparison], *, seed: int) -> Measure:
    """Return how often two labelers order a pair alike, over pairs that both decide (InstructGPT: 72.6 +/- 1.5%).

    Comparisons of one prompt by different labelers are matched by the items' ids; the bootstrap draws prompt groups.
    """
    by_prompt: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_prompt.setdefault(comparison.prompt_id, []).append(comparison)
    outcomes: list[float] = []
    groups: list[str] = []
    for same_prompt in by_prompt.values():
        for first, second in combinations(same_prompt, 2):
            if first.producer_id != second.producer_id:
                counted = count_agreement(first, second)
                outcomes += [1.0] * counted.num_agreeing + [0.0] * (counted.num_decided - counted.num_agreeing)
                groups += [first.prompt_group_id] * counted.num_decided
    return mean_with_interval(outcomes, groups, seed=seed, unit="agreement")


class Attainable(NamedTuple):
    """Bounds of the accuracy of a perfect predictor of the majority, tested on the pairs of single labelers."""

    at_least: Measure
    at_most: Measure


def attainable_accuracy(agreement: Measure) -> Attainable:
    """Return what the best reward model could score, given how often two labelers agree.

    If a random labeler sides with the majority with probability c on a pair, two agree with c^2 + (1 - c)^2. Let
    x = 2c - 1, in [0, 1]; then agreement = (1 + E[x^2]) / 2 and the best accuracy is E[c] = (1 + E[x]) / 2. As
    E[x^2] <= E[x] <= sqrt(E[x^2]), it lies between the agreement itself (some pairs obvious, the others coin flips) and
    (1 + sqrt(2 * agreement - 1)) / 2 (all pairs equally hard). Agreement 0.726 gives 0.726 to 0.836.
    """
    if agreement.value is None:
        return Attainable(agreement, agreement)
    value, low, high = (
        None if end is None else (1 + math.sqrt(max(0.0, 2 * end - 1))) / 2
        for end in (agreement.value, agreement.low, agreement.high)
    )
    return Attainable(agreement._replace(unit="accuracy"), Measure(value, low, high, agreement.n, "accuracy"))


def roc_auc(scores: Values, labels: Values, groups: Groups = None, *, seed: int) -> Measure:
    """Return the chance that a random positive (label 1) scores above a random negative, equal scores counting half.

    Perfect separation leaves the bootstrap nothing to vary; the interval is then Wilson's over the rarer kind.
    """
    (s, y), index, num_groups = scored_items(groups, scores, labels)
    num_positive = int(y.sum())
    if num_positive in (0, len(y)):
        return Measure(None, None, None, len(y), "AUC")
    order = np.argsort(s, kind="stable")
    y, index = y[order], index[order]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(s[order]) > 0]))  # first item of each distinct score

    def area(weights: np.ndarray) -> np.ndarray:
        item_weights = weights[:, index]
        positive = np.add.reduceat(item_weights * y, starts, axis=1)
        negative = np.add.reduceat(item_weights * (1 - y), starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without positives or negatives: NaN
            return (positive * (below + negative / 2)).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))

    value = float(area(np.ones((1, num_groups)))[0])
    if value in (0.0, 1.0):
        interval = wilson_interval(value, min(num_positive, len(y) - num_positive, num_groups))
    else:
        interval = bootstrap_interval(area, num_groups, seed, width=4 * len(y))
    return Measure(value, *interval, len(y), "AUC")


def performance_gap_recovered(
    floor: Values, student: Values, ceiling: Values, groups: Groups = None, *, seed: int, min_gap: float = 0.0
) -> Measure:
    """Return (student - floor) / (ceiling - floor) of the means over the same items (Burns et al. 2023, section 3).

    Value None, unit "gap too small to measure", where the gap's 95% interval does not lie above `min_gap`: the ratio
    would be noise.
    """
    (low, middle, top), index, num_groups = scored_items(groups, floor, student, ceiling)
    gap = mean_difference(top, low, index.tolist(), seed=seed)
    if gap.low is None or gap.low <= min_gap:
        return Measure(None, None, None, len(low), "gap too small to measure")
    gained, possible = (sum_by_group(x - low, index, num_groups) for x in (middle, top))

    def ratio(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (weights @ gained) / (weights @ possible)

    value = float(gained.sum() / possible.sum())
    return Measure(value, *bootstrap_interval(ratio, num_groups, seed), len(low), "performance gap recovered")


def _correct(gaps: np.ndarray) -> np.ndarray:
    """Return 1 where the gap is above 0, 0.5 where it is 0, 0 below, NaN where it is NaN."""
    return (np.sign(gaps) + 1) / 2
