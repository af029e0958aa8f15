"""The two curves of over-optimisation on the page of an InstructGPT run: PPO, and best of n (Gao et al. 2022)."""

import math
from collections.abc import Sequence

from qinglan.core.run import Measure
from qinglan.evals import figures
from qinglan.evals.figures import ScoreCurve
from qinglan.evals.instruct_gpt import Findings
from qinglan.evals.overoptimization import GoldFit
from qinglan.evals.report import Figure

SCALED = "Gains since the start; the proxy's are scaled to the height of gold's, whose unit the axis has."


def _plain(value: float, n: int) -> Measure:
    return Measure(value, None, None, n)


def rl_figure(rows: Sequence[dict[str, float]], fit: GoldFit | None) -> Figure:
    """Return PPO's gains in proxy and gold score against the square root of KL."""
    moved = sorted((row for row in rows if row["kl"] > 0), key=lambda row: row["kl"])
    start = rows[0]
    distances = [math.sqrt(row["kl"]) for row in moved]
    gold = [_plain(row["gold"] - start["gold"], 1) for row in moved]
    spread = max((abs(row["score"] - start["score"]) for row in moved), default=1.0) or 1.0
    most = max((abs(row["gold"] - start["gold"]) for row in moved), default=1.0)
    proxy = [_plain((row["score"] - start["score"]) * most / spread, 1) for row in moved]
    curves = [ScoreCurve("proxy", distances, proxy), ScoreCurve("gold", distances, gold, _fitted(fit, distances))]
    return Figure(
        "PPO: proxy and gold against distance",
        figures.overoptimization(curves),
        "Gains in proxy (scaled to the height of gold) and gold score against the square root of KL.",
        f"{SCALED} {_coefficients(fit)}",
    )


def best_of_n_figure(found: Findings) -> Figure:
    """Return the gains of best of n by the proxy."""
    assert found.best_of_n is not None
    points = found.best_of_n.points
    distances = [math.sqrt(point.kl) for point in points]
    first = points[0]
    rises = [
        ((point.proxy.value or 0) - (first.proxy.value or 0), (point.gold.value or 0) - (first.gold.value or 0))
        for point in points
    ]
    scale = max((abs(gold) for _, gold in rises), default=1.0) / (
        max((abs(proxy) for proxy, _ in rises), default=1.0) or 1.0
    )
    proxy = [_plain(rise * scale, point.proxy.n) for (rise, _), point in zip(rises, points, strict=True)]
    gold = [_shift(point.gold, first.gold) for point in points]
    fit = found.fits.get("best_of_n")
    curves = [ScoreCurve("proxy", distances, proxy), ScoreCurve("gold", distances, gold, _fitted(fit, distances))]
    return Figure(
        "Best of n by the reward model",
        figures.overoptimization(curves),
        "Gains of best of n over one sample, for n up to the number drawn, in proxy (scaled) and gold score.",
        f"{SCALED} {_coefficients(fit)}",
    )


def _shift(measure: Measure, origin: Measure) -> Measure:
    if measure.value is None or origin.value is None:
        return measure
    low, high = measure.low, measure.high
    return measure._replace(
        value=measure.value - origin.value,
        low=None if low is None else low - origin.value,
        high=None if high is None else high - origin.value,
    )


def _fitted(fit: GoldFit | None, distances: Sequence[float]) -> list[tuple[float, float]]:
    if fit is None or fit.problem or not distances or max(distances) <= 0:
        return []
    grid = [max(distances) * (i + 1) / 40 for i in range(40)]
    return list(zip(grid, fit.predict([d * d for d in grid]).tolist(), strict=True))


def _coefficients(fit: GoldFit | None) -> str:
    if fit is None or fit.problem:
        return f"No fit: {fit.problem}." if fit is not None else "No fit."
    form = "d (alpha - beta d)" if fit.form == "best_of_n" else "d (alpha - beta log d)"
    return f"Gold fitted by {form}: alpha {fit.alpha}, beta {fit.beta}."
