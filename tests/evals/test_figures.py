"""Figures: the same data give the same bytes, text stays text, colours follow the page, nothing looks like zero."""

import math
import re
from xml.etree import ElementTree

import matplotlib
import pytest

from qinglan.core.run import Measure
from qinglan.evals.drawing import MARKERS, PALETTE, WIDTH, canvas, series_colours
from qinglan.evals.figures import (
    DotRow,
    Line,
    Panel,
    ScoreCurve,
    accuracy_by_gap,
    agreement_bars,
    before_after,
    dot_rows,
    headline_rows,
    overoptimization,
    reliability,
    training_curves,
)
from qinglan.evals.marks import name_dot
from qinglan.evals.metrics import Bin

HALF = Measure(0.6, 0.5, 0.7, 40, "rate")
NOTHING = Measure(None, None, None, 0, "rate")
NAN = Measure(math.nan, math.nan, math.nan, 0, "rate")
ROWS = {"floor": HALF, "student": HALF, "ceiling": HALF, "gap_recovered": HALF}
CURVE = ScoreCurve("gold", [0.5, 1.0, 2.0], [HALF, HALF, NAN], [(0.0, 0.0), (1.0, 0.7), (2.0, 0.3)])

FIGURES = {
    "headline": lambda m: headline_rows(dict.fromkeys(ROWS, m), {"student": "PPO policy"}),
    "rows": lambda m: dot_rows([DotRow("open qa", {"base": m, "SFT": m, "policy": m})]),
    "wins": lambda m: dot_rows([DotRow("sampled", {"policy": m})], reference=0.5, reference_label="no better"),
    "tax": lambda m: before_after([DotRow("arithmetic", {"base": m, "policy": m, "with ptx": m})], "base"),
    "bars": lambda m: agreement_bars({"labelers": m, "reward model": m, "length": m}),
    "overoptimization": lambda m: overoptimization([ScoreCurve("proxy", [1.0], [m])]),
    "reliability": lambda m: reliability([Bin(0.5, 0.6, 0.55, m)] if m.n else []),
    "gap": lambda m: accuracy_by_gap({"0 to 1": m, "over 1": m}, agreement=m),
    "training": lambda m: training_curves([Panel("KL", [Line("policy", [0, 1], [m.value, m.value])], "nats")]),
}
EMPTY = {
    "rows": lambda: dot_rows([]),
    "bars": lambda: agreement_bars({}),
    "overoptimization": lambda: overoptimization([]),
    "reliability": lambda: reliability([]),
    "gap": lambda: accuracy_by_gap({}),
    "training": lambda: training_curves([]),
}


def words(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_small_clean_and_repeatable(name: str) -> None:
    svg = FIGURES[name](HALF)
    assert svg == FIGURES[name](HALF)
    assert svg.startswith("<svg viewBox=") and len(svg) < 20_000
    assert "://" not in svg and "<style" not in svg and "font-family" not in svg and "metadata" not in svg
    assert words(svg)
    bare = re.sub(r"var\(--\w+,#[0-9a-f]{6}\)", "", svg)
    assert not re.findall(r"#[0-9a-f]{6}\b(?!\w)", re.sub(r"#f[0-9a-f]{8}-[a-z][0-9a-f]{10}", "", bare))
    assert set(re.findall(r"var\(--(\w+),", svg)) <= set(PALETTE)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("measure", [NOTHING, NAN], ids=["None", "NaN"])
def test_what_was_not_measured_is_written_not_drawn(name: str, measure: Measure) -> None:
    svg = FIGURES[name](measure)
    assert any("not measured" in word for word in words(svg))
    assert not any(re.search(r"nan|None|inf\b", word) for word in words(svg))


@pytest.mark.parametrize("name", EMPTY)
def test_no_data_says_so(name: str) -> None:
    assert "not measured" in words(EMPTY[name]())


def test_values_intervals_and_names_stand_in_the_drawing() -> None:
    shown = words(headline_rows(ROWS, {"floor": "SFT", "student": "PPO policy"}))
    assert {"SFT", "PPO policy", "60.0%", "[50.0, 70.0]"} <= set(shown)
    rows = [DotRow("open qa", {"base": HALF, "policy": NOTHING}), DotRow("chat", {"policy": HALF})]
    shown = words(dot_rows(rows))
    assert {"base", "policy"} <= set(shown)  # each series is named once, where it first has a dot
    assert shown.count("base") == shown.count("policy") == 1
    assert "turns down at √KL 1.00" in words(overoptimization([CURVE]))
    rising = CURVE._replace(fitted=[(0.0, 0.0), (1.0, 0.4), (2.0, 0.5)])
    assert not any("turns" in word for word in words(overoptimization([rising])))


def test_labels_are_never_markup_nor_formulas() -> None:
    label = "<b>$x^2$ & \x00</b>"
    svg = dot_rows([DotRow(label, {"policy": HALF})])
    assert "<b>$x^2$ & ␀</b>" in words(svg)
    assert "&lt;b&gt;" in svg and "<b>" not in svg


def test_long_labels_are_cut_to_two_lines() -> None:
    shown = words(
        dot_rows([DotRow("an endless name of a use case " * 9, {"policy": HALF}), DotRow("x" * 200, {"policy": HALF})])
    )
    assert sum(word.endswith("…") for word in shown) == 2
    assert max(map(len, shown)) < 25


def test_holes_in_lines_stay_holes() -> None:
    line = Line("policy", [0, 1, 2, 3, 4], [1.0, 2.0, None, math.nan, 3.0], low=[None] * 5, high=[4.0] * 5)
    svg = training_curves([Panel("KL", [line], "nats", reference=2.0), Panel("Empty", [])])
    assert "nan" not in svg.lower()
    assert {"KL", "nats", "3.00", "Empty", "not measured"} <= set(words(svg))


def test_reliability_begins_at_one_half_where_the_bins_do() -> None:
    assert "0%" not in words(reliability([Bin(0.5, 0.6, 0.55, HALF)]))
    assert "0%" in words(reliability([Bin(0.0, 0.1, 0.05, HALF), Bin(0.5, 0.6, 0.55, HALF)]))


def test_drawing_changes_no_global_setting() -> None:
    before = dict(matplotlib.rcParams)
    FIGURES["rows"](HALF)
    assert dict(matplotlib.rcParams) == before


def test_each_model_keeps_its_colour_and_shape() -> None:
    assert series_colours(["base", "SFT", "policy", "larger_base"]) == {
        "base": "base",
        "SFT": "sft",
        "policy": "policy",
        "larger_base": "larger",
    }
    assert series_colours(["ceiling", "student", "floor"]) == {
        "ceiling": "ceiling",
        "student": "policy",
        "floor": "base",
    }
    free = series_colours(["policy", "without ptx", "another"])
    assert len(set(free.values())) == 3
    assert len(series_colours([f"model {i}" for i in range(30)])) == 30
    assert {"base", "sft", "policy", "ceiling", "larger"} <= set(MARKERS)
    assert len({MARKERS[name] for name in ("base", "sft", "policy", "ceiling", "larger")}) == 5


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("shade", [0, 1], ids=["light", "dark"])
def test_text_contrast(shade: int) -> None:
    paper = luminance(PALETTE["paper"][shade])
    for name, pair in PALETTE.items():
        if name not in ("paper", "rule"):
            light, dark = sorted((luminance(pair[shade]), paper), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_every_colour_of_the_light_palette_is_its_own() -> None:
    assert len({pair.light for pair in PALETTE.values()}) == len(PALETTE)  # the way back from colour to name needs it
    assert WIDTH <= 420  # wider drawings are too small to read on a phone


def test_a_series_is_named_where_there_is_room_and_at_its_last_row_in_any_case():
    wide, narrow = Measure(0.5, 0.02, 0.98, 9, "rate"), Measure(0.2, 0.1, 0.3, 9, "rate")
    with canvas(400, 100) as sheet:
        axes = sheet.axes(100, 0, 200, 100)
        axes.set_xlim(0, 1)
        # "length" needs 0.045 x 6 + 0.06 = 0.33 of the axis; 0.02 is left on either side of the one, 0.7 of the other.
        assert not name_dot(axes, wide, 0.5, "length", "base", always=False)
        assert name_dot(axes, narrow, 0.5, "length", "base", always=False)
        assert name_dot(axes, wide, 0.5, "length", "base")
