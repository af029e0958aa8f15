"""Intervals: a seeded, vectorised bootstrap over groups, and Wilson's interval for rates.

The unit that is drawn again is the group (user, prompt, document), because items of one group resemble each other.
All statistics here are functions of *how often each group was drawn*, so that 2,000 resamples are one matrix product.
Percentiles are widened for few groups (Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3:
a = Phi(-sqrt(G / (G - 1)) * t_{0.025, G-1})), without which ten groups cover about 90% instead of 95%.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, t

from qinglan.core.rng import numpy_stream

NUM_DRAWS = 2000
MAX_WEIGHTS = 4_000_000
"""Largest number of resampling weights held at once: 32 MB."""
CONFIDENCE = 0.95

Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps weights [B, G], how often each of G groups was drawn, to values [B] or [B, M]."""


Values = Sequence[float] | np.ndarray
"""One number for each item; NaN means "could not be scored"."""
Groups = Sequence[object] | None
"""The prompt group of each item; None makes each item its own group."""


class Interval(NamedTuple):
    """A 95% interval; both ends are None where there is too little to say."""

    low: float | None
    high: float | None


def scored_items(groups: Groups, *columns: Values) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Leave out items that are NaN in any column; return columns [n], group numbers [n] and the number of groups G."""
    arrays = [np.asarray(column, dtype=float) for column in columns]
    if len({len(array) for array in arrays}) != 1:
        raise ValueError(f"columns of one item each want equal lengths, got {[len(array) for array in arrays]}")
    kept = ~np.any([np.isnan(array) for array in arrays], axis=0)
    kept_groups = None if groups is None else [group for group, keep in zip(groups, kept, strict=True) if keep]
    index, num_groups = group_index(kept_groups, int(kept.sum()))
    return [array[kept] for array in arrays], index, num_groups


def group_index(groups: Groups, count: int) -> tuple[np.ndarray, int]:
    """Return the group number of each item [count] and the number of groups G; None makes each item its own group."""
    if groups is None:
        return np.arange(count), count
    if len(groups) != count:
        raise ValueError(f"got {len(groups)} groups for {count} items")
    numbers: dict[object, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    return index, len(numbers)


def sum_by_group(values: np.ndarray, index: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the sums of `values` [n] over each group, [G]."""
    return np.bincount(index, weights=values, minlength=num_groups)


def resample(statistic: Statistic, num_groups: int, seed: int, width: int = 0) -> np.ndarray:
    """Return `statistic` under 2,000 draws of G groups with replacement: [B] or [B, M].

    `width` is how many numbers the statistic holds for each draw, where that is more than G.
    """
    rng = numpy_stream(seed, "bootstrap", num_groups)
    chunk = max(1, min(NUM_DRAWS, MAX_WEIGHTS // max(num_groups, width)))
    results = []
    for start in range(0, NUM_DRAWS, chunk):
        size = min(chunk, NUM_DRAWS - start)
        drawn = rng.integers(num_groups, size=(size, num_groups)) + num_groups * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * num_groups).reshape(size, num_groups).astype(float)
        results.append(statistic(weights))
    return np.concatenate(results)


def percentile_interval(draws: np.ndarray, num_groups: int) -> Interval:
    """Return the widened percentile interval of bootstrap `draws` [B]; NaN draws (undefined) are passed over."""
    draws = draws[~np.isnan(draws)]
    if num_groups < 2 or len(draws) == 0:
        return Interval(None, None)
    tail = norm.cdf(math.sqrt(num_groups / (num_groups - 1)) * t.ppf((1 - CONFIDENCE) / 2, num_groups - 1))
    # "nearest" because ratios may be infinite, between which there is nothing to interpolate.
    low, high = np.quantile(draws, [tail, 1 - tail], method="nearest")
    return Interval(float(low), float(high))


def bootstrap_interval(statistic: Statistic, num_groups: int, seed: int, width: int = 0) -> Interval:
    """Return the 95% interval of a statistic with values [B]; without ends for fewer than two groups."""
    if num_groups < 2:
        return Interval(None, None)
    return percentile_interval(resample(statistic, num_groups, seed, width), num_groups)


def wilson_interval(rate: float, n: float, z: float = float(norm.ppf(0.5 + CONFIDENCE / 2))) -> Interval:
    """Return Wilson's score interval of a rate over `n` independent items (Wilson 1927); it stays inside [0, 1]."""
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return Interval(max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half)))


def rate_interval(values: np.ndarray, index: np.ndarray, num_groups: int) -> Interval:
    """Return the interval of a rate from values in {0, 1} [n] in G groups: Wilson's, with the effective n.

    Items of one group count for less than independent ones: n_eff = p (1 - p) / v, where v is the variance of p by
    linearisation over groups (Korn and Graubard 1998), never above n; Student's t with G - 1 degrees of freedom takes
    the place of the normal quantile. Where every item is alike, v says nothing and each group counts as one item.
    """
    n, rate = len(values), float(values.mean())
    if num_groups == n:
        return wilson_interval(rate, n)
    if num_groups == 1 or rate in (0.0, 1.0):
        return wilson_interval(rate, num_groups)
    residuals = sum_by_group(values - rate, index, num_groups)
    variance = num_groups / (num_groups - 1) * float((residuals**2).sum()) / n**2
    effective = n if variance == 0 else min(n, rate * (1 - rate) / variance)
    return wilson_interval(rate, effective, float(t.ppf(0.5 + CONFIDENCE / 2, num_groups - 1)))
