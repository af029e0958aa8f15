"""The page of a weak-to-strong run: the paper's figures, with zero-shot beside every gap recovered, and what was left
out."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qinglan.core.config import to_yaml
from qinglan.core.files import read_json
from qinglan.core.run import Measure, Report, Run
from qinglan.evals import figures
from qinglan.evals.figures import DotRow, Line, Panel
from qinglan.evals.formatting import write_interval, write_value
from qinglan.evals.report import Figure, Page, Section, Table
from qinglan.evals.weak_to_strong import POOLED, Admitted, Findings, PairOutcome

Metrics = Mapping[str, Measure]
MAX_PANELS = 6


def draw_page(run: Run, report: Report, found: Findings) -> Page:
    """Return the page; sections without data are left out."""
    weak, strong = found.headline
    mine = [p for p in found.outcome.pairs if (p.admitted.weak, p.admitted.strong) == found.headline]
    sections = [
        recovery_section(report.metrics, mine),
        size_section(report.metrics, found),
        agreement_section(report.metrics, mine),
        curve_section(report.metrics, mine),
        knowledge_section(report.metrics, mine, found),
        admission_section(found),
    ]
    return Page(
        title="Weak-to-strong generalization",
        subtitle=f"{weak} supervises {strong}; truth only measures, and teaches supervisor and ceiling",
        verdict=verdict(report, found),
        rows=report.rows,
        metrics=report.metrics,
        sections=tuple(section for section in sections if section is not None),
        alarms=tuple(report.alarms),
        config_yaml=to_yaml(run.config, run.seed),
        lineage=read_json(run.dir / "lineage.json"),
        row_names={
            "floor": f"Weak supervisor ({weak})",
            "student": f"Student ({strong}, naive)",
            "confidence": "Student, confidence loss",
            "ceiling": f"Ceiling ({strong}, truth)",
            "zero_shot": f"{strong}, zero-shot",
        },
        rows_caption="Mean accuracy over admitted tasks, on test groups that nobody trained on; chance is 50%.",
        seconds=report.seconds,
    )


def verdict(report: Report, found: Findings) -> tuple[str, ...]:
    """Return short sentences that say what came out."""
    metrics = report.metrics
    count = metrics["tasks_admitted"]
    models = {(one.weak, one.strong) for one in found.outcome.admission}
    where = " for some pair of models" if len(models) > 1 else ""
    sentences = [f"{count.value} of {count.n} tasks were admitted{where} by the rules fixed beforehand."]
    naive, confident = metrics["pgr/naive"], metrics["pgr/confidence"]
    if naive.value is not None:
        sentences.insert(0, f"Taught by weak labels alone, the student recovers {_said(naive)} of the gap.")
    else:
        sentences.insert(0, f"Nothing can be said about the gap recovered: {naive.unit}.")
    if confident.value is not None:
        sentences.append(f"With the confidence loss it recovers {_said(confident)}.")
    zero, student = report.rows.get("zero_shot"), report.rows.get("student")
    if zero is not None and student is not None:
        sentences.append(
            f"Asked zero-shot, the strong model is right in {_said(zero)}; the naive student in {_said(student)}."
        )
    wrong = metrics["agreement/wrong"]
    if wrong.value is not None:
        right = _said(metrics["agreement/right"])
        sentences.append(
            f"It agrees with {right} of its supervisor's right answers and {_said(wrong)} of the wrong ones."
        )
    return tuple(sentences)


def _said(measure: Measure) -> str:
    return f"{write_value(measure)} {write_interval(measure)}".strip()


def _dots(metrics: Metrics, names: Mapping[str, str]) -> dict[str, Measure]:
    """Return those of the named metrics that are there and have a value, by their label."""
    return {
        label: metrics[name] for label, name in names.items() if name in metrics and metrics[name].value is not None
    }


def recovery_section(metrics: Metrics, pairs: Sequence[PairOutcome]) -> Section | None:
    """Return accuracies by task and gaps recovered by method."""
    if not pairs:
        return None
    tasks = [pair.admitted.task for pair in pairs]
    rows = []
    for task in tasks:
        names = {"weak": f"accuracy/weak/{task}", "zero-shot": f"accuracy/zero_shot/{task}"}
        names |= {"student": f"accuracy/student/{task}/naive", "confidence": f"accuracy/student/{task}/confidence"}
        rows.append(DotRow(task.replace("_", " "), _dots(metrics, names | {"ceiling": f"accuracy/ceiling/{task}"})))
    methods = list(dict.fromkeys(method for pair in pairs for method in pair.answers.students))
    gaps = [DotRow(m.replace("_", " "), {"PGR": metrics[f"pgr/{m}"]}) for m in methods if f"pgr/{m}" in metrics]
    accuracies = tuple(
        (
            task,
            metrics.get(f"accuracy/weak/{task}"),
            metrics.get(f"accuracy/zero_shot/{task}"),
            metrics.get(f"accuracy/student/{task}/naive"),
            metrics.get(f"accuracy/student/{task}/confidence"),
            metrics.get(f"accuracy/ceiling/{task}"),
        )
        for task in tasks
    )
    recovered = tuple(
        (
            f"{task}, {method.replace('_', ' ')}",
            metrics[f"accuracy/student/{task}/{method}"],
            _gap_cell(metrics[f"pgr/{task}/{method}"]),
            metrics.get(f"gain_over_naive/{task}/{method}"),
        )
        for task in tasks
        for method in methods
        if f"pgr/{task}/{method}" in metrics
    )
    text = (
        "Performance gap recovered = (student - weak) / (ceiling - weak), as a ratio of sums over seeds; intervals are "
        "over items and seeds. Where the gap's own interval reaches zero there is no number.",
        "The strong model's zero-shot accuracy stands beside it: what a student gains is mostly what was there before.",
    )
    return Section(
        "How much of the gap is recovered?",
        text,
        figures=(
            Figure("Accuracy by task", figures.dot_rows(rows, reference=0.5, reference_label="chance"), "Accuracies."),
            Figure("Gap recovered by method, admitted tasks", figures.dot_rows(gaps), "Gap recovered by method."),
        ),
        tables=(
            Table(
                ("task", "weak", "zero-shot", "student, naive", "confidence", "ceiling"),
                accuracies,
                "Accuracy on all tasks whose students were trained, for the headline pair of models.",
            ),
            Table(
                ("task, method", "student", "gap recovered", "student minus naive student"),
                recovered,
                "Methods task by task, paired by item and seed; a method pools the tasks on which it makes sense.",
            ),
        ),
    )


def _gap_cell(measure: Measure | None) -> Measure | str | None:
    return measure.unit if measure is not None and measure.value is None else measure


def size_section(metrics: Metrics, found: Findings) -> Section | None:
    """Return accuracy against the size of the strong model, one line for each supervisor (the paper's figure 3)."""
    sizes = found.outcome.parameters
    pairs = found.outcome.pairs
    if len({pair.admitted.strong for pair in pairs}) < 2:
        return None
    panels = []
    for task in list(dict.fromkeys(pair.admitted.task for pair in pairs))[:MAX_PANELS]:
        lines: dict[str, list[tuple[float, Measure]]] = {}
        for pair in (one for one in pairs if one.admitted.task == task):
            one = pair.admitted
            suffix = "" if (one.weak, one.strong) == found.headline else f"/{one.weak}-{one.strong}"
            place = math.log10(max(sizes[one.strong], 1))
            for line, name in ((f"from {one.weak}", f"student/{task}/naive"), ("ceiling", f"ceiling/{task}")):
                measure = metrics.get(f"accuracy/{name}{suffix}")
                if measure is not None and all(abs(x - place) > 1e-9 for x, _ in lines.get(line, [])):
                    lines.setdefault(line, []).append((place, measure))
        drawn = []
        for name, points in lines.items():
            ordered = sorted(points, key=lambda point: point[0])
            columns = [[getattr(measure, key) for _, measure in ordered] for key in ("value", "low", "high")]
            drawn.append(Line(name, [x for x, _ in ordered], *columns))
        panels.append(Panel(task.replace("_", " "), drawn, "accuracy"))
    figure = Figure(
        "Accuracy against the size of the student",
        figures.training_curves(panels, xlabel="strong model, log10 of its parameters"),
        "Accuracy of naive students for each supervisor, and of the ceiling, over the number of parameters.",
    )
    return Section("Does a larger student gain more?", figures=(figure,))


def agreement_section(metrics: Metrics, pairs: Sequence[PairOutcome]) -> Section | None:
    """Return how often students agree with their supervisor's right and wrong answers."""
    judged = [pair for pair in pairs if not pair.is_answering and pair.answers.students]
    if not judged:
        return None
    rows = []
    for pair in judged:
        for method in [m for m in POOLED if m in pair.answers.students][:2]:
            key = f"{pair.admitted.task}/{method}"
            names = {"where it is right": f"agreement/right/{key}", "where it is wrong": f"agreement/wrong/{key}"}
            rows.append(DotRow(f"{pair.admitted.task.replace('_', ' ')}, {method}", _dots(metrics, names)))
    return Section(
        "Does the student imitate errors?",
        (
            "Share of test cases on which both decide alike. A student that only imitates agrees with "
            "right and wrong answers alike; one that has learnt the task itself agrees less with the wrong ones.",
        ),
        figures=(
            Figure("Agreement with the supervisor", figures.dot_rows(rows), "Agreement split by right and wrong."),
        ),
    )


def curve_section(metrics: Metrics, pairs: Sequence[PairOutcome]) -> Section | None:
    """Return true accuracy along training, and what an oracle's early stopping would have gained."""
    panels, rows = [], []
    for pair in pairs:
        lines = []
        for who, curves in pair.curves.items():
            if curves and who in ("naive", "confidence", "ceiling"):
                steps = curves[0].steps
                values = np.mean([curve.true_accuracy for curve in curves], axis=0)
                lines.append(Line(who, list(steps), values.tolist()))
            cells = [
                metrics.get(f"along_training/{one}/{pair.admitted.task}/{who}") for one in ("kept", "final", "oracle")
            ]
            if curves and all(cell is not None for cell in cells):
                rows.append((f"{pair.admitted.task}, {who}", *cells))
        if lines:
            panels.append(Panel(pair.admitted.task.replace("_", " "), lines, "accuracy"))
    if not panels:
        return None
    drawn = figures.training_curves(panels[:MAX_PANELS], xlabel="update")
    return Section(
        "Does the student overfit to weak labels?",
        (
            "True accuracy on test cases while the student learns from labels that are partly wrong. Checkpoints are "
            "chosen by weak labels; what an oracle that knows the truth would have chosen is shown apart.",
        ),
        figures=(Figure("True accuracy along training", drawn, "True accuracy over updates, mean over seeds."),),
        tables=(
            Table(
                ("task, method", "kept by weak labels", "last", "oracle"),
                tuple(rows),
                "An oracle chooses on one half of the cases looked at; all three are measured on the other half.",
            ),
        ),
    )


def knowledge_section(metrics: Metrics, pairs: Sequence[PairOutcome], found: Findings) -> Section | None:
    """Return what linear probes read before and after, and how calibrated supervisor and student are."""
    rows = []
    for pair in pairs:
        task = pair.admitted.task
        names = (f"accuracy/probe/{task}", f"saliency/{task}/naive", f"saliency/{task}/ceiling")
        errors = (f"calibration_error/{task}/weak", f"calibration_error/{task}/naive")
        rows.append((task.replace("_", " "), *(metrics.get(name) for name in (*names, *errors))))
    if not rows:
        return None
    header = ("task", "probe, base", "probe, naive student", "probe, ceiling", "ECE weak", "ECE naive student")
    drawn = [
        Figure(f"Reliability: {name.replace('/', ', ')}", figures.reliability(one.bins), "Predicted against observed.")
        for name, one in list(found.calibration.items())[:2]
    ]
    text = (
        "Linear probes fitted to the truth of half B on frozen states of the base model, of the naive student and of "
        "the ceiling (the paper's test of saliency), and the expected calibration error of soft answers.",
    )
    return Section(
        "What do the states hold?", text, figures=tuple(drawn), tables=(Table(header, tuple(rows), "Test cases."),)
    )


def admission_section(found: Findings) -> Section:
    """Return which tasks count, by rules fixed beforehand on seeds of their own, and what was left out or not tried."""
    keys = ("weak", "ceiling", "gap", "zero_shot", "probe", "base_above_weak")
    tried = found.outcome.admission
    numbers = tuple((_models(one), *(one.measured.get(key) for key in keys)) for one in tried)
    verdicts = tuple(
        (_models(one), "admitted" if one.is_admitted else "not admitted", "; ".join(one.reasons)) for one in tried
    )
    text = (
        "A task counts if the weak supervisor is good enough to teach, the ceiling is clearly above it, and the strong "
        "base model, asked zero-shot or read by a linear probe, is clearly above it too. Decided on fine-tuning seeds "
        "of their own, before any student was trained.",
        *(f"Left out: {line}" for line in found.outcome.left_out),
        *(f"Does not apply: {line}" for line in found.outcome.inapplicable),
    )
    return Section(
        "Which tasks count?",
        text,
        tables=(
            Table(("task", "verdict", "why not"), verdicts, "Verdicts."),
            Table(("task", *(key.replace("_", " ") for key in keys)), numbers, "Measured on the seeds of admission."),
        ),
    )


def _models(one: Admitted) -> str:
    return f"{one.task}, {one.weak} to {one.strong}"
