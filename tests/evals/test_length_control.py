"""Length control: planted preferences at equal length come back; degenerate lengths give clear answers."""

import numpy as np
import pytest
from scipy.special import expit

from qinglan.core.rng import numpy_stream
from qinglan.evals.length_control import length_controlled_win_rate, length_matched_win_rate
from qinglan.evals.metrics import win_rate


def judged(rng, n: int, intercept: float, slope: float, longer: float):
    """Preferences of a planted logistic judge; the first side is longer by `longer` tokens on average."""
    second = rng.integers(20, 60, n).astype(float)
    first = second + np.round(rng.normal(longer, 20, n))
    difference = first - second
    scaled = np.tanh(difference / np.sqrt((difference**2).mean()))
    return (rng.random(n) < expit(intercept + slope * scaled)).astype(float), first, second


def test_a_win_rate_that_is_all_length_vanishes():
    y, first, second = judged(numpy_stream(0, "judged"), 1500, 0.0, 2.0, longer=25)
    assert win_rate(y, seed=0).low > 0.65
    assert length_controlled_win_rate(y, first, second, seed=0).value == pytest.approx(0.5, abs=0.06)
    assert length_matched_win_rate(y, first, second, seed=0).value == pytest.approx(0.5, abs=0.06)


def test_planted_win_rate_at_equal_length_is_recovered_and_covered():
    hits = []
    for seed in range(40):
        y, first, second = judged(numpy_stream(seed, "judged"), 120, 0.6, 1.5, longer=10)
        found = length_controlled_win_rate(y, first, second, seed=seed)
        hits.append(found.low <= expit(0.6) <= found.high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.05)


def test_without_length_bias_nothing_changes():
    y, first, second = judged(numpy_stream(1, "judged"), 1500, 0.8, 0.0, longer=10)
    raw = win_rate(y, seed=0).value
    assert length_controlled_win_rate(y, first, second, seed=0).value == pytest.approx(raw, abs=0.03)
    assert length_matched_win_rate(y, first, second, seed=0).value == pytest.approx(raw, abs=0.03)


def test_swapping_the_sides_mirrors_the_rate():
    y, first, second = judged(numpy_stream(2, "judged"), 300, 0.5, 1.0, longer=5)
    for measure in (length_controlled_win_rate, length_matched_win_rate):
        there, back = measure(y, first, second, seed=0), measure(1 - y, second, first, seed=0)
        assert back.value == pytest.approx(1 - there.value, abs=1e-6)


def test_matched_by_hand():
    # Equal lengths: 1 win of 2. Unequal by 10: longer 1.0 (2 prompts), shorter 0.25 (2 prompts), mean 0.625.
    y = [1, 0, 1, 1, 0.5, 0]
    first, second = [5, 5, 20, 20, 10, 10], [5, 5, 10, 10, 20, 20]
    found = length_matched_win_rate(y, first, second, seed=0)
    assert found.value == pytest.approx((2 * 0.5 + 4 * 0.625) / 6)
    assert found.n == 6
    unmatched = length_matched_win_rate([1, 0], [5, 9], [1, 1], seed=0)
    assert (unmatched.value, unmatched.unit) == (None, "no lengths match")


def test_degenerate_lengths_and_preferences():
    alike = [10.0] * 30
    mixed = [1.0, 0.0, 1.0] * 10
    assert length_controlled_win_rate(mixed, alike, alike, seed=0).value == pytest.approx(2 / 3)
    assert length_matched_win_rate(mixed, alike, alike, seed=0).value == pytest.approx(2 / 3)
    assert length_controlled_win_rate(mixed, [11.0] * 30, alike, seed=0).unit == "all lengths differ alike"
    won = length_controlled_win_rate([1.0] * 30, np.arange(30), alike, seed=0)
    assert (won.value, won.high) == (1.0, 1.0)
    assert won.low == pytest.approx(30 / (30 + 3.8415), abs=1e-4)
    assert length_matched_win_rate([1.0] * 30, np.arange(30), alike, seed=0).low < 1.0
    for measure in (length_controlled_win_rate, length_matched_win_rate):
        assert measure([], [], [], seed=0).value is None
        assert measure([np.nan], [1], [2], seed=0).value is None


def test_separable_data_stay_finite():
    # The longer one always wins: at equal lengths nobody knows, and says so by its width.
    difference = np.concatenate([np.arange(1, 21), -np.arange(1, 21)])
    found = length_controlled_win_rate((difference > 0).astype(float), 30 + difference, [30] * 40, seed=0)
    assert found.value == pytest.approx(0.5, abs=0.01)
    assert found.low < found.value < found.high
