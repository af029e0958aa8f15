"""Intervals cover what they claim, at small n and for few groups too."""

import math

import numpy as np
import pytest

from qinglan.core.rng import numpy_stream
from qinglan.evals.intervals import (
    bootstrap_interval,
    group_index,
    percentile_interval,
    resample,
    scored_items,
    wilson_interval,
)
from qinglan.evals.metrics import mean_with_interval

NUM_SIMULATIONS = 300


def coverage(simulate, truth: float, count: int = NUM_SIMULATIONS) -> float:
    """How often the interval of `simulate(rng, seed)` holds `truth`; its own standard error is 0.013."""
    found = [simulate(numpy_stream(seed, "simulation"), seed) for seed in range(count)]
    return float(np.mean([measure.low <= truth <= measure.high for measure in found]))


def test_wilson_by_hand():
    # 0 of 10: 0 to z^2 / (n + z^2) = 3.8415 / 13.8415; 5 of 10 from the textbook: 0.237 to 0.763
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 3.8415 / 13.8415), abs=1e-4)
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(1.0, 1) == pytest.approx((0.2065, 1.0), abs=1e-4)


def test_groups_are_numbered_and_unscored_items_left_out():
    (kept,), index, num_groups = scored_items(["u", "v", "u", "w"], [1.0, math.nan, 3.0, 4.0])
    assert kept.tolist() == [1, 3, 4]
    assert (index.tolist(), num_groups) == ([0, 0, 1], 2)
    assert group_index(None, 3)[1] == 3
    with pytest.raises(ValueError, match=r"equal lengths, got \[2, 1\]"):
        scored_items(None, [1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="3 groups for 2 items"):
        group_index(["a", "b", "c"], 2)


def test_resampling_draws_as_many_groups_and_repeats_by_seed():
    totals = resample(lambda w: w.sum(axis=1), 7, seed=0)
    assert totals.shape == (2000,)
    assert set(totals) == {7.0}
    first = resample(lambda w: w[:, 0], 7, seed=0)
    assert (first == resample(lambda w: w[:, 0], 7, seed=0)).all()
    assert (first != resample(lambda w: w[:, 0], 7, seed=1)).any()
    assert first.mean() == pytest.approx(1.0, abs=0.08)
    # Chunks that hold few draws give the same ones.
    assert (first == resample(lambda w: w[:, 0], 7, seed=0, width=100_000)).all()


def test_undefined_and_infinite_draws():
    assert percentile_interval(np.full(10, math.nan), 5) == (None, None)
    low, high = percentile_interval(np.array([1.0] * 50 + [math.inf] * 50), 50)
    assert (low, high) == (1.0, math.inf)
    assert bootstrap_interval(lambda w: w[:, 0], 1, seed=0) == (None, None)


@pytest.mark.parametrize("n", [8, 40])
def test_coverage_of_a_mean(n):
    assert coverage(lambda rng, seed: mean_with_interval(rng.normal(2, 3, n), seed=seed), 2.0) == pytest.approx(
        0.95, abs=0.035
    )


def test_coverage_of_a_mean_over_groups():
    def simulate(rng, seed):
        group = np.repeat(np.arange(20), rng.integers(2, 9, 20))
        return mean_with_interval(rng.normal(0, 1, 20)[group] + rng.normal(0, 1, len(group)), group.tolist(), seed=seed)

    assert coverage(simulate, 0.0) == pytest.approx(0.95, abs=0.035)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_coverage_of_a_rate_over_groups(rate):
    def simulate(rng, seed):
        group = np.repeat(np.arange(40), 5)
        strength = 4.0
        chances = rng.beta(rate * strength, (1 - rate) * strength, 40)
        return mean_with_interval((rng.random(200) < chances[group]).astype(float), group.tolist(), seed=seed)

    assert coverage(simulate, rate) == pytest.approx(0.95, abs=0.035)


def test_ignoring_groups_would_not_cover():
    def simulate(rng, seed):
        values = np.repeat(rng.normal(0, 1, 20), 8) + rng.normal(0, 0.3, 160)
        return mean_with_interval(values, seed=seed)

    assert coverage(simulate, 0.0, count=50) < 0.75
