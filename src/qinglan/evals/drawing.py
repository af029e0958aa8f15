"""The ground under the figures: palette, canvas, and the way from matplotlib to a small SVG that lives in a page.

matplotlib draws with the colours of the light palette; `to_svg` then replaces each of them by a CSS variable
(`var(--policy, #b8480a)`), so that one figure serves light and dark mode. Text stays text and takes the page's font.
Ids depend on the drawing only; metadata, dates and namespace addresses are removed: the same data give the same bytes.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from qinglan.core.files import hash_of
from qinglan.evals.formatting import visible

WIDTH = 400
"""Width of a figure in CSS pixels: two stand side by side on a desk, and one on a phone stays legible."""


class Colour(NamedTuple):
    """One colour of the palette, for a light and for a dark page."""

    light: str
    dark: str


PALETTE = {
    "paper": Colour("#fdfdfb", "#15181d"),
    "ink": Colour("#1c2430", "#e8e6e1"),
    "muted": Colour("#5d6673", "#a3abb7"),
    "rule": Colour("#dcdfe4", "#333a45"),
    "base": Colour("#646b75", "#aab2bd"),
    "larger": Colour("#7a4b2a", "#d0a27e"),
    "sft": Colour("#0067a8", "#6cb4ee"),
    "policy": Colour("#b8480a", "#ff9d5c"),
    "ceiling": Colour("#00785a", "#4fcaa2"),
    "proxy": Colour("#84479f", "#d0a0ea"),
    "gold": Colour("#876400", "#e3bd4a"),
}
"""Name to colours. Text contrast is at least 4.5 to 1 on paper for all but `rule`; hues follow Okabe and Ito (2008)."""

MARKERS = {"base": "o", "larger": "P", "sft": "s", "policy": "D", "ceiling": "^", "proxy": "o", "gold": "D", "ink": "o"}
"""A shape of its own for each series, so that none is told by colour alone."""

_SERIES = {
    "base": ("floor", "base", "base model", "weak", "pretrained", "train", "training", "before"),
    "larger": ("larger base", "largest base", "larger base model", "strong base"),
    "sft": ("sft", "supervised", "reviewer", "valid", "validation", "seen labelers"),
    "policy": ("policy", "student", "ppo", "rl", "ppo-ptx", "ppo ptx", "after"),
    "ceiling": ("ceiling", "labelers", "labeler agreement", "strong ceiling", "best of n"),
    "proxy": ("proxy", "reward model", "score", "held-out labelers"),
    "gold": ("gold", "gold score"),
}
_COLOUR_OF = {name: colour for colour, names in _SERIES.items() for name in names}
_SPARE = ("proxy", "gold", "ceiling", "larger", "sft", "policy", "base")

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qinglan",
    "text.parse_math": False,
    "font.size": 12,
    "axes.unicode_minus": True,
    "path.simplify_threshold": 0.2,
}


def series_colours(names: list[str]) -> dict[str, str]:
    """Return the palette name of each series: always the same for a known model, the next free one for others."""
    chosen = {name: known for name in names if (known := _COLOUR_OF.get(_normal(name)))}
    free = [colour for colour in _SPARE if colour not in chosen.values()] or list(_SPARE)
    others = [name for name in names if name not in chosen]
    return chosen | {name: free[place % len(free)] for place, name in enumerate(others)}


def _normal(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name.strip().lower())


def ink(name: str) -> str:
    """Return the drawing colour of a palette name."""
    return PALETTE[name].light


class Canvas(NamedTuple):
    """A drawing of `width` by `height` CSS pixels, with the origin at its top left."""

    figure: Figure
    width: float
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return bare axes in a box of pixels: no frame, quiet ticks, light grid lines on demand."""
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.set_facecolor("none")
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0, labelsize=11, labelcolor=ink("muted"), pad=5)
        axes.set_axisbelow(True)
        return axes

    def text(self, x: float, y: float, text: str, colour: str = "ink", **style: Any) -> None:
        """Write text at pixel (x, y), `y` being its vertical middle unless `va` says otherwise."""
        place: dict[str, Any] = {"ha": "left", "va": "center_baseline", "fontsize": 12, "color": ink(colour), **style}
        self.figure.text(x / self.width, 1 - y / self.height, visible(text), **place)


@contextmanager
def canvas(width: float, height: float) -> Iterator[Canvas]:
    """Open a canvas under the figures' style; nothing global is changed."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # at 72 dpi a point is a pixel of the SVG
        FigureCanvasSVG(figure)
        yield Canvas(figure, width, height)


def to_svg(drawing: Canvas) -> str:
    """Return the drawing as an SVG element for an HTML page: no prolog, no address, no fixed font, themed colours."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts will have it
        drawing.figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(out.getvalue())
    _drop_styles(root)
    prefix = f"f{hash_of(out.getvalue())[:8]}-"
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {k: v for name, value in element.attrib.items() for k, v in _attribute(name, value, prefix)}
        if element.tag != "text":
            element.text = element.tail = None
        element.tail = None
    root.attrib = {"viewBox": f"0 0 {drawing.width:g} {drawing.height:g}", "width": f"{drawing.width:g}"}
    root.set("height", f"{drawing.height:g}")
    return ElementTree.tostring(_without_empty_groups(root), encoding="unicode")


def _drop_styles(root: ElementTree.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("style", "metadata"):
                parent.remove(child)


def _without_empty_groups(element: ElementTree.Element) -> ElementTree.Element:
    for child in list(element):
        _without_empty_groups(child)
        if child.tag in ("g", "defs") and len(child) == 0:
            element.remove(child)
    return element


def _attribute(name: str, value: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the attribute as it stands in the page, or nothing where it only makes the file larger."""
    name = name.rpartition("}")[2]
    if name == "id":
        if re.fullmatch(r"[a-z][0-9a-f]{10}", value):  # only these are referred to
            yield name, prefix + value
    elif name == "href":
        yield name, f"#{prefix}{value.removeprefix('#')}"
    elif name == "clip-path":
        yield name, value.replace("url(#", f"url(#{prefix}")
    elif name == "style":
        kept = [part for part in value.split("; ") if not part.startswith("font-family")]
        yield name, re.sub(r"#[0-9a-f]{6}\b", _variable, ";".join(kept).replace(": ", ":"))
    elif name in ("d", "x", "y", "width", "height", "transform", "points"):
        if not value.startswith("rotate(-0 "):
            yield name, re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value).strip()
    else:
        yield name, value


def _variable(match: re.Match[str]) -> str:
    for name, colour in PALETTE.items():
        if colour.light == match[0]:
            return f"var(--{name},{match[0]})"
    return match[0]
