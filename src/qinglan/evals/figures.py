"""The figures of a report: each a pure function from plain data to one SVG string.

Every estimate is drawn with its 95% interval, every model has one colour and one shape throughout, and lines are named
where they end instead of in a legend. What was not measured is written as such, never drawn as zero.
"""

from collections.abc import Mapping, Sequence
from textwrap import shorten, wrap
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qinglan.core.run import Measure
from qinglan.evals.drawing import MARKERS, WIDTH, Canvas, canvas, ink, series_colours, to_svg
from qinglan.evals.formatting import (
    NOT_MEASURED,
    is_finite,
    is_percent,
    write_interval,
    write_number,
    write_value,
)

SUBLINE = 16
"""Height of one dot's line inside a row, in pixels."""


class DotRow(NamedTuple):
    """One row of a dot-and-interval chart: a use case, a task or a model, with one dot for each series."""

    label: str
    dots: Mapping[str, Measure]


class ScoreCurve(NamedTuple):
    """Proxy or gold score against the distance sqrt(KL) from the starting policy, with points of a fitted curve."""

    name: str
    distances: Sequence[float]
    """sqrt of KL in nats per completion, ascending."""
    scores: Sequence[Measure]
    fitted: Sequence[tuple[float, float]] = ()
    """(distance, score) along the fit, or nothing."""


class ReliabilityBin(NamedTuple):
    """Pairs whose predicted probability fell into one bin; `observed` holds the share that came true and its n."""

    predicted: float
    observed: Measure


class Line(NamedTuple):
    """One line of a panel; `low` and `high` draw a band."""

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


def dot_rows(
    rows: Sequence[DotRow],
    *,
    unit: str = "",
    reference: float | None = None,
    reference_label: str = "",
    width: float = WIDTH,
) -> str:
    """Return rows of dots with intervals: headline rows, gold score by use case, win rates with a line at one half."""
    return _rows_chart(rows, unit, reference, reference_label, width, before="")


def before_after(rows: Sequence[DotRow], before: str, *, unit: str = "", width: float = WIDTH) -> str:
    """Return rows in which the series `before` is a band that the others are compared with (alignment tax)."""
    return _rows_chart(rows, unit, None, "", width, before=before)


def agreement_bars(
    measures: Mapping[str, Measure], *, unit: str = "rate", chance: float | None = 0.5, width: float = WIDTH
) -> str:
    """Return horizontal bars with intervals, from zero, with a line at what chance gives."""
    left, top, step = 168.0, 20.0, 32.0
    height = top + step * max(1, len(measures)) + 28
    with canvas(width, height) as sheet:
        axes = sheet.axes(left, top, width - left - 104, step * max(1, len(measures)))
        ends = [v for m in measures.values() for v in (m.value, m.high) if v is not None and is_finite(v)]
        axes.set_xlim(0, max([1.0 if is_percent(unit) else 0.0, *ends]) or 1.0)
        axes.set_ylim(len(measures) or 1, 0)
        _value_axis(axes, unit)
        colours = series_colours(list(measures))
        for place, (name, measure) in enumerate(measures.items()):
            middle = top + step * (place + 0.5)
            _row_label(sheet, name, left, middle)
            if measure.value is not None and is_finite(measure.value):
                colour = ink(colours[name])
                axes.barh(place + 0.5, measure.value, height=0.46, color=colour, alpha=0.28, linewidth=0)
                _interval(axes, measure, place + 0.5, colours[name])
            _value_column(sheet, measure, width, middle, "ink")
        if chance is not None:
            _level(sheet, axes, chance, "chance", top)
        return to_svg(sheet)


def overoptimization(curves: Sequence[ScoreCurve], *, unit: str = "", width: float = WIDTH) -> str:
    """Return scores against sqrt(KL) with their fits (Gao et al. 2022); the gold fit's inner peak is marked."""
    height = 270.0
    with canvas(width, height) as sheet:
        axes = sheet.axes(46, 24, width - 46 - 76, height - 24 - 44)
        colours = series_colours([curve.name for curve in curves])
        ends: list[tuple[float, float, str, str]] = []
        for curve in curves:
            colour = colours[curve.name]
            for distance, score in zip(curve.distances, curve.scores, strict=True):
                _point(axes, distance, score, colour)
            line = curve.fitted or [(d, s.value) for d, s in zip(curve.distances, curve.scores, strict=True)]
            finite = [(d, s) for d, s in line if s is not None and is_finite(s)]
            if finite:
                style = "-" if curve.fitted else ":"
                axes.plot(*zip(*finite, strict=True), color=ink(colour), linewidth=1.8, linestyle=style)
                ends.append((finite[-1][0], finite[-1][1], curve.name, colour))
            if curve.name == "gold" and curve.fitted:
                _mark_peak(axes, finite)
        if not ends:
            _say_not_measured(sheet)
            return to_svg(sheet)
        axes.margins(x=0.03, y=0.12)
        axes.set_xlim(left=0)
        _frame(axes, unit)
        _end_labels(axes, ends)
        sheet.text(0, 10, f"score{_in_unit(unit)}", "muted", fontsize=11)
        sheet.text(46, height - 8, "√KL from the starting policy (√nats per completion)", "muted", fontsize=11)
        return to_svg(sheet)


def reliability(bins: Sequence[ReliabilityBin], *, width: float = WIDTH) -> str:
    """Return predicted against observed probability, with the count of each bin below."""
    height = 340.0
    with canvas(width, height) as sheet:
        axes = sheet.axes(50, 24, width - 70, 210)
        counts = sheet.axes(50, 246, width - 70, 48)
        for part in (axes, counts):
            part.set_xlim(0, 1)
            part.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f}%"))
        axes.set_ylim(-0.02, 1.02)
        axes.plot([0, 1], [0, 1], color=ink("muted"), linewidth=1, linestyle=(0, (3, 3)))
        axes.text(0.97, 0.90, "perfect", color=ink("muted"), fontsize=11, ha="right")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))
        axes.grid(color=ink("rule"), linewidth=0.8)
        axes.tick_params(labelbottom=False)
        largest = max((b.observed.n for b in bins), default=0)
        for group in bins:
            _point(axes, group.predicted, group.observed, "proxy")
            counts.bar(group.predicted, group.observed.n, width=0.055, color=ink("proxy"), alpha=0.28, linewidth=0)
            if group.observed.n:
                spot = (group.predicted, group.observed.n)
                label = write_number(group.observed.n)
                counts.annotate(label, spot, (0, 3), textcoords="offset points", ha="center", fontsize=10, color=ink("muted"))
        counts.set_ylim(0, 1.45 * largest or 1)
        counts.set_yticks([])
        if largest == 0:
            _say_not_measured(sheet)
        sheet.text(0, 10, "observed: share of pairs where labelers agreed with the model", "muted", fontsize=11)
        sheet.text(0, 282, "pairs", "muted", fontsize=11)
        sheet.text(50, height - 10, "predicted probability that the first completion is better", "muted", fontsize=11)
        return to_svg(sheet)


def accuracy_by_gap(
    bins: Sequence[tuple[str, Measure]], *, agreement: Measure | None = None, width: float = WIDTH
) -> str:
    """Return the reward model's pair accuracy by score gap (labels such as "0 to 0.5"), with the labelers' agreement."""
    height = 270.0
    with canvas(width, height) as sheet:
        right = 84 if agreement is not None else 24
        axes = sheet.axes(46, 24, width - 46 - right, height - 24 - 62)
        for place, (_, measure) in enumerate(bins):
            _point(axes, place, measure, "proxy")
        measured = [m for _, m in bins if is_finite(m.value)]
        if not measured:
            _say_not_measured(sheet)
            return to_svg(sheet)
        lows = [m.low if m.low is not None else m.value for m in measured]
        axes.set_ylim(min(0.45, *(low for low in lows if low is not None and is_finite(low)), 0.45) - 0.03, 1.03)
        axes.set_xlim(-0.5, len(bins) - 0.5)
        axes.axhline(0.5, color=ink("muted"), linewidth=1, linestyle=(0, (3, 3)))
        axes.text(len(bins) - 0.52, 0.505, "chance", color=ink("muted"), fontsize=11, ha="right", va="bottom")
        if agreement is not None and agreement.value is not None and is_finite(agreement.value):
            if agreement.low is not None and agreement.high is not None:
                axes.axhspan(agreement.low, agreement.high, color=ink("ceiling"), alpha=0.14, linewidth=0)
            axes.axhline(agreement.value, color=ink("ceiling"), linewidth=1.4)
            _end_labels(axes, [(len(bins) - 0.5, agreement.value, "labelers\nagree", "ceiling")])
        axes.grid(axis="y", color=ink("rule"), linewidth=0.8)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))
        ticks = [f"{label}\nn={write_number(m.n)}" for label, m in bins]
        axes.set_xticks(range(len(bins)), ticks, fontsize=10.5 if len(bins) <= 6 else 9)
        sheet.text(0, 10, "pairs ordered as the labelers did", "muted", fontsize=11)
        sheet.text(46, height - 10, "difference of the two scores (logits)", "muted", fontsize=11)
        return to_svg(sheet)


def training_curves(panels: Sequence[Panel], *, xlabel: str = "iteration", width: float = WIDTH) -> str:
    """Return small charts of lines over steps, two beside each other: KL, score, gold, entropy, length, losses."""
    columns = min(2, len(panels)) or 1
    cell_width, cell_height = (width - 22 * (columns - 1)) / columns, 146.0 if columns > 1 else 210.0
    num_rows = -(-len(panels) // columns) or 1
    with canvas(width, num_rows * (cell_height + 10) + 18) as sheet:
        for place, panel in enumerate(panels):
            left = (place % columns) * (cell_width + 22)
            top = (place // columns) * (cell_height + 10)
            _panel(sheet, panel, left, top, cell_width, cell_height)
        if not panels:
            _say_not_measured(sheet)
        sheet.text(width, sheet.height - 8, xlabel, "muted", fontsize=11, ha="right")
        return to_svg(sheet)


def _panel(sheet: Canvas, panel: Panel, left: float, top: float, width: float, height: float) -> None:
    title = shorten(panel.title, 34, placeholder="…")
    sheet.text(left, top + 10, title, fontweight="bold")
    if panel.unit and not is_percent(panel.unit):
        sheet.text(left + 7.4 * len(title) + 8, top + 10, panel.unit, "muted", fontsize=11)
    longest = max((len(line.name) for line in panel.lines), default=0) if len(panel.lines) > 1 else 5
    margin = min(90.0, 10 + 6.6 * longest)
    axes = sheet.axes(left + 34, top + 26, width - 34 - margin, height - 26 - 20)
    colours = series_colours([line.name for line in panel.lines])
    ends: list[tuple[float, float, str, str]] = []
    for line in panel.lines:
        values = np.array([np.nan if v is None else v for v in line.values], dtype=float)
        if line.low is not None and line.high is not None:
            low, high = (np.array([np.nan if v is None else v for v in b], dtype=float) for b in (line.low, line.high))
            axes.fill_between(line.steps, low, high, color=ink(colours[line.name]), alpha=0.16, linewidth=0)
        finite = np.flatnonzero(np.isfinite(values))
        if finite.size:
            marker = "o" if finite.size == 1 else None
            axes.plot(line.steps, values, color=ink(colours[line.name]), linewidth=1.8, marker=marker)
            last = float(values[finite[-1]])
            name = line.name if len(panel.lines) > 1 else write_number(last, panel.unit)
            ends.append((float(line.steps[finite[-1]]), last, name, colours[line.name]))
    if not ends:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, NOT_MEASURED, color=ink("muted"), ha="center", transform=axes.transAxes)
        return
    if panel.reference is not None:
        axes.axhline(panel.reference, color=ink("muted"), linewidth=1, linestyle=(0, (1, 3)))
    axes.margins(x=0.02, y=0.12)
    _frame(axes, panel.unit, num_ticks=3)
    _end_labels(axes, ends)


def _rows_chart(
    rows: Sequence[DotRow], unit: str, reference: float | None, reference_label: str, width: float, before: str
) -> str:
    """Draw rows of dots; with one series each row is one line, else each series has its own line inside the row."""
    names = list(dict.fromkeys(name for row in rows for name in row.dots))
    drawn = [name for name in names if name != before]
    step = 36.0 if len(drawn) <= 1 else SUBLINE * len(drawn) + 12.0
    left, top, value_column = (168.0 if width >= WIDTH else 128.0), 26.0, (104.0 if len(drawn) <= 1 else 58.0)
    height = top + step * max(1, len(rows)) + 26
    with canvas(width, height) as sheet:
        axes = sheet.axes(left, top, width - left - value_column, step * max(1, len(rows)))
        axes.set_xlim(*_limits([m for row in rows for m in row.dots.values()], reference, unit))
        axes.set_ylim(step * max(1, len(rows)), 0)
        _value_axis(axes, unit)
        colours, unnamed = series_colours(names), set(drawn) if len(names) > 1 else set()
        for place, row in enumerate(rows):
            middle = step * (place + 0.5)
            if place:
                axes.axhline(step * place, color=ink("rule"), linewidth=0.8)
            _row_label(sheet, row.label, left, top + middle)
            if before in row.dots:
                _band(axes, row.dots[before], step * place + 5, step * (place + 1) - 5, colours[before])
            for order, name in enumerate(drawn):
                if name not in row.dots:
                    continue
                line = middle + SUBLINE * (order - (len(drawn) - 1) / 2)
                measure = row.dots[name]
                _interval(axes, measure, line, colours[name])
                if len(drawn) > 1:
                    _sub_value(sheet, measure, width, top + line, colours[name])
                else:
                    _value_column(sheet, measure, width, top + line, colours[name] if not before else "ink")
                if name in unnamed and is_finite(measure.value):
                    _name_dot(axes, measure, line, name, colours[name])
                    unnamed.discard(name)
        if reference is not None:
            _level(sheet, axes, reference, reference_label, top)
        if before:
            sheet.text(left, 10, f"│ {before}, with its interval", colours.get(before, "base"), fontsize=11)
        return to_svg(sheet)


def _limits(measures: Sequence[Measure], reference: float | None, unit: str) -> tuple[float, float]:
    values = [v for m in measures for v in m[:3] if isinstance(v, int | float) and is_finite(v)]
    values += [reference] if reference is not None else []
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    if is_percent(unit):  # a rate cannot leave [0, 1]; leave room for the dot itself
        return max(low - pad, -0.02), min(high + pad, 1.02)
    return low - pad, high + pad


def _value_axis(axes: Axes, unit: str) -> None:
    axes.set_yticks([])
    axes.grid(axis="x", color=ink("rule"), linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x, unit)))


def _frame(axes: Axes, unit: str, num_ticks: int = 4) -> None:
    axes.grid(axis="y", color=ink("rule"), linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y, unit)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x, "")))


def _tick(value: float, unit: str) -> str:
    if is_percent(unit):
        return f"{round(100 * value, 6):g}%"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{round(value, 9):g}".replace("-", "−")


def _in_unit(unit: str) -> str:
    return f" ({unit})" if unit and not is_percent(unit) else ""


def _interval(axes: Axes, measure: Measure, y: float, colour: str) -> None:
    """Draw a dot and its 95% interval on a horizontal line; say so if there is nothing to draw."""
    if measure.value is None or not is_finite(measure.value):
        left = axes.get_xlim()[0]
        axes.text(left, y, f" {NOT_MEASURED}", color=ink("muted"), fontsize=11, va="center", style="italic")
        return
    if measure.low is not None and measure.high is not None and is_finite(measure.low) and is_finite(measure.high):
        axes.plot([measure.low, measure.high], [y, y], color=ink(colour), linewidth=2.4, alpha=0.55, solid_capstyle="round")
    axes.plot([measure.value], [y], marker=MARKERS[colour], markersize=7.5, color=ink(colour), markeredgewidth=0, clip_on=False)


def _point(axes: Axes, x: float, measure: Measure, colour: str) -> None:
    if measure.value is None or not is_finite(measure.value):
        return
    if measure.low is not None and measure.high is not None and is_finite(measure.low) and is_finite(measure.high):
        axes.plot([x, x], [measure.low, measure.high], color=ink(colour), linewidth=1.6, alpha=0.5, solid_capstyle="round")
    axes.plot([x], [measure.value], marker=MARKERS[colour], markersize=6, color=ink(colour), markeredgewidth=0, clip_on=False)


def _band(axes: Axes, measure: Measure, top: float, bottom: float, colour: str) -> None:
    if measure.value is None or not is_finite(measure.value):
        return
    if measure.low is not None and measure.high is not None:
        axes.fill_betweenx([top, bottom], measure.low, measure.high, color=ink(colour), alpha=0.2, linewidth=0)
    axes.plot([measure.value] * 2, [top, bottom], color=ink(colour), linewidth=2, solid_capstyle="butt")


def _level(sheet: Canvas, axes: Axes, value: float, label: str, top: float) -> None:
    """Draw a dashed vertical line with its name above."""
    axes.axvline(value, color=ink("muted"), linewidth=1.2, linestyle=(0, (3, 3)))
    if label:
        low, high = axes.get_xlim()
        box = axes.get_position()
        x = (box.x0 + box.width * (value - low) / (high - low)) * sheet.width
        sheet.text(x, top - 12, label, "muted", fontsize=11, ha="center")


def _row_label(sheet: Canvas, label: str, left: float, middle: float) -> None:
    """Write a row's name right-aligned before the axes, on two lines at most."""
    lines = wrap(label, max(12, int((left - 14) / 6.9))) or [""]
    if len(lines) > 2:
        lines = [lines[0], lines[1][:-1] + "…"]
    lines = [shorten_word(line, int((left - 14) / 6.4)) for line in lines]
    for place, line in enumerate(lines):
        sheet.text(left - 14, middle + 15 * (place - (len(lines) - 1) / 2), line, ha="right")


def shorten_word(text: str, max_characters: int) -> str:
    """Return the text, cut with an ellipsis if it is longer than `max_characters`."""
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


def _value_column(sheet: Canvas, measure: Measure, width: float, middle: float, colour: str) -> None:
    if not is_finite(measure.value):
        return
    interval = write_interval(measure)
    sheet.text(width, middle - (8 if interval else 0), write_value(measure), colour, ha="right", fontweight="bold")
    sheet.text(width, middle + 8, interval, "muted", ha="right", fontsize=11)


def _sub_value(sheet: Canvas, measure: Measure, width: float, middle: float, colour: str) -> None:
    if is_finite(measure.value):
        sheet.text(width, middle, write_value(measure), colour, ha="right", fontsize=11)


def _name_dot(axes: Axes, measure: Measure, y: float, name: str, colour: str) -> None:
    """Write the series' name beside its interval, on the side where there is room."""
    low, high = axes.get_xlim()
    start, end = (v if v is not None and is_finite(v) else measure.value for v in (measure.low, measure.high))
    fits_right = end is not None and (high - end) / (high - low) > 0.045 * len(name) + 0.06
    spot, offset = (end, 9) if fits_right else (start, -9)
    align = "left" if fits_right else "right"
    style = {"textcoords": "offset points", "ha": align, "va": "center", "fontsize": 11}
    axes.annotate(name, (spot, y), (offset, 0), color=ink(colour), annotation_clip=False, **style)


def _end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names right of the lines' last points, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    box = axes.get_position()
    pixels = box.height * axes.figure.get_size_inches()[1] * 72
    apart = 14 * (high - low) / pixels
    placed: list[float] = []
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        at = max(y, placed[-1] + apart) if placed else y
        placed.append(at)
        style = {"textcoords": "offset points", "va": "center", "fontsize": 11}
        axes.annotate(name, (x, at), (8, 0), color=ink(colour), annotation_clip=False, **style)


def _mark_peak(axes: Axes, fitted: Sequence[tuple[float, float]]) -> None:
    """Mark where the gold fit turns down, if it does inside the measured range."""
    place = max(range(len(fitted)), key=lambda i: fitted[i][1])
    if 0 < place < len(fitted) - 1:
        distance, score = fitted[place]
        axes.plot([distance], [score], marker="o", markersize=11, color="none", markeredgecolor=ink("gold"), markeredgewidth=1.4)
        style = {"textcoords": "offset points", "ha": "center", "fontsize": 11, "color": ink("gold")}
        axes.annotate(f"gold peaks at {write_number(distance)}", (distance, score), (0, 12), **style)


def _say_not_measured(sheet: Canvas) -> None:
    sheet.text(sheet.width / 2, sheet.height / 2, NOT_MEASURED, "muted", ha="center", style="italic")
