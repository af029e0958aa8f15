"""How the commands of single stages end: report.json, a short page with the training's curves, and the headline."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qinglan.cli import CommandResult
from qinglan.core.config import to_yaml
from qinglan.core.files import read_json
from qinglan.core.records import ComparisonGroup, Completion, Prompt, Scorer
from qinglan.core.run import Measure, Report, Run, Stage
from qinglan.evals import figures, metrics
from qinglan.evals.figures import Line, Panel
from qinglan.evals.report import (
    Figure,
    Page,
    ScoredCompletion,
    Section,
    Transcript,
    choose_transcripts,
    headline,
    write_page,
)
from qinglan.learn.scoring import ask_scorer


class Curve(NamedTuple):
    """One panel of the page: a title, a unit, and which logged metrics are drawn, by the name of their line."""

    title: str
    unit: str
    lines: Mapping[str, str]


class StageFindings(NamedTuple):
    """What a stage measured, and how its page tells it."""

    title: str
    verdict: tuple[str, ...]
    metrics: dict[str, Measure]
    rows: dict[str, Measure]
    row_names: dict[str, str]
    rows_caption: str
    curves: Sequence[Curve]
    sections: tuple[Section, ...] = ()
    alarms: tuple[str, ...] = ()
    unscored: int = 0


def conclude(run: Run, stage: Stage, found: StageFindings) -> CommandResult:
    """Write report.json and report.html; return the headline with the paths of page and model."""
    report = Report(
        run.recipe, run.elapsed(), run.config_hash, found.metrics, found.rows, list(found.alarms), found.unscored
    )
    run.write_report(report)
    page = Page(
        title=found.title,
        subtitle=f"qinglan {run.recipe}, seed {run.seed}",
        verdict=found.verdict,
        rows=found.rows,
        metrics=found.metrics,
        sections=(*curves_section(run, stage, found.curves), *found.sections),
        alarms=found.alarms,
        unscored=found.unscored,
        config_yaml=to_yaml(run.config, run.seed),
        lineage=read_json(run.dir / "lineage.json"),
        row_names=found.row_names,
        rows_caption=found.rows_caption,
        seconds=report.seconds,
    )
    path = write_page(run.dir / "report.html", page)
    beside_rows = [name for name, measure in found.metrics.items() if measure not in found.rows.values()]
    text = f"{headline(report, beside_rows)}\nmodel: {stage.dir / 'model'}\n{path}"
    return CommandResult(text, report.to_json())


def curves_section(run: Run, stage: Stage, curves: Sequence[Curve]) -> tuple[Section, ...]:
    """Return the section of training curves, or nothing where nothing was logged."""
    logged = run.metrics(stage.name)
    panels = []
    for title, unit, names in curves:
        lines = []
        for name, key in names.items():
            points = [(row["step"], row[key]) for row in logged if key in row]
            if points:
                lines.append(Line(name, [step for step, _ in points], [value for _, value in points]))
        if lines:
            panels.append(Panel(title, lines, unit))
    if not panels:
        return ()
    drawing = figures.training_curves(panels, xlabel="step")
    figure = Figure(
        "Step by step", drawing, f"Curves over the steps of {stage.name}: {', '.join(p.title for p in panels)}."
    )
    return (Section("How did training go?", figures=(figure,)),)


def transcripts_section(
    prompts: Sequence[Prompt],
    completions: Mapping[str, Sequence[Completion]],
    scores: Mapping[str, Sequence[float | None]],
    label: str,
    seed: int,
) -> tuple[Section, ...]:
    """Return the worst, the median and the best prompt by the last model's score, with every model's completion."""
    last = list(completions)[-1]
    shown = [
        Transcript(
            choice.label,
            prompts[choice.item].messages,
            tuple(
                ScoredCompletion(name, texts[choice.item].text, {label: scores[name][choice.item]})
                for name, texts in completions.items()
            ),
        )
        for choice in choose_transcripts(scores[last], seed)
    ]
    text = f"The worst, the median and the best prompt by {label} of {last}; among equals the run's seed decides."
    return (Section("What does it say?", (text,), transcripts=tuple(shown)),) if shown else ()


# -------------------------------------------------------------------------------------------------- reward models


class RewardModelFindings(NamedTuple):
    """How well a scorer orders comparisons."""

    metrics: dict[str, Measure]
    rows: dict[str, Measure]
    """Floor: the longer completion wins; student: the scorer; ceiling: what labelers' agreement allows, if known."""
    section: Section
    unscored: int


def judge_reward_model(groups: Sequence[ComparisonGroup], scorer: Scorer, seed: int) -> RewardModelFindings:
    """Return pair accuracy (intervals over prompt groups), calibration and a section about both.

    The accuracy is also given by source and group of labelers where there are several. That the longer completion wins
    is the floor, since a reward model that learned nothing else is common.
    """
    prompts = [group.prompt for group in groups for _ in group.completions]
    answers = ask_scorer(scorer, prompts, [one for group in groups for one in group.completions], allow_unscored=True)
    flat = iter(answers)
    table = metrics.scored_pairs(groups, [[next(flat) for _ in group.completions] for group in groups])
    lengths = metrics.scored_pairs(groups, [[float(len(one.text)) for one in group.completions] for group in groups])
    accuracy, longer = metrics.pair_accuracy(table, seed=seed), metrics.pair_accuracy(lengths, seed=seed)
    calibration = metrics.pair_calibration(table, seed=seed)
    agreement = metrics.labeler_agreement([group.comparison for group in groups], seed=seed)
    found = {"reward_model_accuracy": accuracy, "longer_wins_accuracy": longer}
    rows = {"floor": longer, "student": accuracy}
    if agreement.n:
        found |= {"labeler_agreement": agreement, "attainable_accuracy": metrics.attainable_accuracy(agreement).at_most}
        rows["ceiling"] = found["attainable_accuracy"]
    found |= {"reward_model_ece": calibration.expected_error, "reward_model_brier": calibration.brier}
    for key in ("source", "labeler_group"):
        parts = metrics.pair_accuracy_by(table, key, seed=seed)
        if len(parts) > 1:
            found |= {f"reward_model_accuracy/{key}/{name}": measure for name, measure in parts.items()}
    num_groups = len(set(table.prompt_groups))
    found["held_out_prompt_groups"] = Measure(num_groups, None, None, num_groups, "prompt groups")
    bars = {"reward model": accuracy, "longer wins": longer, **({"two labelers": agreement} if agreement.n else {})}
    gaps = metrics.pair_accuracy_by(table, "score_gap", seed=seed)
    section = Section(
        "Can the reward model tell?",
        (
            "Share of held-out pairs in which the completion that was judged better has the higher score. Whole prompt "
            "groups are held out, and intervals draw prompt groups.",
        ),
        figures=(
            Figure("Pair accuracy", figures.agreement_bars(bars), "Accuracy of the reward model and of a rule."),
            Figure("Reliability", figures.reliability(calibration.bins), "Predicted against observed preference."),
            Figure("Accuracy by score gap", figures.accuracy_by_gap(gaps), "Accuracy by difference of scores."),
        ),
    )
    return RewardModelFindings(found, rows, section, sum(map(math.isnan, answers)))
