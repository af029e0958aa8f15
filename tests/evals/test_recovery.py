"""Recovery of planted numbers: gap recovered, its interval's coverage, the guard, agreement."""

import numpy as np
import pytest

from qinglan.core.rng import numpy_stream
from qinglan.evals.crossed import Table, crossed_interval, ratio_of_sums, table_of, two_way_variance
from qinglan.evals.recovery import TOO_SMALL, accuracy, agreement, correct_answers, difference, gap_recovered

SEEDS, ITEMS = 5, 160


def planted(draw: np.random.Generator, weak: float, student: float, ceiling: float) -> list[np.ndarray]:
    """Return right answers [S, N] of three models with these accuracies on average.

    Items are hard or easy for all models and seeds alike, seeds are good or bad, and each answer has luck of its own.
    """
    items = draw.uniform(-0.15, 0.15, size=(1, ITEMS))
    found = []
    for level in (weak, student, ceiling):
        seeds = draw.uniform(-0.04, 0.04, size=(SEEDS, 1))
        found.append((draw.random((SEEDS, ITEMS)) < level + items + seeds).astype(float))
    return found


def test_gap_recovered_by_hand() -> None:
    # Two seeds, four items. Sums over seeds: weak 4, student 5, ceiling 6 of 8: (5 - 4) / (6 - 4) = 0.5.
    # The mean of the seeds' own ratios would be (2 - 2) / (3 - 2) = 0 and (3 - 2) / (3 - 2) = 1: here the same.
    weak = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=float)
    student = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=float)
    ceiling = np.array([[1, 1, 1, 0], [1, 1, 1, 0]], dtype=float)
    table = table_of(student - weak, ceiling - weak)
    assert ratio_of_sums([table]) == 0.5
    # Groups add items up: items 0 and 2 are one passage, 1 and 3 another.
    assert table_of(student, ceiling, ["a", "b", "a", "b"]).numerator.tolist() == [[1, 1], [2, 1]]


def test_a_copy_of_the_supervisor_recovers_nothing_and_a_copy_of_the_ceiling_all() -> None:
    weak, _, ceiling = planted(numpy_stream(0, "copies"), 0.65, 0.8, 0.85)
    nothing, everything = (gap_recovered([(weak, one, ceiling, None)], seed=0) for one in (weak, ceiling))
    assert (nothing.value, everything.value) == (0.0, 1.0)
    assert nothing.low == nothing.high == 0.0  # it does not depend on the draw
    assert everything.n == ITEMS


def test_the_pooled_number_weighs_tasks_alike() -> None:
    # Task one: gain 0.1 of gap 0.4; task two, with a quarter of the items: gain 0.3 of gap 0.4. (0.1 + 0.3) / 0.8 = 0.5
    def block(size: int, shares: tuple[float, float, float]) -> tuple[np.ndarray, ...]:
        return tuple((np.arange(size)[None] < share * size).astype(float).repeat(2, axis=0) for share in shares)

    tasks = [(*block(400, (0.5, 0.6, 0.9)), None), (*block(100, (0.5, 0.8, 0.9)), None)]
    found = gap_recovered(tasks, seed=0)
    assert found.value == pytest.approx(0.5)
    assert found.n == 500
    assert gap_recovered([], seed=0).value is None


def test_coverage_of_the_gap_recovered_is_95_percent() -> None:
    """Of 200 simulated experiments the interval holds the planted 0.5 in 95%, within sampling error.

    The standard error of a share of 0.95 over 200 is 0.0154; three of them are allowed on either side.
    """
    hits = 0
    for number in range(200):
        weak, student, ceiling = planted(numpy_stream(number, "coverage"), 0.6, 0.7, 0.8)
        found = gap_recovered([(weak, student, ceiling, None)], seed=number)
        assert found.low is not None and found.high is not None
        hits += found.low <= 0.5 <= found.high
    assert 0.95 - 3 * 0.0154 <= hits / 200 <= min(1.0, 0.95 + 3 * 0.0154), hits


def test_coverage_of_an_accuracy_with_grouped_items() -> None:
    """Four items of a passage share their luck; an interval that took them for independent would be half as wide."""
    hits = 0
    for number in range(200):
        draw = numpy_stream(number, "grouped")
        passages = np.repeat(draw.normal(0, 0.2, size=(1, 40)), 4, axis=1)
        seeds = draw.normal(0, 0.03, size=(4, 1))
        values = 0.7 + passages + seeds + draw.normal(0, 0.05, size=(4, 160))
        table = table_of(values, np.ones_like(values), np.repeat(np.arange(40), 4).tolist())
        low, high = crossed_interval([table], number)
        assert low is not None and high is not None
        hits += low <= 0.7 <= high
    assert 0.95 - 3 * 0.0154 <= hits / 200 <= 0.997, hits


def test_the_guard_refuses_a_gap_within_noise_and_lets_a_clear_one_pass() -> None:
    refused = 0
    for number in range(60):
        weak, student, ceiling = planted(numpy_stream(number, "guard"), 0.7, 0.75, 0.7)
        found = gap_recovered([(weak, student, ceiling, None)], seed=number)
        refused += found.value is None
        assert found.value is not None or (found.unit, found.low, found.n) == (TOO_SMALL, None, ITEMS)
    assert refused >= 55  # of 60 gaps of zero at most one in forty is taken for one above zero: 1.5 are expected
    clear = [
        gap_recovered([(*planted(numpy_stream(number, "clear"), 0.6, 0.7, 0.85), None)], seed=0).value
        for number in range(20)
    ]
    assert None not in clear


def test_two_way_variance_by_hand() -> None:
    # z = [[1, 3], [5, 7]]: row means 2, 6 (variance 8), column means 3, 5 (variance 2), no rest.
    # MS_s = 2 * 8 = 16, MS_g = 2 * 2 = 4; the variance of the sum is S G (16 + 4) = 80.
    variance, freedom = two_way_variance([np.array([[1.0, 3.0], [5.0, 7.0]])])
    assert variance == pytest.approx(80.0)
    assert freedom == pytest.approx(80.0**2 / (64.0**2 + 16.0**2))
    # One seed: the items' variance alone. N var = 4 * 5/3 over z = 0, 1, 2, 3
    assert two_way_variance([np.arange(4.0)[None]])[0] == pytest.approx(4 * 5 / 3)


def test_agreement_with_right_and_wrong_answers_of_the_supervisor() -> None:
    """Students copy 90% of the right answers and 40% of the wrong ones; both shares come back in 20 experiments."""
    found: dict[float, list[float]] = {0.9: [], 0.4: []}
    hits = 0
    for number in range(20):
        draw = numpy_stream(number, "agreement")
        truth = draw.integers(2, size=400).astype(float)
        weak_right = draw.random((5, 400)) < 0.7
        weak = np.where(weak_right, 1.0, -1.0) * np.where(truth > 0.5, 1.0, -1.0)
        copies = draw.random((5, 400)) < np.where(weak_right, 0.9, 0.4)
        student = np.where(copies, weak, -weak)
        right = correct_answers(weak, truth)
        for where, share in ((right, 0.9), (1 - right, 0.4)):
            one = agreement([(student, weak, where, None)], seed=number)
            assert one.value is not None and one.low is not None and one.high is not None
            found[share].append(one.value)
            hits += one.low <= share <= one.high
        assert agreement([(student, weak, np.zeros_like(right), None)], seed=0).value is None
    assert np.mean(found[0.9]) == pytest.approx(0.9, abs=0.01)
    assert np.mean(found[0.4]) == pytest.approx(0.4, abs=0.015)
    assert hits >= 34  # of 40: 38 are expected, with a standard deviation of 1.4


def test_accuracy_and_difference() -> None:
    truth = np.array([1.0, 0.0, 1.0, 0.0])
    # right, right, wrong, and a logit of 0, which counts half: 2.5 of 4
    assert correct_answers(np.array([[2.0, -1.0, -3.0, 0.0]]), truth).tolist() == [[1.0, 1.0, 0.0, 0.5]]
    sure = accuracy(np.ones((3, 50)), None, seed=0)
    assert sure.value == 1.0 and sure.high == 1.0 and sure.low is not None and 0.9 < sure.low < 1.0
    weak, _, ceiling = planted(numpy_stream(3, "difference"), 0.6, 0.7, 0.8)
    gap = difference(ceiling, weak, None, seed=0)
    assert gap.value == pytest.approx(ceiling.mean() - weak.mean())
    assert gap.low is not None and gap.high is not None and gap.low < 0.2 < gap.high


def test_one_group_has_no_interval() -> None:
    table = Table(np.array([[1.0], [2.0]]), np.array([[2.0], [2.0]]))
    assert crossed_interval([table], 0) == (None, None)
