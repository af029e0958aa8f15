"""Capability against size: one small panel for each probe, with 95% intervals, for `qinglan world evaluate`."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qinglan.core.errors import InputError
from qinglan.core.files import write_atomic
from qinglan.core.run import Measure
from qinglan.evals.drawing import PALETTE

COLUMNS = 6
CHANCE = {"judging": 0.5, "grammaticality": 0.5, "critiquing": 0.1}
"""What guessing gives, by the beginning of a probe's name."""


def draw_capabilities(metrics: Mapping[str, Measure], parameters: Mapping[str, int], path: Path) -> None:
    """Draw `capability/<probe>/<model>` against the models' parameters into a .png or .svg file.

    Raises `InputError` for another ending of the file's name.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"picture {path}: cannot draw {path.suffix or 'a file without ending'}; name a .png or .svg")
    probes = list(dict.fromkeys(name.split("/")[1] for name in metrics))
    rows = -(-len(probes) // COLUMNS)
    figure = Figure(figsize=(2.1 * COLUMNS, 1.75 * rows + 0.3), layout="constrained", facecolor=PALETTE["paper"].light)
    FigureCanvasAgg(figure)
    models = sorted(parameters, key=lambda name: parameters[name])
    for place, probe in enumerate(probes):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        chance = next((value for start, value in CHANCE.items() if probe.startswith(start)), None)
        if chance is not None:
            axes.axhline(chance, color=PALETTE["muted"].light, linewidth=0.8, linestyle=":")
        found = [(parameters[name], metrics[f"capability/{probe}/{name}"]) for name in models]
        x = [size for size, _ in found]
        y = [measure.value or 0.0 for _, measure in found]
        below = [
            value - (measure.low if measure.low is not None else value)
            for value, (_, measure) in zip(y, found, strict=True)
        ]
        above = [
            (measure.high if measure.high is not None else value) - value
            for value, (_, measure) in zip(y, found, strict=True)
        ]
        axes.errorbar(x, y, [below, above], color=PALETTE["policy"].light, marker="o", markersize=4, capsize=2)
        axes.set(xscale="log", ylim=(-0.03, 1.03))
        axes.set_title(probe.replace("_", " "), fontsize=9, color=PALETTE["ink"].light)
        axes.set_xticks(x, models, fontsize=7)
        axes.minorticks_off()
        axes.tick_params(axis="y", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_facecolor(PALETTE["paper"].light)

    def write(part: Path) -> None:
        figure.savefig(part, format=path.suffix[1:], dpi=110, metadata={"Date": None} if path.suffix == ".svg" else {})

    write_atomic(path, write)
