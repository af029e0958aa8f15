"""Intervals over items and seeds at once: ratios of sums over a table of seeds by groups of items.

The same test items are answered by the models of every fine-tuning seed, so a number varies in two ways: other items,
other seeds. A table [S, G] holds, for seed s, the sum over the items of group g (entity, passage, document). Both are
drawn again, independently ("pigeonhole" bootstrap, Owen 2007), all tasks at once for pooled ratios.

Two corrections, because five seeds are few and the plain bootstrap counts what is special to one seed and one item
three times: the spread is scaled to the unbiased two-way estimate, and the quantiles are Student's with Satterthwaite's
degrees of freedom. With z the linearised ratio and MS_s, MS_g, MS_e the mean squares of rows, columns and rest,

    var(mean z) = (MS_s + MS_g - MS_e) / (S G),    df = (MS_s + MS_g - MS_e)^2 / sum over the three of MS^2 / df

(one seed: the items' variance alone; a kind of spread that is not above the rest is put at the rest).
`tests/evals/test_recovery.py` simulates the coverage.
Letters: S seeds, G groups, K tables (tasks), B draws.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, t

from qinglan.core.rng import numpy_stream
from qinglan.evals.intervals import CONFIDENCE, NUM_DRAWS, Interval, group_index


class Table(NamedTuple):
    """Numerator and denominator of a ratio, each [S, G]: sums over the items of a group for one seed."""

    numerator: np.ndarray
    denominator: np.ndarray


def table_of(numerator: np.ndarray, denominator: np.ndarray, groups: Sequence[Hashable] | None = None) -> Table:
    """Return the table of values [S, N] of N items, summed over their groups; None makes each item a group."""
    index, num_groups = group_index(groups, numerator.shape[1])
    belongs = np.zeros((numerator.shape[1], num_groups))
    belongs[np.arange(len(index)), index] = 1.0
    return Table(numerator @ belongs, denominator @ belongs)


def ratio_of_sums(tables: Sequence[Table]) -> float:
    """Return sum of numerators / sum of denominators over all tables; NaN where nothing is below."""
    top, bottom = sum(float(one.numerator.sum()) for one in tables), sum(float(one.denominator.sum()) for one in tables)
    return top / bottom if bottom else math.nan


def crossed_interval(tables: Sequence[Table], seed: int) -> Interval:
    """Return the 95% interval of `ratio_of_sums`; without ends where a table has fewer than two groups."""
    value = ratio_of_sums(tables)
    if not math.isfinite(value) or any(one.numerator.shape[1] < 2 for one in tables):
        return Interval(None, None)
    bottom = sum(one.denominator.sum() for one in tables)
    residuals = [one.numerator - value * one.denominator for one in tables]
    variance, freedom = two_way_variance(residuals)
    if variance == 0.0:
        return Interval(value, value)
    ratios, linear = _draws(tables, residuals, seed)
    # The level at which the linearised bootstrap would give Student's interval of the unbiased variance.
    tail = norm.cdf(t.ppf((1 - CONFIDENCE) / 2, freedom) * math.sqrt(variance) / max(float(linear.std()), 1e-300))
    ratios = ratios[np.isfinite(ratios)]
    if tail * len(ratios) >= 5:
        low, high = np.quantile(ratios, [tail, 1 - tail])
        return Interval(float(low), float(high))
    half = float(t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(variance) / abs(float(bottom))
    return Interval(value - half, value + half)  # further out than the draws reach


def two_way_variance(residuals: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the variance of the sum of all residuals, each [S, G], and its degrees of freedom."""
    variance, below = 0.0, 0.0
    for z in residuals:
        num_seeds, num_groups = z.shape
        size = num_seeds * num_groups
        columns = num_seeds * float(z.mean(axis=0).var(ddof=1))
        if num_seeds == 1:
            parts = [(columns, num_groups - 1.0)]
        else:
            rows = num_groups * float(z.mean(axis=1).var(ddof=1))
            rest = z - z.mean(axis=0) - z.mean(axis=1, keepdims=True) + z.mean()
            free = (num_seeds - 1.0) * (num_groups - 1.0)
            left = float((rest**2).sum()) / free
            # Where rows or columns vary less than the rest would make them, they have no spread of their own, and the
            # rest, known far better, stands for theirs. Otherwise a short interval would come with a long quantile.
            seeds = (rows, num_seeds - 1.0) if rows > left else (left, free)
            items = (columns, num_groups - 1.0) if columns > left else (left, free)
            parts = [seeds, items, (-left, free)]
        variance += size * sum(square for square, _ in parts)
        below += sum((size * square) ** 2 / free for square, free in parts)
    return variance, variance**2 / below if below else 1.0


def _draws(tables: Sequence[Table], residuals: Sequence[np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ratio [B] and the sum of residuals [B] under draws of seeds and groups with replacement."""
    top, bottom, linear = np.zeros(NUM_DRAWS), np.zeros(NUM_DRAWS), np.zeros(NUM_DRAWS)
    for number, (table, z) in enumerate(zip(tables, residuals, strict=True)):
        num_seeds, num_groups = z.shape
        rng = numpy_stream(seed, "crossed", number, num_seeds, num_groups)
        seeds, groups = _times_drawn(rng, num_seeds), _times_drawn(rng, num_groups)
        for sums, values in ((top, table.numerator), (bottom, table.denominator), (linear, z)):
            sums += np.einsum("bg,bg->b", seeds @ values, groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        return top / bottom, linear


def _times_drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return how often each of `count` was drawn, [B, count], in `count` draws with replacement."""
    drawn = rng.integers(count, size=(NUM_DRAWS, count)) + count * np.arange(NUM_DRAWS)[:, None]
    return np.bincount(drawn.ravel(), minlength=NUM_DRAWS * count).reshape(NUM_DRAWS, count).astype(float)
