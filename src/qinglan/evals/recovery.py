"""What weak-to-strong learning is measured by (Burns et al. 2023, sections 3 and 5), over items and seeds at once.

    performance gap recovered = (student - weak) / (ceiling - weak)

as a ratio of sums over seeds: the mean of the ratios of single seeds would be carried by whichever seed has the
smallest gap. Where the 95% interval of the gap reaches 0, there is no number but "gap too small to measure": the ratio
would be noise, and 0.8 of noise looks like a result.

Every table of answers is [S, N]: seeds by test items, the same items for all. NaN is not allowed: whoever could not
answer has no row.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from qinglan.core.run import Measure
from qinglan.evals.crossed import Table, crossed_interval, ratio_of_sums, table_of
from qinglan.evals.intervals import wilson_interval
from qinglan.evals.metrics import Calibration, calibration

TOO_SMALL = "gap too small to measure"
Groups = Sequence[Hashable] | None


class Answers(NamedTuple):
    """Logits of everybody on the test items of one task."""

    truth: np.ndarray
    """Classes [N], 0 or 1."""
    groups: Groups
    weak: np.ndarray
    """Logits of class 1 [S, N]."""
    ceiling: np.ndarray
    """[S, N]."""
    students: Mapping[str, np.ndarray]
    """[S, N] by method."""

    def correct(self, logits: np.ndarray) -> np.ndarray:
        """Return 1 where the answer is right, 0 where it is wrong, one half where the logit is 0."""
        return correct_answers(logits, self.truth)


def correct_answers(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return 1, 0 or one half (a logit of 0) for each answer, in the shape of `logits`."""
    return (np.sign(logits) * np.where(truth > 0.5, 1.0, -1.0) + 1.0) / 2.0


def _measure(tables: Sequence[Table], n: int, unit: str, seed: int) -> Measure:
    return Measure(ratio_of_sums(tables), *crossed_interval(tables, seed), n, unit)


def accuracy(correct: np.ndarray, groups: Groups, *, seed: int) -> Measure:
    """Return the mean of `correct` [S, N] with its interval over items and seeds; n counts items."""
    table = table_of(correct, np.ones_like(correct), groups)
    found = _measure([table], correct.shape[1], "accuracy", seed)
    return _as_rate(found, table.numerator.shape[1])


def _as_rate(found: Measure, num_groups: int) -> Measure:
    """Return the measure inside [0, 1]; where nothing varies, which is no certainty, with Wilson's interval."""
    if found.value in (0.0, 1.0):
        low, high = wilson_interval(found.value, num_groups)
        return found._replace(low=low, high=high)
    if found.low is None or found.high is None:
        return found
    return found._replace(low=max(0.0, found.low), high=min(1.0, found.high))


def difference(first: np.ndarray, second: np.ndarray, groups: Groups, *, seed: int) -> Measure:
    """Return mean(first) - mean(second), paired by seed and item; both [S, N]."""
    table = table_of(first - second, np.ones_like(first), groups)
    return _measure([table], first.shape[1], "accuracy", seed)


def gap_recovered(tasks: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, Groups]], *, seed: int) -> Measure:
    """Return the performance gap recovered over one task or several, each (weak, student, ceiling, groups).

    Tasks weigh alike, whatever their number of items; they are given, not drawn. Value None where the gap's interval
    is not above 0, or where there is no task.
    """
    n = sum(weak.shape[1] for weak, *_ in tasks)
    if not tasks:
        return Measure(None, None, None, 0, "no admitted task")
    gains, gaps = [], []
    for weak, student, ceiling, groups in tasks:
        size = weak.size
        gain = table_of((student - weak) / size, (ceiling - weak) / size, groups)
        gains.append(gain)
        gaps.append(table_of((ceiling - weak) / size, np.ones_like(weak) / size, groups))
    gap = crossed_interval(gaps, seed)
    if gap.low is None or gap.low <= 0.0:
        return Measure(None, None, None, n, TOO_SMALL)
    return _measure(gains, n, "performance gap recovered", seed)


def agreement(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, Groups]], *, seed: int) -> Measure:
    """Return how often student and supervisor decide alike, over tasks given as (student, weak, where, groups).

    `where` [S, N] is 1 for the supervisor's right answers, or for its wrong ones: a student that only imitates agrees
    with both; one that has learnt the task agrees less with the errors (paper, section 5.1.3). n counts items.
    """
    tables, n = [], 0
    for student, weak, where, groups in parts:
        alike = ((student > 0) == (weak > 0)).astype(float)
        tables.append(table_of(alike * where, where.astype(float), groups))
        n += int(where.any(axis=0).sum())
    if n == 0:
        return Measure(None, None, None, 0, "agreement")
    return _as_rate(_measure(tables, n, "agreement", seed), n)


def reliability_of(logits: np.ndarray, truth: np.ndarray, groups: Groups, *, seed: int) -> Calibration:
    """Return the calibration of P(class 1) = sigmoid(logit) of all seeds [S, N], intervals over groups of items."""
    num_seeds, num_items = logits.shape
    names = list(range(num_items)) if groups is None else list(groups)
    return calibration(expit(logits).ravel(), np.tile(truth, num_seeds), names * num_seeds, seed=seed)
