"""Win rates at equal lengths, beside the raw ones: longer completions please judges, and policies learn it.

Two answers to the same question: a regression in the spirit of AlpacaEval-LC (Dubois et al. 2024), and matching within
buckets of length difference (as Stiennon et al. 2020 ask for), which assumes less, uses fewer prompts, and leaves a
little of the length effect inside the widest bucket (a planted 0.50 with a raw rate of 0.73 came out as 0.51).

Departures from AlpacaEval-LC: no terms for each prompt's difficulty or each model, as there is one pair of models and
few prompts; preferences may be soft (the mean over judges and orders); differences are scaled by their root mean square
and not by their standard deviation, so that a constant difference does not saturate the tanh.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import expit

from qinglan.core.run import Measure
from qinglan.evals.intervals import Groups, Values, bootstrap_interval, scored_items, sum_by_group
from qinglan.evals.metrics import win_rate

MAX_STEPS = 25
"""Newton steps of the fit; it converges in five to ten, and in fewer from the full data's fit."""
NUM_BUCKETS = 5
PRIOR_SD = (10.0, 3.0)
"""Standard deviations of the normal priors on intercept and slope: they keep separable data finite."""


class _Pairs(NamedTuple):
    """The judged prompts: preferences y [n], scaled length differences x [n], group numbers [n], number of groups."""

    y: np.ndarray
    x: np.ndarray
    group_index: np.ndarray
    num_groups: int


def length_controlled_win_rate(
    preferences: Values, first_lengths: Values, second_lengths: Values, groups: Groups = None, *, seed: int
) -> Measure:
    """Return the win rate that the first side would have at equal lengths.

    Logistic regression of the preference (in [0, 1], soft allowed) on the length difference:
        P(first wins) = sigmoid(a + b * tanh(x)),   x = (l_first - l_second) / root mean square of the differences,
    by Newton's method with weak normal priors (`PRIOR_SD`). The value is sigmoid(a). Where all preferences are alike or
    all lengths equal, length explains nothing and the raw win rate is returned. Where the difference is the same
    everywhere, the two sides cannot be told from their lengths: value None.
    """
    pairs = _scaled(preferences, first_lengths, second_lengths, groups)
    if len(pairs.y) == 0 or (pairs.y == pairs.y[0]).all() or not pairs.x.any():
        return win_rate(pairs.y, pairs.group_index.tolist(), seed=seed)
    if (pairs.x == pairs.x[0]).all():
        return Measure(None, None, None, len(pairs.y), "all lengths differ alike")
    full = _fit(np.ones((1, pairs.num_groups)), pairs, np.zeros(2))[0]

    def at_equal_lengths(weights: np.ndarray) -> np.ndarray:
        return expit(_fit(weights, pairs, full)[:, 0])

    interval = bootstrap_interval(at_equal_lengths, pairs.num_groups, seed, width=4 * len(pairs.y))
    return Measure(float(expit(full[0])), *interval, len(pairs.y), "win rate")


def _fit(weights: np.ndarray, pairs: _Pairs, start: np.ndarray) -> np.ndarray:
    """Return (a, b) [B, 2] for each row of group weights [B, G]."""
    features = np.stack([np.ones(len(pairs.x)), np.tanh(pairs.x)], axis=1)  # [n, 2]
    products = (features[:, :, None] * features[:, None, :]).reshape(-1, 4)
    precision = 1 / np.square(PRIOR_SD)
    item_weights = weights[:, pairs.group_index]  # [B, n]
    coef = np.tile(start, (len(weights), 1))
    for _ in range(MAX_STEPS):
        p = expit(coef @ features.T)
        gradient = (item_weights * (pairs.y - p)) @ features - precision * coef
        hessian = ((item_weights * p * (1 - p)) @ products).reshape(-1, 2, 2) + np.diag(precision)
        # Steps are bounded because a full Newton step overshoots where p is near 0 or 1.
        step = np.clip(np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0], -2.0, 2.0)
        coef = coef + step
        if np.abs(step).max() < 1e-4:
            break  # Newton converges quadratically: what is left is about 1e-8
    return coef


def length_matched_win_rate(
    preferences: Values, first_lengths: Values, second_lengths: Values, groups: Groups = None, *, seed: int
) -> Measure:
    """Return the win rate when being longer and being shorter weigh the same.

    Prompts are put into five buckets by the size of the length difference. A bucket's win rate is the mean of two: over
    prompts where the first side is longer, and where it is shorter; prompts of equal lengths are a bucket of their own.
    A bucket with m longer and n shorter prompts weighs 4 m n / (m + n) (Mantel and Haenszel 1959): their number if the
    sides are even, little if one is rare. Buckets with one side only have no match and are left out of n; value None
    where no bucket has both.
    """
    pairs = _scaled(preferences, first_lengths, second_lengths, groups)
    size = np.abs(pairs.x)
    bucket = np.zeros(len(size), dtype=np.int64)  # bucket 0: equal lengths
    if (size > 0).any():
        edges = np.quantile(size[size > 0], np.arange(1, NUM_BUCKETS) / NUM_BUCKETS)
        bucket = np.where(size == 0, 0, 1 + np.searchsorted(edges, size))
    is_longer = (pairs.x > 0) | (bucket == 0)
    is_shorter = (pairs.x < 0) | (bucket == 0)  # equal lengths stand on both sides: their mean is the plain win rate
    wins, counts = [], []
    for b in range(NUM_BUCKETS + 1):
        for side in (is_longer, is_shorter):
            inside = ((bucket == b) & side).astype(float)
            wins.append(sum_by_group(inside * pairs.y, pairs.group_index, pairs.num_groups))
            counts.append(sum_by_group(inside, pairs.group_index, pairs.num_groups))
    won_by_group, count_by_group = np.stack(wins, axis=1), np.stack(counts, axis=1)  # [G, 2 * buckets]

    def matched(weights: np.ndarray) -> np.ndarray:
        won = (weights @ won_by_group).reshape(len(weights), -1, 2)
        total = (weights @ count_by_group).reshape(len(weights), -1, 2)
        mass = 4 * total.prod(axis=2) / np.maximum(total.sum(axis=2), 1.0)
        mass[:, 0] /= 2  # stood on both sides
        rates = (won / np.maximum(total, 1.0)).mean(axis=2)
        with np.errstate(invalid="ignore"):  # a resample without any match is undefined: NaN
            return (rates * mass).sum(axis=1) / mass.sum(axis=1)

    has_both = np.array(
        [is_longer[bucket == b].any() and is_shorter[bucket == b].any() for b in range(NUM_BUCKETS + 1)]
    )
    n = int(has_both[bucket].sum())
    if n == 0:
        return Measure(None, None, None, 0, "no lengths match")
    kept = pairs.y[has_both[bucket]]
    if (kept == kept[0]).all():
        return win_rate(kept, pairs.group_index[has_both[bucket]].tolist(), seed=seed)
    value = float(matched(np.ones((1, pairs.num_groups)))[0])
    return Measure(value, *bootstrap_interval(matched, pairs.num_groups, seed), n, "win rate")


def _scaled(preferences: Values, first_lengths: Values, second_lengths: Values, groups: Groups) -> _Pairs:
    (y, first, second), index, num_groups = scored_items(groups, preferences, first_lengths, second_lengths)
    difference = first - second
    # Not centred: zero must stay "equally long".
    scale = np.sqrt((difference**2).mean()) if len(difference) else 0.0
    return _Pairs(y, difference / scale if scale > 0 else difference, index, num_groups)
