"""Over-optimisation: gold score against how far a policy has moved, after Gao, Schulman and Hilton 2022.

With d = sqrt(KL(policy || initial policy)) and gold scores recentred to 0 at the initial policy (their section 3):

    best of n:  R(d) = d (alpha - beta d)        peak at d = alpha / (2 beta)
    RL:         R(d) = d (alpha - beta log d)    peak at d = exp(alpha / beta - 1)

Both are linear in (alpha, beta) and fitted by least squares. KL of best of n is log n - (n - 1) / n; its expected
scores come from the unbiased estimator over all subsets of n of N samples. RL spends far more KL than best of n, so
curves of the two are not compared at equal KL.

Departures: the number of points is small, so every coefficient carries a bootstrap interval, over prompts where scores
are given for each prompt and over points otherwise; a peak is reported only where beta > 0, and marked when it lies
beyond the points that were measured.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import gammaln
from scipy.stats import rankdata

from qinglan.core.errors import InputError
from qinglan.core.run import Measure
from qinglan.evals.intervals import Groups, group_index, percentile_interval, resample, sum_by_group
from qinglan.evals.metrics import mean_with_interval

Form = Literal["best_of_n", "rl"]


def best_of_n_kl(n: int) -> float:
    """Return KL(best of n || policy) in nats: log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def best_of_n_weights(num_samples: int, n: int) -> np.ndarray:
    """Return the chance [N] that the sample of ascending rank i = 1..N is the best of a random subset of n.

    w_i = C(i - 1, n - 1) / C(N, n), in logarithms because the binomials overflow.
    Raises `InputError` unless 1 <= n <= N.
    """
    if not 1 <= n <= num_samples:
        raise InputError(f"best of {n}: got {num_samples} samples for each prompt; expected n from 1 to that number")
    rank = np.arange(n, num_samples + 1)  # lower ranks are never the best of n

    def log_binomial(top: np.ndarray | int, bottom: int) -> np.ndarray:
        return gammaln(np.add(top, 1)) - gammaln(bottom + 1) - gammaln(np.subtract(top, bottom) + 1)

    weights = np.zeros(num_samples)
    weights[n - 1 :] = np.exp(log_binomial(rank - 1, n - 1) - log_binomial(num_samples, n))
    return weights


def best_of_n_scores(proxy: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Return for each prompt the expected value of the sample that `proxy` ranks best of n: [P] from [P, N] and [P, N].

    Unbiased: the mean over all subsets of n of the N samples (Gao et al. 2022, appendix; Nakano et al. 2021). Samples
    with equal proxy scores are chosen among at random. A prompt with NaN gets NaN.
    """
    num_samples = proxy.shape[1]
    # Cumulative weights at the lowest and highest rank of a tie give the tie's total, which its members share.
    cumulative = np.concatenate([[0.0], np.cumsum(best_of_n_weights(num_samples, n))])
    is_scored = np.isfinite(proxy).all(axis=1) & np.isfinite(values).all(axis=1)
    expected = np.full(len(proxy), math.nan)
    if is_scored.any():
        scores = proxy[is_scored]
        lowest = rankdata(scores, method="min", axis=1).astype(int)
        highest = rankdata(scores, method="max", axis=1).astype(int)
        weights = (cumulative[highest] - cumulative[lowest - 1]) / (highest - lowest + 1)
        expected[is_scored] = (weights * values[is_scored]).sum(axis=1)
    return expected


class CurvePoint(NamedTuple):
    """Expected proxy and gold score of best of n."""

    n: int
    kl: float
    proxy: Measure
    gold: Measure


class BestOfN(NamedTuple):
    """The curve of best of n, with gold scores for each prompt as the fit wants them."""

    points: tuple[CurvePoint, ...]
    gold: np.ndarray
    """[P, T] expected gold score for each prompt and point; NaN in prompts that were not scored."""
    unscored: int
    """Prompts left out because a sample had no score."""


def best_of_n_curve(
    proxy: np.ndarray, gold: np.ndarray, ns: Sequence[int], groups: Groups = None, *, seed: int
) -> BestOfN:
    """Return expected scores of best of n for every n of `ns`, from scores [P, N] of N samples for each prompt."""
    is_unscored = ~(np.isfinite(proxy) & np.isfinite(gold)).all(axis=1)
    points, gold_columns = [], []
    for n in ns:
        gold_column = best_of_n_scores(proxy, gold, n)
        proxy_column = np.where(is_unscored, math.nan, best_of_n_scores(proxy, proxy, n))
        gold_columns.append(gold_column)
        points.append(
            CurvePoint(
                n=n,
                kl=best_of_n_kl(n),
                proxy=mean_with_interval(proxy_column, groups, seed=seed, unit="score"),
                gold=mean_with_interval(gold_column, groups, seed=seed, unit="score"),
            )
        )
    by_prompt = np.array(gold_columns).reshape(len(points), len(proxy)).T
    return BestOfN(tuple(points), by_prompt, int(is_unscored.sum()))


class GoldFit(NamedTuple):
    """A fitted curve. Where `problem` is not empty it says why there is no fit, and all values are None."""

    form: Form
    alpha: Measure
    """Initial slope, in gold score per sqrt(nat)."""
    beta: Measure
    """How fast over-optimisation sets in; above 0 there is a peak."""
    peak_kl: Measure
    """KL of the highest gold score, in nats; None without a peak, an infinite end where some resamples have none."""
    peak_is_measured: bool
    """True if the peak lies within the KL of the points, False if it is extrapolated or absent."""
    num_dropped: int
    """Points left out because KL was negative (a sampled estimate can be) or a number was missing."""
    problem: str = ""

    def predict(self, kl: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the fitted recentred gold score at each KL, for drawing; NaN without a fit."""
        if self.alpha.value is None or self.beta.value is None:
            return np.full(len(kl), math.nan)
        return _features(self.form, np.sqrt(np.asarray(kl, dtype=float))) @ np.array(
            [self.alpha.value, self.beta.value]
        )


def fit_gold_curve(
    form: Form,
    kl: Sequence[float] | np.ndarray,
    gold: Sequence[float] | np.ndarray,
    initial: float | Sequence[float] | np.ndarray,
    groups: Groups = None,
    *,
    seed: int,
) -> GoldFit:
    """Fit Gao et al.'s curve of `form` to gold scores at T points of KL (nats).

    `gold` is [P, T] for each prompt (with `initial` [P], its gold score at the initial policy, and `groups` the prompt
    groups): the bootstrap draws prompt groups. Or it is [T] means (with one `initial`): the bootstrap draws points,
    which treats them as independent. Neighbouring points of one RL run are not, so those intervals are too narrow.
    """
    points, scores = np.asarray(kl, dtype=float), np.asarray(gold, dtype=float)
    rises = scores - np.asarray(initial, dtype=float)[..., None]  # recentred: 0 at the initial policy
    has_gold = np.isfinite(rises) if rises.ndim == 1 else np.isfinite(rises).any(axis=0)
    usable = np.isfinite(points) & (points >= 0) & has_gold
    d, num_dropped = np.sqrt(points[usable]), int((~usable).sum())
    rises, features = rises[..., usable], _features(form, d)
    if rises.ndim == 2:
        rows = np.isfinite(rises).all(axis=1)
        rises, groups = rises[rows], None if groups is None else [g for g, row in zip(groups, rows, strict=True) if row]
    problem = _problem(rises, features)
    if problem:
        nothing = Measure(None, None, None, len(d))
        return GoldFit(form, nothing, nothing, nothing, False, num_dropped, problem)
    if rises.ndim == 2:
        coef, draws, num_groups = _fit_prompts(features, rises, groups, seed)
    else:
        coef, draws, num_groups = _fit_points(features, rises, seed)
    alpha, beta = (
        Measure(float(coef[i]), *percentile_interval(draws[:, i], num_groups), len(d), "score per sqrt(nat)")
        for i in range(2)
    )
    peak = float(_peak_kl(form, coef[None])[0])
    if math.isfinite(peak):
        interval = percentile_interval(_peak_kl(form, draws), num_groups)
        return GoldFit(form, alpha, beta, Measure(peak, *interval, len(d), "nats"), peak <= d.max() ** 2, num_dropped)
    return GoldFit(form, alpha, beta, Measure(None, None, None, len(d), "nats"), False, num_dropped)


def _features(form: Form, d: np.ndarray) -> np.ndarray:
    """Return the columns [T, 2] that multiply (alpha, beta): (d, -d^2) or (d, -d log d), the latter 0 at d = 0."""
    if form == "best_of_n":
        return np.stack([d, -(d**2)], axis=1)
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=1)


def _problem(rises: np.ndarray, features: np.ndarray) -> str:
    """Return why two coefficients cannot be fitted, or nothing."""
    if rises.ndim == 2 and len(rises) == 0:
        return "no prompt has a gold score at every point"
    num_points = len(np.unique(features[features[:, 0] > 0, 0]))
    if num_points < 2:
        return f"{num_points} different KL above 0; two coefficients want at least two"
    if np.linalg.cond(features) > 1e6:
        return "the points' KL are too close together to tell alpha from beta"
    return ""


def _fit_prompts(
    features: np.ndarray, rises: np.ndarray, groups: Groups, seed: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Fit the mean curve; resample prompt groups. Coefficients are linear in the scores, so draws are one product."""
    solve = np.linalg.pinv(features)  # [2, T]
    index, num_groups = group_index(groups, len(rises))
    by_prompt = rises @ solve.T  # [P, 2]
    sums = np.stack([sum_by_group(column, index, num_groups) for column in by_prompt.T], axis=1)
    counts = sum_by_group(np.ones(len(rises)), index, num_groups)
    draws = resample(lambda w: (w @ sums) / (w @ counts)[:, None], num_groups, seed)
    return by_prompt.mean(axis=0), draws, num_groups


def _fit_points(features: np.ndarray, rises: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Fit the curve; resample points, solving the weighted normal equations of each draw."""
    products = (features[:, :, None] * features[:, None, :]).reshape(-1, 4)

    def coefficients(weights: np.ndarray) -> np.ndarray:
        squares = (weights @ products).reshape(-1, 2, 2)
        found = np.full((len(weights), 2), math.nan)
        # A draw of one point again and again decides nothing.
        decides = np.linalg.cond(squares) < 1e12
        targets = (weights @ (features * rises[:, None]))[decides]
        found[decides] = np.linalg.solve(squares[decides], targets[:, :, None])[:, :, 0]
        return found

    num_points = len(rises)
    # Two points are fitted exactly, by every resample alike: no interval.
    draws = resample(coefficients, num_points, seed) if num_points > 2 else np.full((1, 2), math.nan)
    return coefficients(np.ones((1, num_points)))[0], draws, num_points


def _peak_kl(form: Form, coef: np.ndarray) -> np.ndarray:
    """Return the KL [B] of the highest gold score for each (alpha, beta) [B, 2]; infinite where the curve never falls.

    best of n: d = alpha / (2 beta), or 0 where it falls from the start; RL: d = exp(alpha / beta - 1).
    """
    alpha, beta = coef.T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        d = np.maximum(alpha, 0.0) / (2 * beta) if form == "best_of_n" else np.exp(alpha / beta - 1)
        return np.where(np.isnan(beta), math.nan, np.where(beta > 0, d**2, math.inf))
