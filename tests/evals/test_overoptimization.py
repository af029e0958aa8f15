"""Over-optimisation: the estimator against enumeration, planted coefficients recovered, degenerate input answered."""

import math
from itertools import combinations

import numpy as np
import pytest

from qinglan.core.errors import InputError
from qinglan.core.rng import numpy_stream
from qinglan.evals.overoptimization import (
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_scores,
    best_of_n_weights,
    fit_gold_curve,
)

KL = np.array([best_of_n_kl(n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)])
RL_KL = np.linspace(0, 30, 16)


def planted(form: str, kl: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    d = np.sqrt(kl)
    return d * (alpha - beta * d) if form == "best_of_n" else d * (alpha - beta * np.log(np.maximum(d, 1e-12)))


def test_kl_by_hand():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    assert best_of_n_kl(60_000) == pytest.approx(10.0, abs=0.01)  # Gao et al. 2022: about 10 nats


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_equals_enumeration(n):
    rng = numpy_stream(0, "enumeration")
    proxy, gold = rng.normal(size=(5, 6)), rng.normal(size=(5, 6))
    expected = [
        np.mean([g[max(subset, key=lambda i: p[i])] for subset in combinations(range(6), n)])
        for p, g in zip(proxy, gold, strict=True)
    ]
    np.testing.assert_allclose(best_of_n_scores(proxy, gold, n), expected, rtol=1e-9)


def test_ties_are_broken_at_random():
    # Proxy scores 1, 1, 0: the subsets of two hold a tie (mean of both golds), and the first or second with the third.
    found = best_of_n_scores(np.array([[1.0, 1.0, 0.0]]), np.array([[4.0, 8.0, 0.0]]), 2)
    assert found == pytest.approx([(6 + 4 + 8) / 3])
    # A proxy that knows nothing selects nothing.
    assert best_of_n_scores(np.zeros((1, 3)), np.array([[4.0, 8.0, 0.0]]), 3) == pytest.approx([4.0])


def test_weights_add_up_to_one_for_many_samples():
    for n in (1, 10, 1000):
        assert best_of_n_weights(1000, n).sum() == pytest.approx(1.0)
    with pytest.raises(InputError, match="best of 5: got 4 samples"):
        best_of_n_weights(4, 5)


def test_curve_counts_what_was_not_scored():
    rng = numpy_stream(0, "curve")
    gold = rng.normal(size=(50, 16))
    proxy = gold + rng.normal(size=(50, 16))
    gold[3, 2], proxy[7, 1] = math.nan, math.nan
    found = best_of_n_curve(proxy, gold, (1, 4, 16), seed=0)
    assert found.unscored == 2
    assert found.gold.shape == (50, 3)
    assert [point.gold.n for point in found.points] == [48, 48, 48]
    assert [point.proxy.n for point in found.points] == [48, 48, 48]
    golds = [point.gold.value for point in found.points]
    assert golds == sorted(golds)
    assert found.points[2].proxy.value > found.points[2].gold.value
    assert best_of_n_curve(proxy, gold, (), seed=0).points == ()


@pytest.mark.parametrize(("form", "kl"), [("best_of_n", KL), ("rl", RL_KL)])
def test_planted_coefficients_are_recovered_exactly(form, kl):
    found = fit_gold_curve(form, kl, planted(form, kl, 0.9, 0.25) + 3.0, 3.0, seed=0)
    assert (found.alpha.value, found.beta.value) == pytest.approx((0.9, 0.25))
    assert found.alpha.low == pytest.approx(0.9)
    peak = (0.9 / 0.5) ** 2 if form == "best_of_n" else math.exp(0.9 / 0.25 - 1) ** 2
    assert found.peak_kl.value == pytest.approx(peak)
    assert found.peak_is_measured == (form == "best_of_n")  # the RL peak, at 181 nats, is extrapolated
    np.testing.assert_allclose(found.predict(kl), planted(form, kl, 0.9, 0.25), atol=1e-9)
    # The peak is one.
    around = found.predict([0.9 * peak, peak, 1.1 * peak])
    assert around[1] > max(around[0], around[2])


@pytest.mark.parametrize(("form", "kl"), [("best_of_n", KL), ("rl", RL_KL)])
def test_planted_coefficients_are_covered_over_prompts(form, kl):
    hits = []
    for seed in range(100):
        rng = numpy_stream(seed, "prompts")
        user = np.repeat(np.arange(20), 3)
        initial = rng.normal(0.5, 0.2, 60)
        alphas = 0.8 + rng.normal(0, 0.3, 20)[user] + rng.normal(0, 0.2, 60)
        gold = np.stack([planted(form, kl, alpha, 0.2) for alpha in alphas]) + rng.normal(0, 0.1, (60, len(kl)))
        found = fit_gold_curve(form, kl, gold + initial[:, None], initial, user.tolist(), seed=seed)
        hits.append([found.alpha.low <= 0.8 <= found.alpha.high, found.beta.low <= 0.2 <= found.beta.high])
    assert np.mean(hits, axis=0) == pytest.approx([0.95, 0.95], abs=0.05)


def test_noisy_points_give_an_interval_that_holds_the_truth():
    gold = planted("rl", RL_KL, 0.9, 0.4) + numpy_stream(0, "points").normal(0, 0.02, len(RL_KL))
    found = fit_gold_curve("rl", RL_KL, gold, 0.0, seed=0)
    assert found.alpha.low < 0.9 < found.alpha.high
    assert found.beta.low < 0.4 < found.beta.high
    assert found.peak_kl.low < math.exp(0.9 / 0.4 - 1) ** 2 < found.peak_kl.high
    assert found.peak_is_measured
    assert found == fit_gold_curve("rl", RL_KL, gold, 0.0, seed=0)


def test_no_peak_where_gold_only_rises():
    found = fit_gold_curve("best_of_n", KL, planted("best_of_n", KL, 0.5, -0.02), 0.0, seed=0)
    assert found.beta.value == pytest.approx(-0.02)
    assert (found.peak_kl.value, found.peak_is_measured, found.problem) == (None, False, "")


def test_gold_that_only_falls_peaks_at_the_start():
    found = fit_gold_curve("best_of_n", KL, planted("best_of_n", KL, -0.5, 0.1), 0.0, seed=0)
    assert found.peak_kl.value == 0.0


def test_degenerate_input_is_answered_clearly():
    for kl, gold in (([], []), ([0.0], [0.0]), ([0.0, 1.0, 1.0], [0.0, 0.5, 0.6])):
        found = fit_gold_curve("rl", kl, gold, 0.0, seed=0)
        assert found.alpha.value is None
        assert "at least two" in found.problem
        assert np.isnan(found.predict([1.0, 2.0])).all()
    close = fit_gold_curve("best_of_n", [1.0, 1.0 + 1e-9], [1.0, 1.0], 0.0, seed=0)
    assert "too close" in close.problem
    exact = fit_gold_curve("best_of_n", [1.0, 4.0], [1.0, 1.5], 0.0, seed=0)
    assert exact.alpha.value is not None
    assert exact.alpha.low is None
    nobody = fit_gold_curve("rl", [1.0, 4.0], np.full((3, 2), math.nan), np.zeros(3), seed=0)
    assert nobody.alpha.value is None


def test_negative_and_missing_points_are_dropped_and_counted():
    kl = np.concatenate([[-0.01], RL_KL, [3.0]])
    gold = np.concatenate([[0.0], planted("rl", RL_KL, 0.9, 0.4), [math.nan]])
    found = fit_gold_curve("rl", kl, gold, 0.0, seed=0)
    assert found.num_dropped == 2
    assert found.alpha.value == pytest.approx(0.9)
    by_prompt = np.tile(gold, (4, 1))
    by_prompt[2, 5] = math.nan  # this prompt is left out, not the point
    found = fit_gold_curve("rl", kl, by_prompt, np.zeros(4), ["u", "u", "v", "w"], seed=0)
    assert (found.num_dropped, found.alpha.n) == (2, len(RL_KL))
    assert found.alpha.value == pytest.approx(0.9)
