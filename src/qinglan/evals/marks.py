"""What the figures are made of: dots with intervals, bands, levels, names at the ends of lines, row labels, axes."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qinglan.core.run import Measure
from qinglan.evals.drawing import MARKERS, Canvas, ink
from qinglan.evals.formatting import (
    NOT_MEASURED,
    is_finite,
    is_percent,
    visible,
    write_interval,
    write_number,
    write_value,
)

ROUND_STEPS = [1, 2, 2.5, 5, 10]
DASHED, DOTTED = (0, (3, 3)), (0, (1, 2.5))


def ends_of(measure: Measure) -> tuple[float, float] | None:
    """Return both ends of the interval, or None if one is not known."""
    return (measure.low, measure.high) if is_finite(measure.low) and is_finite(measure.high) else None


def note(axes: Axes, text: str, spot: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Write text at `spot` in data coordinates, moved by `offset` pixels; it may stand outside the axes."""
    style = {"fontsize": 11, "annotation_clip": False, **style}
    axes.annotate(visible(text), spot, offset, textcoords="offset points", **style)


def interval_dot(axes: Axes, measure: Measure, y: float, colour: str, size: float = 7.5) -> None:
    """Draw a dot and its 95% interval on a horizontal line; say so if there is nothing to draw."""
    if not is_finite(measure.value):
        left = axes.get_xlim()[0]
        axes.text(left, y, f" {NOT_MEASURED}", color=ink("muted"), fontsize=11, va="center", style="italic")
        return
    if ends := ends_of(measure):
        axes.plot(ends, [y, y], color=ink(colour), linewidth=size / 3, alpha=0.55, solid_capstyle="round")
    _dot(axes, measure.value, y, colour, size)


def interval_point(axes: Axes, x: float, measure: Measure, colour: str) -> None:
    """Draw a dot and its 95% interval on a vertical line; nothing if it was not measured."""
    if not is_finite(measure.value):
        return
    if ends := ends_of(measure):
        axes.plot([x, x], ends, color=ink(colour), linewidth=1.8, alpha=0.5, solid_capstyle="round")
    _dot(axes, x, measure.value, colour, 6)


def _dot(axes: Axes, x: float, y: float, colour: str, size: float) -> None:
    axes.plot([x], [y], marker=MARKERS[colour], markersize=size, color=ink(colour), markeredgewidth=0, clip_on=False)


def band(axes: Axes, measure: Measure, top: float, bottom: float, colour: str) -> None:
    """Draw a measure as a vertical line through a row, with its interval as a shade."""
    if not is_finite(measure.value):
        return
    if ends := ends_of(measure):
        axes.fill_betweenx([top, bottom], *ends, color=ink(colour), alpha=0.2, linewidth=0)
    axes.plot([measure.value] * 2, [top, bottom], color=ink(colour), linewidth=2, solid_capstyle="butt")


def level(sheet: Canvas, axes: Axes, value: float, label: str, top: float) -> None:
    """Draw a dashed vertical line with its name above; `top` is the upper edge of the axes in pixels."""
    axes.axvline(value, color=ink("muted"), linewidth=1.2, linestyle=DASHED)
    low, high = axes.get_xlim()
    box = axes.get_position()
    x = (box.x0 + box.width * (value - low) / (high - low)) * sheet.width
    sheet.text(x, top - 12, label, "muted", fontsize=11, ha="center")


def name_dot(axes: Axes, measure: Measure, y: float, name: str, colour: str, *, always: bool = True) -> bool:
    """Write a series' name beside its interval, on the side where there is room; return whether it stands there.

    Where there is room on neither side it is written only if it must be, on the side with more.
    """
    low, high = axes.get_xlim()
    if not is_finite(measure.value):
        return False
    start, end = ends_of(measure) or (measure.value, measure.value)
    needed = (0.045 * len(name) + 0.06) * (high - low)
    room_left, room_right = start - low, high - end
    if max(room_left, room_right) < needed and not always:
        return False
    goes_right = room_right > needed or room_right > room_left
    spot, offset, align = (end, 9, "left") if goes_right else (start, -9, "right")
    note(axes, name, (spot, y), (offset, 0), color=ink(colour), ha=align, va="center")
    return True


def name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names right of the lines' last points (x, y, name, colour), pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    pixels = axes.get_window_extent().height
    lowest = low
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        at = max(y, lowest)
        lowest = at + 14 * (high - low) / pixels
        note(axes, name, (x, at), (8, 0), color=ink(colour), va="center")


def label_width(labels: Sequence[str], width: float) -> float:
    """Return the pixels that the rows' labels take left of the axes, at most a third of the drawing."""
    longest = max((len(line) for label in labels for line in _label_lines(label, width)), default=0)
    return min(7.2 * longest + 16, 0.34 * width)


def _label_lines(label: str, width: float) -> list[str]:
    return wrap(label, max(10, int(0.34 * width / 7.2)), max_lines=2, placeholder="…") or [""]


def row_label(sheet: Canvas, label: str, middle: float, *, emphasis: bool = False) -> None:
    """Write a row's name at the left edge, on two lines at most."""
    lines = _label_lines(label, sheet.width)
    for place, line in enumerate(lines):
        y = middle + 15 * (place - (len(lines) - 1) / 2)
        sheet.text(0, y, line, fontweight="bold" if emphasis else "normal")


def value_column(
    sheet: Canvas, measure: Measure, middle: float, colour: str, size: float = 12, absent: str = ""
) -> None:
    """Write a value with its interval below it at the right edge, or `absent` if it was not measured."""
    if not is_finite(measure.value):
        sheet.text(sheet.width, middle, absent, "muted", ha="right", fontsize=11, style="italic")
        return
    interval = write_interval(measure)
    value, above = write_value(measure), 0.6 * size if interval else 0
    sheet.text(sheet.width, middle - above, value, colour, ha="right", fontweight="bold", fontsize=size)
    sheet.text(sheet.width, middle + 9, interval, "muted", ha="right", fontsize=11)


def value_limits(measures: Sequence[Measure], reference: float | None, unit: str) -> tuple[float, float]:
    """Return the limits of a value axis that holds all intervals and the reference, with some air."""
    values = [v for m in measures for v in (m.value, m.low, m.high) if is_finite(v)]
    values += [reference] if reference is not None else []
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    if is_percent(unit) and low >= 0 and high <= 1:  # leave room for the dot itself, but none for impossible rates
        return max(low - pad, -0.02), min(high + pad, 1.02)
    return low - pad, high + pad


def value_axis(axes: Axes, unit: str) -> None:
    """Give a chart of rows its horizontal value axis."""
    axes.set_yticks([])
    axes.grid(axis="x", color=ink("rule"), linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=ROUND_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x, unit)))


def frame(axes: Axes, unit: str, num_ticks: int = 4) -> None:
    """Give a chart of lines its two axes; `unit` is that of the vertical one."""
    axes.grid(axis="y", color=ink("rule"), linewidth=0.8)
    for axis, axis_unit in ((axes.xaxis, ""), (axes.yaxis, unit)):
        axis.set_major_locator(MaxNLocator(num_ticks, steps=ROUND_STEPS))
        axis.set_major_formatter(FuncFormatter(lambda v, _, axis_unit=axis_unit: tick(v, axis_unit)))


def tick(value: float, unit: str) -> str:
    """Return the text of one tick."""
    if is_percent(unit):
        return f"{round(100 * value, 6):g}%".replace("-", "−")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k".replace("-", "−")
    return f"{round(value, 9):g}".replace("-", "−")


def gap_bar(axes: Axes, rows: Mapping[str, Measure], y: float, colours: Mapping[str, str]) -> None:
    """Draw the way from floor to ceiling at height `y`, and the part of it that the student has gone.

    Rows stand at heights 0.5, 1.5, ... in the order of `rows`. Nothing is drawn if one of the three was not measured.
    """
    places = {key: place + 0.5 for place, key in enumerate(rows)}
    values = [rows[key].value if key in rows else None for key in ("floor", "student", "ceiling")]
    if not all(is_finite(value) for value in values):
        return
    floor, student, ceiling = (value for value in values if is_finite(value))
    track: dict[str, Any] = {"solid_capstyle": "butt", "linewidth": 9}
    axes.plot([floor, ceiling], [y, y], color=ink("rule"), **track)
    axes.plot([floor, student], [y, y], color=ink(colours["student"]), **track)
    for value, key in ((floor, "floor"), (ceiling, "ceiling")):
        axes.plot([value] * 2, [places[key], y + 0.14], color=ink(colours[key]), linewidth=1, linestyle=DOTTED)


def mark_peak(axes: Axes, fitted: Sequence[tuple[float, float]], colour: str) -> None:
    """Mark where a fitted curve turns down, if it does inside the measured range."""
    place = max(range(len(fitted)), key=lambda i: fitted[i][1])
    if 0 < place < len(fitted) - 1:
        distance, score = fitted[place]
        text = f"turns down at √KL {write_number(distance)}"
        note(axes, text, (distance, score), (0, -12), color=ink(colour), ha="center", va="top")
        axes.axvline(distance, color=ink(colour), linewidth=1, linestyle=DOTTED)


def say_not_measured(sheet: Canvas) -> None:
    """Write in the middle of an empty drawing that there is nothing to draw."""
    sheet.text(sheet.width / 2, sheet.height / 2, NOT_MEASURED, "muted", ha="center", style="italic")
