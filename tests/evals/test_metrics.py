"""Metrics: hand-worked values, planted truths recovered, intervals that cover, clear answers where there is none."""

import math

import numpy as np
import pytest
from scipy.special import expit

from qinglan.core.records import (
    Comparison,
    ComparisonGroup,
    Completion,
    Message,
    PreferenceProbability,
    Prompt,
    Ranking,
)
from qinglan.core.rng import numpy_stream
from qinglan.core.run import Measure
from qinglan.evals.metrics import (
    attainable_accuracy,
    calibration,
    labeler_agreement,
    mean_difference,
    mean_with_interval,
    pair_accuracy,
    pair_accuracy_by,
    pair_calibration,
    performance_gap_recovered,
    roc_auc,
    scored_pairs,
    win_rate,
)


def a_prompt(i: int) -> Prompt:
    return Prompt(
        id=f"p{i}",
        source="human",
        producer_id="u",
        prompt_group_id=f"user-{i}",
        messages=(Message(role="user", content="hi"),),
    )


def a_comparison(i: int, label, count: int, labeler: str = "a", **changes: object) -> Comparison:
    return Comparison(
        id=f"c{i}{labeler}",
        source=changes.pop("source", "human"),
        producer_id=labeler,
        prompt_group_id=f"user-{i}",
        prompt_id=f"p{i}",
        items=tuple(f"p{i}-{k}" for k in range(count)),
        order_shown=tuple(range(count)),
        label=label,
        **changes,
    )


def a_group(i: int, label, count: int, **changes: object) -> ComparisonGroup:
    comparison = a_comparison(i, label, count, **changes)
    completions = tuple(
        Completion(id=item, source="policy", producer_id="m", prompt_group_id=f"user-{i}", prompt_id=f"p{i}", text="x")
        for item in comparison.items
    )
    return ComparisonGroup(a_prompt(i), completions, comparison)


def covers(simulate, truth: float, count: int = 120) -> float:
    found = [simulate(numpy_stream(seed, "simulation"), seed) for seed in range(count)]
    return float(np.mean([measure.low <= truth <= measure.high for measure in found]))


def test_means_at_the_edges():
    assert mean_with_interval([], seed=0) == Measure(None, None, None, 0)
    assert mean_with_interval([math.nan], seed=0).n == 0
    assert mean_with_interval([3.5], seed=0) == Measure(3.5, None, None, 1)
    assert mean_with_interval([1, 2, 3], ["u"] * 3, seed=0) == Measure(2.0, None, None, 3)
    few = mean_with_interval([1.0] * 5, seed=0)
    assert (few.value, few.high) == (1.0, 1.0)
    assert few.low == pytest.approx(5 / (5 + 3.8415), abs=1e-4)
    # Ten wins of two users are two items, not ten.
    assert mean_with_interval([1.0] * 10, ["u", "v"] * 5, seed=0).low == pytest.approx(2 / (2 + 3.8415), abs=1e-4)
    assert mean_with_interval([0.5] * 20, seed=0).low < 0.35
    assert mean_with_interval([0.0, 1.0, math.nan], seed=0).n == 2


def test_means_repeat_by_seed():
    values = numpy_stream(0, "values").normal(size=50)
    assert mean_with_interval(values, seed=1) == mean_with_interval(values, seed=1)
    assert mean_with_interval(values, seed=1) != mean_with_interval(values, seed=2)


def test_win_rate_counts_ties_half():
    found = win_rate([1, 1, 0.5, 0], seed=0)
    assert (found.value, found.n, found.unit) == (0.625, 4, "win rate")
    assert found.low < 0.625 < found.high


def test_win_rate_covers():
    def simulate(rng, seed):
        return win_rate(rng.choice([0.0, 0.5, 1.0], p=[0.3, 0.2, 0.5], size=60), seed=seed)

    assert covers(simulate, 0.6) == pytest.approx(0.95, abs=0.04)


def test_paired_difference_is_sharper_than_its_parts():
    rng = numpy_stream(0, "paired")
    common = rng.normal(0, 5, 100)
    first, second = common + rng.normal(1.0, 0.5, 100), common + rng.normal(0, 0.5, 100)
    found = mean_difference(first, second, seed=0)
    assert found.value == pytest.approx(1.0, abs=0.25)
    assert found.low > 0.7
    assert mean_with_interval(first, seed=0).low < 0.7
    assert mean_difference([1, math.nan, 2], [0, 1, math.nan], seed=0).n == 1
    assert mean_difference([], [], seed=0).value is None


def test_pair_accuracy_by_hand():
    groups = [
        a_group(0, Ranking(groups=((1,), (0, 2))), 3, labeler_group="x"),  # pairs 1>0, 1>2; the tie decides nothing
        a_group(1, PreferenceProbability(p_first_better=0.2), 2, labeler_group="y", source="principle_model"),
        a_group(2, PreferenceProbability(p_first_better=0.5), 2, labeler_group="y"),
        a_group(3, Ranking(groups=((0,), (1,))), 2),
    ]
    table = scored_pairs(groups, [[0.0, 1.0, 1.0], [3.0, 0.0], [9.0, 0.0], [math.nan, 0.0]])
    np.testing.assert_array_equal(table.gaps, [1.0, 0.0, -3.0, math.nan])
    found = pair_accuracy(table, seed=0)
    assert (found.value, found.n) == (0.5, 3)  # right, half, wrong, and one unscored
    by_source = pair_accuracy_by(table, "source", seed=0)
    assert (by_source["human"].value, by_source["principle_model"].value) == (0.75, 0.0)
    by_group = pair_accuracy_by(table, "labeler_group", seed=0)
    assert {name: measure.value for name, measure in by_group.items()} == {"x": 0.75, "y": 0.0, "none": None}
    by_gap = pair_accuracy_by(table, "score_gap", seed=0)
    assert {name: measure.value for name, measure in by_gap.items()} == {"0 to 0.5": 0.5, "1 to 2": 1.0, "2 to 4": 0.0}


def test_calibration_by_hand():
    # Bins of width 0.5: [0.25, 0.25] observed 0.5; [0.75] observed 1. ECE = 2/3 * 0.25 + 1/3 * 0.25 = 0.25
    found = calibration([0.25, 0.25, 0.75], [0, 1, 1], seed=0, num_bins=2)
    assert found.expected_error.value == pytest.approx(0.25)
    assert found.brier.value == pytest.approx((0.0625 + 0.5625 + 0.0625) / 3)
    assert [(b.low, b.high, b.mean_predicted, b.observed.value, b.observed.n) for b in found.bins] == [
        (0.0, 0.5, 0.25, 0.5, 2),
        (0.5, 1.0, 0.75, 1.0, 1),
    ]
    assert calibration([], [], seed=0).bins == ()
    assert calibration([1.0], [1.0], seed=0).bins[0].high == 1.0


def test_calibration_tells_calibrated_from_overconfident():
    rng = numpy_stream(0, "calibration")
    gaps = rng.normal(0, 1.5, 2000)
    wins = rng.random(2000) < expit(gaps)
    groups = [a_group(i, Ranking(groups=((0,), (1,)) if win else ((1,), (0,))), 2) for i, win in enumerate(wins)]
    good = pair_calibration(scored_pairs(groups, [[gap, 0.0] for gap in gaps]), seed=0)
    bad = pair_calibration(scored_pairs(groups, [[3 * gap, 0.0] for gap in gaps]), seed=0)
    assert good.expected_error.value < 0.04
    assert good.expected_error.low <= good.expected_error.value <= good.expected_error.high
    assert bad.expected_error.low > 0.1
    assert good.brier.value < bad.brier.value
    assert good.bins[0].low == 0.5


def test_labeler_agreement_matches_items_by_id():
    same = Ranking(groups=((0,), (1,), (2,)))
    comparisons = [
        a_comparison(0, same, 3, "a"),
        a_comparison(0, Ranking(groups=((0,), (2,), (1,))), 3, "b"),  # agrees on 0-1 and 0-2, not on 1-2
        a_comparison(1, same, 3, "a"),
        a_comparison(1, same, 3, "a"),  # the same person twice: not agreement between two
        a_comparison(2, PreferenceProbability(p_first_better=0.9), 2, "a"),
        a_comparison(2, PreferenceProbability(p_first_better=0.6), 2, "c"),
    ]
    found = labeler_agreement(comparisons, seed=0)
    assert (found.value, found.n) == (0.75, 4)
    assert labeler_agreement([], seed=0).value is None


def test_attainable_accuracy_bounds_a_perfect_predictor():
    # c = (1 + sqrt(2 * 0.726 - 1)) / 2 = (1 + 0.6723) / 2
    found = attainable_accuracy(Measure(0.726, 0.7, 0.75, 100))
    assert found.at_most.value == pytest.approx(0.8362, abs=1e-4)
    assert found.at_least.value == 0.726
    assert attainable_accuracy(Measure(0.4, 0.3, 0.5, 10)).at_most.value == 0.5
    assert attainable_accuracy(Measure(None, None, None, 0)).at_most.value is None
    # Pairs of mixed difficulty: what is attainable lies between the bounds.
    siding = 0.5 + 0.5 * numpy_stream(0, "siding").beta(1, 1, 100_000)
    agreeing = float((siding**2 + (1 - siding) ** 2).mean())
    bounds = attainable_accuracy(Measure(agreeing, None, None, 1))
    assert bounds.at_least.value < siding.mean() < bounds.at_most.value


def test_auc_by_hand_and_by_counting():
    # positives 3, 1; negatives 2, 1: 3 > 2, 3 > 1, 1 < 2, 1 = 1 -> 2.5 / 4
    assert roc_auc([3, 1, 2, 1], [1, 1, 0, 0], seed=0).value == pytest.approx(0.625)
    rng = numpy_stream(0, "auc")
    scores, labels = rng.integers(0, 10, 80), rng.integers(0, 2, 80)
    wins = [(p > q) + 0.5 * (p == q) for p in scores[labels == 1] for q in scores[labels == 0]]
    assert roc_auc(scores, labels, seed=0).value == pytest.approx(np.mean(wins))
    perfect = roc_auc([1, 2, 3, 4], [0, 0, 1, 1], seed=0)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low < 0.5
    assert roc_auc([1, 2], [1, 1], seed=0) == Measure(None, None, None, 2, "AUC")


def test_auc_covers():
    def simulate(rng, seed):
        labels = np.repeat([0, 1], 30)
        return roc_auc(rng.normal(labels * 1.0, 1.0), labels, seed=seed)

    assert covers(simulate, 0.7602) == pytest.approx(0.95, abs=0.04)  # Phi(1 / sqrt 2)


def test_gap_recovered_by_hand_and_guarded():
    floor, student, ceiling = [0, 0, 1, 0] * 20, [0, 1, 1, 0] * 20, [1, 1, 1, 0] * 20
    found = performance_gap_recovered(floor, student, ceiling, seed=0)
    assert found.value == pytest.approx(0.5)  # 0.25 -> 0.5 of 0.25 -> 0.75
    assert found.low < 0.5 < found.high
    too_small = performance_gap_recovered(floor, student, floor, seed=0)
    assert (too_small.value, too_small.unit) == (None, "gap too small to measure")
    assert performance_gap_recovered(floor, student, ceiling, seed=0, min_gap=0.5).value is None
    assert performance_gap_recovered([], [], [], seed=0).value is None


def test_gap_recovered_covers():
    def simulate(rng, seed):
        ease = rng.random(100)  # the same items are easy for all three
        chances = [(ease < share).astype(float) for share in (0.4, 0.6, 0.9)]
        noisy = [np.where(rng.random(100) < 0.1, 1 - chance, chance) for chance in chances]
        return performance_gap_recovered(*noisy, seed=seed)

    assert covers(simulate, 0.4) == pytest.approx(0.95, abs=0.04)  # noise shrinks both gaps alike
