"""The report page: one self-contained HTML file for a reader new to the run, and its short form for terminals.

The page opens offline (style and figures are inline, there are no scripts and no addresses), follows the reader's light
or dark mode, fits a phone and prints. Text written by models is escaped by the template engine and never trusted as
markup. Numbers stand with their 95% interval and n; what was not measured says so.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import jinja2
from markupsafe import Markup

from qinglan.core.files import write_text
from qinglan.core.records import Message
from qinglan.core.rng import permutation
from qinglan.core.run import Measure, Report
from qinglan.evals.drawing import PALETTE, series_colours
from qinglan.evals.figures import headline_rows
from qinglan.evals.formatting import is_finite, is_percent, visible, write_interval, write_number, write_value

Cell = str | int | float | Measure | None
ROW_NAMES = {"floor": "Floor", "student": "Student", "ceiling": "Ceiling", "gap_recovered": "Gap recovered"}
LONG_TEXT = 600
"""A text of a transcript longer than this many characters is folded after its first part."""


SVG_ELEMENTS = frozenset({"svg", "g", "defs", "path", "use", "text", "clipPath", "rect"})
"""What a drawing may consist of."""


class Figure(NamedTuple):
    """A drawing from `evals/figures.py` with what it shows (`alt`, for those who cannot see it) and what it means."""

    title: str
    svg: str
    alt: str
    caption: str = ""


class Table(NamedTuple):
    """A table; the first cell of each row names the row. A Measure is written with its interval and n."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str


class ScoredCompletion(NamedTuple):
    """What one model answered, with its scores by name; NaN or None means that it could not be scored."""

    model: str
    text: str
    scores: Mapping[str, float | None] = {}


class Transcript(NamedTuple):
    """One prompt and what each model made of it; `label` says by which rule it was chosen (worst, median or best)."""

    label: str
    prompt: tuple[Message, ...]
    completions: tuple[ScoredCompletion, ...]


class Section(NamedTuple):
    """A part of the page; whatever is empty is left out."""

    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    transcripts: tuple[Transcript, ...] = ()


class Page(NamedTuple):
    """Everything that the page says; `rows`, `metrics`, `alarms` and `unscored` are those of the run's `Report`."""

    title: str
    subtitle: str
    verdict: tuple[str, ...]
    """Short sentences that a stranger understands; the first is set large."""
    rows: Mapping[str, Measure]
    """Keys floor, student, ceiling and gap_recovered, and further rows by name."""
    metrics: Mapping[str, Measure]
    sections: tuple[Section, ...] = ()
    alarms: tuple[str, ...] = ()
    unscored: int = 0
    config_yaml: str = ""
    lineage: Mapping[str, Any] = {}
    row_names: Mapping[str, str] = {}
    """Who stands in each row, such as {"floor": "SFT", "student": "PPO policy"}."""
    rows_caption: str = ""
    """What the rows measure, on what."""
    seconds: float | None = None


class Choice(NamedTuple):
    """An item chosen for showing: why, and its place in the list of scores."""

    label: Literal["worst", "median", "best"]
    item: int


def choose_transcripts(scores: Sequence[float | None], seed: int) -> list[Choice]:
    """Return the worst, the median and the best item, by rule, so that nobody picks by hand.

    Items are ordered by score; among equal scores the order is drawn from `seed`. What could not be scored (None, NaN)
    is never chosen. No item is chosen twice: two scored items give worst and best, a single one is the median.
    """
    drawn = permutation(len(scores), seed, "transcripts")
    scored = [(score, drawn[i], i) for i, score in enumerate(scores) if score is not None and not math.isnan(score)]
    order = [index for _, _, index in sorted(scored)]
    if not order:
        return []
    if len(order) == 1:
        return [Choice("median", order[0])]
    ends = [Choice("worst", order[0]), Choice("best", order[-1])]
    if len(order) == 2:
        return ends
    return [ends[0], Choice("median", order[(len(order) - 1) // 2]), ends[1]]


def write_page(path: Path, page: Page) -> Path:
    """Write the page to `path`, whole or not at all, and return the path. Raises `InputError` on a full disk."""
    write_text(Path(path), render_page(page))
    return Path(path)


def render_page(page: Page) -> str:
    """Return the page as HTML. The same page gives the same text."""
    style = _palette_css() + _package_file("report.css")
    rows = {key: row for key, row in page.rows.items() if key != "gap_recovered"}
    names = {**{key: key.replace("_", " ") for key in rows}, **ROW_NAMES, **page.row_names}
    return _template().render(
        page=page,
        style=Markup(style),  # our own file, no user's text
        anchors=_anchors(section.title for section in page.sections),
        wide=headline_rows(page.rows, names, width=560) if rows else "",
        narrow=headline_rows(page.rows, names, width=360) if rows else "",
        alt=_rows_as_sentence(page.rows, names),
        counts=_counts(rows, names),
        colours=series_colours(_models(page)),
    )


def _package_file(name: str) -> str:
    return (resources.files("qinglan.evals") / "templates" / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "visible": visible,
        "number": write_number,
        "cell": _cell,
        "breakable": _breakable,
        "value": write_value,
        "interval": write_interval,
        "fold": fold,
        "drawing": _trusted_svg,
        "lines": flatten,
        "duration": write_duration,
    }
    tests: dict[str, Callable[[Any], bool]] = {"text": lambda cell: isinstance(cell, str), "finite": is_finite}
    environment.tests |= tests
    return environment.from_string(_package_file("report.html"))


def headline(report: Report, names: Sequence[str] = ()) -> str:
    """Return the rows, and the metrics in `names`, as plain text for a terminal, with intervals, n, alarms and time."""
    chosen = {ROW_NAMES.get(key, key): row for key, row in report.rows.items()}
    chosen |= {name: report.metrics[name] for name in names if name in report.metrics}
    cells = [
        (visible(name), write_value(m), write_interval(m), f"n={m.n:,}", _spare_unit(m)) for name, m in chosen.items()
    ]
    widths = [max((len(row[column]) for row in cells), default=0) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {interval:<{widths[2]}}  {n:<{widths[3]}}  {unit}".rstrip()
        for name, value, interval, n, unit in cells
    ]
    lines += [f"Alarm: {visible(alarm)}" for alarm in report.alarms]
    if report.unscored:
        lines.append(f"{report.unscored:,} items could not be scored; they are left out, not counted as wrong.")
    return "\n".join([*lines, f"{report.recipe}, {write_duration(report.seconds)}, intervals are 95%"])


def markdown_summary(report: Report) -> str:
    """Return the report as Markdown: the rows, the alarms and a table of every metric."""
    head = ["| | value | 95% interval | n | unit |", "|---|---:|---|---:|---|"]
    rows = [_markdown_row(ROW_NAMES.get(key, key), row) for key, row in report.rows.items()]
    metrics = [_markdown_row(f"`{name}`", measure) for name, measure in report.metrics.items()]
    alarms = [f"- Alarm: {visible(alarm)}" for alarm in report.alarms] or ["No alarms."]
    unscored = f"Not scored: {report.unscored:,}. Time: {write_duration(report.seconds)}."
    parts = [[f"## {report.recipe}"], [*head, *rows], alarms, [*head, *metrics], [unscored]]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _markdown_row(name: str, m: Measure) -> str:
    cells = [name, write_value(m), write_interval(m), f"{m.n:,}", m.unit]
    return "| " + " | ".join(visible(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _spare_unit(measure: Measure) -> str:
    return "" if is_percent(measure.unit) else measure.unit


def fold(text: str) -> tuple[str, str]:
    """Return a text in two parts: what is shown, and what is folded away (empty for all but long texts)."""
    if len(text) <= 1.25 * LONG_TEXT:
        return text, ""
    space = max(text.rfind(" ", LONG_TEXT // 2, LONG_TEXT), text.rfind("\n", LONG_TEXT // 2, LONG_TEXT))
    cut = space if space > 0 else LONG_TEXT
    return text[:cut], text[cut:]


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested mapping as (dotted name, text) lines; lists are written with spaces between."""
    lines: list[tuple[str, str]] = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            lines += flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            lines.append((name, " ".join(str(item) for item in value)))
        else:
            lines.append((name, "" if value is None else str(value)))
    return lines


def write_duration(seconds: float) -> str:
    """Return "48 s", "4 min 12 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _cell(cell: Cell) -> Markup:
    """Return a table's cell as markup; text is escaped, and what was not measured is set apart from numbers."""
    if isinstance(cell, str):
        return Markup("<bdi>{}</bdi>").format(visible(cell))
    measure = cell if isinstance(cell, Measure) else Measure(cell, None, None, 0)
    if not is_finite(measure.value):
        return Markup('<span class="nothing">{}</span>').format(write_value(measure))
    if not isinstance(cell, Measure):
        return Markup("{}").format(write_value(measure))
    return Markup('<span class="value">{}</span> <span class="interval">{}</span>').format(
        write_value(measure), write_interval(measure)
    )


def _breakable(name: str) -> Markup:
    """Return a metric's or file's name, escaped, that a narrow screen may break after "_", "/" and "."."""
    return Markup("").join(
        Markup("{}<wbr>").format(part) for part in re.findall(r"[^_/.]*[_/.]?", visible(name)) if part
    )


def _trusted_svg(svg: str) -> Markup:
    """Let a drawing of `evals/figures.py` into the page; a drawing with scripts or addresses is a defect."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        names_outside = [v for k, v in element.attrib.items() if k.rpartition("}")[2] == "href" and v[:1] != "#"]
        if element.tag not in SVG_ELEMENTS or names_outside or any(name.startswith("on") for name in element.attrib):
            raise ValueError(
                "a figure's svg must come from evals/figures.py, without scripts, links or markup of its own"
            )
    return Markup(svg)


def _palette_css() -> str:
    light, dark = ("".join(f"--{name}:{pair[shade]};" for name, pair in PALETTE.items()) for shade in (0, 1))
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        "@media print{:root{color-scheme:light;--paper:#fff}}\n"
    )


def _anchors(titles: Iterable[str]) -> list[str]:
    anchors: list[str] = []
    for title in titles:
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = sum(anchor == slug or re.fullmatch(rf"{slug}-\d+", anchor) is not None for anchor in anchors)
        anchors.append(f"{slug}-{taken + 1}" if taken else slug)
    return anchors


def _models(page: Page) -> list[str]:
    shown = (completion for s in page.sections for t in s.transcripts for completion in t.completions)
    return list(dict.fromkeys(completion.model for completion in shown))


def _counts(rows: Mapping[str, Measure], names: Mapping[str, str]) -> str:
    """Return "n = 1,200 in each row", or the n of each row where they differ."""
    if len({row.n for row in rows.values()}) == 1:
        return f"n = {next(iter(rows.values())).n:,}" + (" in each row." if len(rows) > 1 else ".")
    return "n = " + ", ".join(f"{row.n:,} ({names[key]})" for key, row in rows.items()) + "."


def _rows_as_sentence(rows: Mapping[str, Measure], names: Mapping[str, str]) -> str:
    """Return the rows in words, for those who cannot see the drawing."""
    parts = [f"{names.get(key, key)}: {write_value(m)} {write_interval(m)}".strip() for key, m in rows.items()]
    known = any(is_finite(m.value) for m in rows.values())
    return "; ".join(parts) + (". Brackets hold 95% intervals." if known else ".")
