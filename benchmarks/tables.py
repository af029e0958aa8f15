"""The tables of docs/results.md and docs/world.md, from the files that the commands wrote.

python -m benchmarks.tables quickstart docs/results/quickstart_seed*.json
python -m benchmarks.tables world FILE ...      what `qinglan world evaluate --json` printed
python -m benchmarks.tables weak FILE           the report.json of a weak-to-strong run
"""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from qinglan.tasks.base_models import model_card

QUICKSTART_ROWS = (
    "win_rate_vs_sft",
    "win_rate_vs_sft_greedy",
    "length_controlled_win_rate_vs_sft",
    "win_rate_vs_larger_base",
    "win_rate_vs_larger_base_greedy",
    "win_rate_vs_base",
    "win_rate_vs_base_greedy",
    "gold_score/base",
    "gold_score/larger_base",
    "gold_score/sft",
    "gold_score/policy",
    "gold_score/ceiling",
    "gold_score/sft_greedy",
    "gold_score/policy_greedy",
    "gold_gain_over_sft",
    "gold_gain_over_sft_greedy",
    "reward_model_accuracy",
    "reward_model_accuracy_held_out_labelers",
    "answer_key_accuracy",
    "labeler_agreement",
    "attainable_accuracy",
    "reward_model_ece",
    "kl",
    "hallucination_rate/sft",
    "hallucination_rate/policy",
    "hallucination_rate/sft_greedy",
    "hallucination_rate/policy_greedy",
    "harmful_rate/sft",
    "harmful_rate/policy",
    "harmful_rate/sft_greedy",
    "harmful_rate/policy_greedy",
    "refusal_rate_on_benign/sft",
    "refusal_rate_on_benign/policy",
    "refusal_rate_on_benign/sft_greedy",
    "refusal_rate_on_benign/policy_greedy",
    "pretraining_loss/base",
    "pretraining_loss/sft",
    "pretraining_loss/policy",
    "pretraining_loss/policy_without_ptx",
)


def cell(measure: dict[str, Any]) -> str:
    """Return a measure with its interval."""
    return f"{measure['value']:.3f} [{measure['low']:.3f}, {measure['high']:.3f}]"


def mean_over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Return the mean with its 95% interval by Student's t: runs differ in prompts, people and training alike."""
    mean, spread = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread
    return {"value": mean, "low": mean - half, "high": mean + half}


def quickstart_table(files: list[Path]) -> str:
    """Return the table of several seeds: median, mean with its interval over seeds, each seed with its own interval."""
    reports = [json.loads(file.read_text()) for file in files]
    names = [file.stem.rpartition("_seed")[2] for file in files]
    lines = ["| metric | median | mean | " + " | ".join(f"seed {name}" for name in names) + " |"]
    lines.append("|---|---:|---:|" + "---:|" * len(files))
    for metric in QUICKSTART_ROWS:
        measures = [report["metrics"][metric] for report in reports]
        values = [measure["value"] for measure in measures]
        middle = f"{statistics.median(values):.3f} | {cell(mean_over_seeds(values))}"
        lines.append(f"| `{metric}` | {middle} | " + " | ".join(cell(measure) for measure in measures) + " |")
    seconds = [report["seconds"] for report in reports]
    lines.append(
        f"| seconds | {statistics.median(seconds):.0f} | | " + " | ".join(f"{one:.0f}" for one in seconds) + " |"
    )
    return "\n".join(lines)


def world_table(files: list[Path]) -> str:
    """Return the table of all probes by size, below what the model cards say of each size."""
    found = [json.loads(file.read_text()) for file in files]
    parameters = {size: count for one in found for size, count in one["parameters"].items()}
    metrics = {name: measure for one in found for name, measure in one["metrics"].items()}
    sizes = sorted(parameters, key=parameters.__getitem__)
    cards = [model_card(size) for size in sizes]
    lines = ["| | " + " | ".join(sizes) + " |", "|---|" + "---:|" * len(sizes)]
    lines.append("| parameters | " + " | ".join(f"{parameters[size]:,}" for size in sizes) + " |")
    lines.append("| tokens | " + " | ".join(f"{card['tokens']:,}" for card in cards) + " |")
    lines.append("| device | " + " | ".join("a core" if c["device"] == "cpu" else c["device"] for c in cards) + " |")
    lines.append("| seconds, shared | " + " | ".join(f"{card['seconds']:,.0f}" for card in cards) + " |")
    losses = " | ".join(f"{card['held_out_loss']:.3f}" for card in cards)
    lines.append(f"| held-out loss, nats per token | {losses} |")
    for probe in dict.fromkeys(name.split("/")[1] for name in metrics):
        cells = [cell(metrics[f"capability/{probe}/{size}"]) for size in sizes]
        lines.append(f"| {probe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def weak_table(file: Path) -> str:
    """Return three tables for every pair of models: admission, accuracies, and what each method recovers."""
    metrics = json.loads(file.read_text())["metrics"]
    first = [name for name in metrics if name.startswith("admission/") and name.count("/") == 2]
    pairs = [
        "",
        *dict.fromkeys(f"/{name.split('/')[3]}" for name in metrics if re.fullmatch(r"admission/.*/weak/.*", name)),
    ]
    tasks = list(dict.fromkeys(name.split("/")[1] for name in first))
    return "\n\n".join(_pair_tables(metrics, tasks, pair) for pair in pairs)


def _pair_tables(metrics: dict[str, Any], tasks: list[str], pair: str) -> str:
    def row(title: str, names: Sequence[str]) -> str:
        return f"| {title} | " + " | ".join(found(name) for name in names) + " |"

    def found(name: str) -> str:
        measure = metrics.get(name + pair)
        return "" if measure is None or measure["value"] is None else cell(measure)

    def head(columns: Sequence[str]) -> list[str]:
        return ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]

    kinds = ("weak", "zero_shot", "probe", "ceiling", "gap")
    admission = [row(f"`{task}`", [f"admission/{task}/{kind}" for kind in kinds]) for task in tasks]
    admitted = [task for task in tasks if f"accuracy/student/{task}/naive{pair}" in metrics]
    known = re.compile(rf"accuracy/student/[^/]+/([^/]+){pair}")
    methods = list(dict.fromkeys(match[1] for name in metrics if (match := known.fullmatch(name))))
    accuracy = [row(kind, [f"accuracy/{kind}/{task}" for task in admitted]) for kind in kinds[:-1]]
    accuracy += [row(method, [f"accuracy/student/{task}/{method}" for task in admitted]) for method in methods]
    recovered = [row(one, [*(f"pgr/{task}/{one}" for task in admitted), f"pgr/{one}"]) for one in methods]
    for side in ("right", "wrong"):
        names = [*(f"agreement/{side}/{task}/naive" for task in admitted), f"agreement/{side}"]
        recovered.append(row(f"agreement of naive, supervisor {side}", names))
    parts = [head(kinds) + admission, head(admitted) + accuracy, head([*admitted, "pooled"]) + recovered]
    return f"Pair {pair.removeprefix('/') or 'first'}\n\n" + "\n\n".join("\n".join(part) for part in parts)


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    files = [Path(path) for path in paths]
    print(
        {
            "quickstart": quickstart_table,
            "world": world_table,
            "weak": lambda them: weak_table(them[0]),
        }[kind](files)
    )
