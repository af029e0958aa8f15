"""The figures of a report: each a pure function from plain data to one SVG string.

Every estimate is drawn with its 95% interval, every model has one colour and one shape throughout, and lines are named
where they end instead of in a legend. What was not measured is written as such, never drawn as zero.
"""

from collections.abc import Iterable, Mapping, Sequence
from textwrap import shorten
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import FuncFormatter

from qinglan.core.run import Measure
from qinglan.evals import marks
from qinglan.evals.drawing import WIDTH, Canvas, canvas, ink, series_colours, to_svg
from qinglan.evals.formatting import NOT_MEASURED, is_finite, is_percent, visible, write_number, write_value
from qinglan.evals.metrics import Bin

SUBLINE = 16
"""Height of one dot's line inside a row of several, in pixels."""
ROW = 42
"""Height of a row with one dot, its value and its interval, in pixels."""


class DotRow(NamedTuple):
    """One row of a dot-and-interval chart: a use case, a task or a comparison, with one dot for each series (model)."""

    label: str
    dots: Mapping[str, Measure]


class ScoreCurve(NamedTuple):
    """Proxy or gold score against the distance sqrt(KL) from the starting policy, with points of a fitted curve."""

    name: str
    """ "proxy" or "gold"; the turning point of the gold fit is marked."""
    distances: Sequence[float]
    """sqrt of KL in nats per completion, ascending."""
    scores: Sequence[Measure]
    fitted: Sequence[tuple[float, float]] = ()
    """(distance, score) along the fit, or nothing."""


class Line(NamedTuple):
    """One line of a panel; `low` and `high` draw a band. None and NaN leave a hole."""

    name: str
    steps: Sequence[float]
    values: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


class Panel(NamedTuple):
    """A small chart of lines over steps."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    reference: float | None = None
    """Draws a dotted level, such as the target KL."""


def headline_rows(rows: Mapping[str, Measure], names: Mapping[str, str], *, width: float = 560) -> str:
    """Return the rows that head every report: floor, student, ceiling, and how much of the gap the student recovered.

    `rows` has the keys of `Report.rows`, and further ones by name; `names` says who stands in each. The last line runs
    from floor to ceiling and is filled up to the student.
    """
    shown = {key: row for key, row in rows.items() if key != "gap_recovered"}
    gap = rows.get("gap_recovered")
    unit = _unit_of(shown.values())
    labels = [names.get(key, key) for key in shown] + ([names.get("gap_recovered", "gap recovered")] if gap else [])
    step, top, left = 54.0, 6.0, marks.label_width(labels, width)
    with canvas(width, top + step * len(labels) + 24) as sheet:
        axes = sheet.axes(left, top, width - left - 104, step * len(labels))
        axes.set_xlim(*marks.value_limits(list(shown.values()), None, unit))
        axes.set_ylim(len(labels), 0)
        marks.value_axis(axes, unit)
        colours = series_colours(list(shown))
        for place, (key, row) in enumerate(shown.items()):
            middle = top + step * (place + 0.5)
            marks.row_label(sheet, labels[place], middle, emphasis=key == "student")
            marks.interval_dot(axes, row, place + 0.5, colours[key], size=10)
            marks.value_column(sheet, row, middle, colours[key], size=17)
        if gap is not None:
            marks.gap_bar(axes, shown, len(shown) + 0.5, colours)
            marks.row_label(sheet, labels[-1], top + step * (len(shown) + 0.5))
            marks.value_column(sheet, gap, top + step * (len(shown) + 0.5), "ink", size=17, absent=NOT_MEASURED)
        return to_svg(sheet)


def dot_rows(
    rows: Sequence[DotRow], *, reference: float | None = None, reference_label: str = "", width: float = WIDTH
) -> str:
    """Return rows of dots with intervals: gold score by use case and model, or win rates with a line at one half."""
    return _rows_chart(rows, reference, reference_label, width, before="")


def before_after(rows: Sequence[DotRow], before: str, *, width: float = WIDTH) -> str:
    """Return rows in which the series `before` is a band that the others are compared with (alignment tax)."""
    return _rows_chart(rows, None, "", width, before=before)


def _rows_chart(
    rows: Sequence[DotRow], reference: float | None, reference_label: str, width: float, before: str
) -> str:
    """Draw rows of dots; with one series each row is one line, else each series has its own line inside the row."""
    names = list(dict.fromkeys(name for row in rows for name in row.dots))
    drawn = [name for name in names if name != before]
    unit = _unit_of(measure for row in rows for measure in row.dots.values())
    step = ROW if len(drawn) <= 1 else SUBLINE * len(drawn) + 12.0
    top, left = 26.0 if reference_label or before else 6.0, marks.label_width([row.label for row in rows], width)
    value_width, tall = 104.0 if len(drawn) <= 1 else 60.0, step * max(1, len(rows))
    with canvas(width, top + tall + 24) as sheet:
        axes = sheet.axes(left, top, width - left - value_width, tall)
        axes.set_xlim(*marks.value_limits([m for row in rows for m in row.dots.values()], reference, unit))
        axes.set_ylim(tall, 0)
        marks.value_axis(axes, unit)
        colours, unnamed = series_colours(names), set(drawn) if len(names) > 1 else set()
        for place, row in enumerate(rows):
            middle = step * (place + 0.5)
            if place:
                axes.axhline(step * place, color=ink("rule"), linewidth=0.8)
            marks.row_label(sheet, row.label, top + middle)
            if before in row.dots:
                marks.band(axes, row.dots[before], step * place + 5, step * (place + 1) - 5, colours[before])
            for order, name in enumerate(drawn):
                if name not in row.dots:
                    continue
                line, measure = middle + SUBLINE * (order - (len(drawn) - 1) / 2), row.dots[name]
                marks.interval_dot(axes, measure, line, colours[name])
                if len(drawn) == 1:
                    marks.value_column(sheet, measure, top + line, colours[name])
                elif is_finite(measure.value):
                    sheet.text(width, top + line, write_value(measure), colours[name], ha="right", fontsize=11)
                if name in unnamed:
                    is_last = not any(name in later.dots for later in rows[place + 1 :])
                    if marks.name_dot(axes, measure, line, name, colours[name], always=is_last):
                        unnamed.discard(name)
        if reference is not None:
            marks.level(sheet, axes, reference, reference_label, top)
        if before:
            sheet.text(left, 10, f"upright line: {before}", colours.get(before, "base"), fontsize=11)
        if not rows:
            marks.say_not_measured(sheet)
        return to_svg(sheet)


def agreement_bars(measures: Mapping[str, Measure], *, chance: float | None = 0.5, width: float = WIDTH) -> str:
    """Return horizontal bars from zero with intervals, and a line at what chance gives."""
    unit = _unit_of(measures.values())
    top, left = 26.0 if chance is not None else 6.0, marks.label_width(list(measures), width)
    tall = float(ROW * max(1, len(measures)))
    with canvas(width, top + tall + 24) as sheet:
        axes = sheet.axes(left, top, width - left - 104, tall)
        ends = [v for m in measures.values() for v in (m.value, m.high) if is_finite(v)]
        axes.set_xlim(0, max([1.0 if is_percent(unit) else 0.0, *ends]) or 1.0)
        axes.set_ylim(len(measures) or 1, 0)
        marks.value_axis(axes, unit)
        for place, (name, measure) in enumerate(measures.items()):
            colour = "ceiling" if name.startswith("labeler") else "proxy" if name.startswith("reward") else "base"
            middle = top + ROW * (place + 0.5)
            marks.row_label(sheet, name, middle)
            if is_finite(measure.value):
                axes.barh(place + 0.5, measure.value, height=0.42, color=ink(colour), alpha=0.25, linewidth=0)
            marks.interval_dot(axes, measure, place + 0.5, colour)
            marks.value_column(sheet, measure, middle, colour)
        if chance is not None:
            marks.level(sheet, axes, chance, "chance", top)
        if not measures:
            marks.say_not_measured(sheet)
        return to_svg(sheet)


def overoptimization(curves: Sequence[ScoreCurve], *, width: float = WIDTH) -> str:
    """Return scores against sqrt(KL) with their fits (Gao et al. 2022); where the gold fit turns down is marked."""
    height, unit = 270.0, _unit_of(score for curve in curves for score in curve.scores)
    with canvas(width, height) as sheet:
        axes = sheet.axes(40, 24, width - 40 - 56, height - 24 - 44)
        colours = series_colours([curve.name for curve in curves])
        ends: list[tuple[float, float, str, str]] = []
        for curve in curves:
            colour = colours[curve.name]
            for distance, score in zip(curve.distances, curve.scores, strict=True):
                marks.interval_point(axes, distance, score, colour)
            line = curve.fitted or zip(curve.distances, (score.value for score in curve.scores), strict=True)
            finite = [(d, s) for d, s in line if is_finite(s)]
            if finite:
                style = "-" if curve.fitted else ":"
                axes.plot(*zip(*finite, strict=True), color=ink(colour), linewidth=1.8, linestyle=style)
                ends.append((finite[-1][0], finite[-1][1], curve.name, colour))
            if curve.name == "gold" and curve.fitted and finite:
                marks.mark_peak(axes, finite, colour)
        if not ends:
            axes.set_axis_off()
            marks.say_not_measured(sheet)
            return to_svg(sheet)
        axes.margins(x=0.03, y=0.12)
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])  # room for a dot at the start
        marks.frame(axes, unit, num_ticks=5)
        marks.name_ends(axes, ends)
        sheet.text(
            0,
            10,
            f"score ({unit})" if unit not in ("", "score") and not is_percent(unit) else "score",
            "muted",
            fontsize=11,
        )
        sheet.text(40, height - 8, "√KL from the starting policy (√nats per completion)", "muted", fontsize=11)
        return to_svg(sheet)


def reliability(bins: Sequence[Bin], *, counted: str = "pairs", width: float = WIDTH) -> str:
    """Return predicted against observed probability, with the number of `counted` in each bin below.

    The axes begin at one half if no bin lies below it, as for the side that the scores prefer.
    """
    height, largest = 340.0, max((b.observed.n for b in bins), default=0)
    lowest = 0.5 if bins and min(b.low for b in bins) >= 0.5 else 0.0
    with canvas(width, height) as sheet:
        axes, counts = sheet.axes(44, 24, width - 64, 210), sheet.axes(44, 246, width - 64, 48)
        for part in (axes, counts):
            part.set_xlim(lowest, 1)
            part.xaxis.set_major_formatter(FuncFormatter(lambda x, _: marks.tick(x, "rate")))
        bottom = marks.value_limits([b.observed for b in bins], lowest, "rate")[0]
        axes.set_ylim(min(bottom, lowest - 0.02), 1.02)
        axes.plot([0, 1], [0, 1], color=ink("muted"), linewidth=1, linestyle=marks.DASHED)
        where = axes.transAxes
        axes.text(
            0.98, 0.05, "dashed: perfect calibration", color=ink("muted"), fontsize=11, ha="right", transform=where
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: marks.tick(y, "rate")))
        axes.grid(color=ink("rule"), linewidth=0.8)
        axes.tick_params(labelbottom=False)
        for group in bins:
            marks.interval_point(axes, group.mean_predicted, group.observed, "proxy")
            middle, wide = (group.low + group.high) / 2, 0.8 * (group.high - group.low)
            counts.bar(middle, group.observed.n, width=wide, color=ink("proxy"), alpha=0.28, linewidth=0)
            if group.observed.n and len(bins) <= 12:
                label, spot = write_number(group.observed.n), (middle, group.observed.n)
                marks.note(counts, label, spot, (0, 3), ha="center", fontsize=10, color=ink("muted"))
        counts.set_ylim(0, 1.45 * largest or 1)
        counts.set_yticks([])
        if largest == 0:
            marks.say_not_measured(sheet)
        sheet.text(0, 10, "observed share, with 95% interval", "muted", fontsize=11)
        sheet.text(0, 282, counted, "muted", fontsize=11)
        sheet.text(44, height - 10, "predicted probability", "muted", fontsize=11)
        return to_svg(sheet)


def accuracy_by_gap(bins: Mapping[str, Measure], *, agreement: Measure | None = None, width: float = WIDTH) -> str:
    """Return the reward model's pair accuracy by score gap ("0 to 0.5", ...), with the labelers' agreement."""
    height, count = 270.0, len(bins)
    with canvas(width, height) as sheet:
        axes = sheet.axes(44, 24, width - 44 - (60 if agreement is not None else 20), height - 24 - 62)
        measured = [m for m in bins.values() if is_finite(m.value)]
        if not measured:
            axes.set_axis_off()
            marks.say_not_measured(sheet)
            return to_svg(sheet)
        for place, measure in enumerate(bins.values()):
            marks.interval_point(axes, place, measure, "proxy")
        axes.set_ylim(marks.value_limits(measured, 0.45, "rate")[0], 1.02)
        axes.set_xlim(-0.5, count - 0.5)
        axes.axhline(0.5, color=ink("muted"), linewidth=1.2, linestyle=marks.DASHED)
        axes.text(count - 0.52, 0.505, "chance", color=ink("muted"), fontsize=11, ha="right", va="bottom")
        if agreement is not None and is_finite(agreement.value):
            if ends := marks.ends_of(agreement):
                axes.axhspan(*ends, color=ink("ceiling"), alpha=0.14, linewidth=0)
            axes.axhline(agreement.value, color=ink("ceiling"), linewidth=1.4)
            marks.name_ends(axes, [(count - 0.5, agreement.value, "labelers\nagree", "ceiling")])
        axes.grid(axis="y", color=ink("rule"), linewidth=0.8)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: marks.tick(y, "rate")))
        ticks = [f"{visible(label)}\nn={write_number(m.n)}" for label, m in bins.items()]
        axes.set_xticks(range(count), ticks, fontsize=10.5 if count <= 6 else 9)
        sheet.text(0, 10, "pairs ordered as the labelers did", "muted", fontsize=11)
        sheet.text(44, height - 10, "difference of the two scores (logits)", "muted", fontsize=11)
        return to_svg(sheet)


def training_curves(panels: Sequence[Panel], *, xlabel: str = "iteration", width: float = WIDTH) -> str:
    """Return small charts of lines over steps, two beside each other: KL, score, gold, entropy, length, losses."""
    columns = min(2, len(panels)) or 1
    cell_width, cell_height = (width - 24 * (columns - 1)) / columns, 158.0 if columns > 1 else 220.0
    num_rows = -(-len(panels) // columns) or 1
    with canvas(width, num_rows * (cell_height + 12) + 12) as sheet:
        for place, panel in enumerate(panels):
            left, top = (place % columns) * (cell_width + 24), (place // columns) * (cell_height + 12)
            _panel(sheet, panel, left, top, cell_width, cell_height)
        if not panels:
            marks.say_not_measured(sheet)
        sheet.text(34, sheet.height - 7, xlabel, "muted", fontsize=11)
        return to_svg(sheet)


def _panel(sheet: Canvas, panel: Panel, left: float, top: float, width: float, height: float) -> None:
    sheet.text(left, top + 10, shorten(panel.title, int(width / 7.2), placeholder="…"), fontweight="bold")
    sheet.text(left, top + 26, "" if is_percent(panel.unit) else panel.unit, "muted", fontsize=11)
    longest = max((len(line.name) for line in panel.lines), default=0) if len(panel.lines) > 1 else 5
    axes = sheet.axes(left + 34, top + 40, width - 34 - min(90.0, 10 + 6.6 * longest), height - 40 - 20)
    colours = series_colours([line.name for line in panel.lines])
    ends: list[tuple[float, float, str, str]] = []
    for line in panel.lines:
        values, colour = _numbers(line.values), colours[line.name]
        if line.low is not None and line.high is not None:
            axes.fill_between(
                line.steps, _numbers(line.low), _numbers(line.high), color=ink(colour), alpha=0.16, linewidth=0
            )
        finite = np.flatnonzero(np.isfinite(values))
        if finite.size:
            axes.plot(line.steps, values, color=ink(colour), linewidth=1.8, marker="o" if finite.size == 1 else None)
            last = float(values[finite[-1]])
            name = line.name if len(panel.lines) > 1 else write_number(last, panel.unit)
            ends.append((float(line.steps[finite[-1]]), last, name, colour))
    if not ends:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, NOT_MEASURED, color=ink("muted"), ha="center", style="italic", transform=axes.transAxes)
        return
    if panel.reference is not None:
        axes.axhline(panel.reference, color=ink("muted"), linewidth=1.2, linestyle=marks.DOTTED)
    axes.margins(x=0.02, y=0.12)
    marks.frame(axes, panel.unit, num_ticks=3)
    marks.name_ends(axes, ends)


def _unit_of(measures: Iterable[Measure]) -> str:
    return next((measure.unit for measure in measures if is_finite(measure.value)), "")


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)
