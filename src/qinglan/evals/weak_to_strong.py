"""What a weak-to-strong run is measured by: admission of tasks, accuracies, gaps recovered, agreement, calibration.

Admission is decided on seeds of its own, by three rules fixed beforehand, before anyone looks at a student: the weak
supervisor is right in at least 60%; ceiling minus weak is at least ten points, its interval included; and the strong
base model, asked zero-shot or read by a linear probe, is clearly better than the supervisor, since nothing can be drawn
out that is not there. A ceiling, which costs most, is trained only where the other two rules are kept.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field

from qinglan.core.config import Config
from qinglan.core.run import Measure, Report, Run
from qinglan.evals.intervals import wilson_interval
from qinglan.evals.metrics import Calibration
from qinglan.evals.recovery import (
    Answers,
    Groups,
    accuracy,
    agreement,
    correct_answers,
    difference,
    gap_recovered,
    reliability_of,
)

POOLED = ("naive", "confidence", "bootstrap", "generative")
"""Methods whose pooled gap recovered is always in the report, measured or not."""


class AdmissionConfig(Config):
    """The rules by which a task counts, and the seeds that they are decided on."""

    min_weak: float = Field(default=0.6, ge=0, le=1)
    """Least accuracy of the weak supervisor: below it there is hardly a label to learn from."""
    min_gap: float = Field(default=0.1, ge=0, le=1)
    """Least gap between ceiling and weak that the lower end of its interval must reach."""
    seeds: int = Field(default=1, ge=1)
    """Fine-tuning seeds that only decide admission."""


class Trial(NamedTuple):
    """What was answered on one task on the seeds of admission; logits [S, N]."""

    truth: np.ndarray
    groups: Groups
    weak: np.ndarray
    base: Mapping[str, np.ndarray]
    """Of the strong base model: zero_shot, zero_shot_balanced, probe."""
    ceiling: np.ndarray | None
    """None where the other two rules were looked at first, and one of them is broken."""


class Admitted(NamedTuple):
    """The verdict on one task and pair of models."""

    task: str
    weak: str
    strong: str
    is_admitted: bool
    reasons: tuple[str, ...]
    """Why it is not admitted, one for each rule that it breaks; or why it could not be tried."""
    measured: Mapping[str, Measure]
    """On the seeds of admission: weak, zero_shot, probe, base_above_weak; where these rules were kept also ceiling and
    gap. Empty if it was not tried."""


class Curve(NamedTuple):
    """True accuracy along the training of one seed: on all cases looked at, on the half that an oracle chooses by, and
    on the other half."""

    steps: tuple[int, ...]
    true_accuracy: tuple[float, ...]
    oracle: tuple[float, ...]
    oracle_measured: tuple[float, ...]
    kept_step: int


class PairOutcome(NamedTuple):
    """Everything that was answered on one task by one pair of models."""

    admitted: Admitted
    answers: Answers
    base: Mapping[str, np.ndarray]
    """Of the strong base model [S, N]: zero_shot, zero_shot_balanced, probe; and "saliency/ceiling"."""
    curves: Mapping[str, Sequence[Curve]]
    saliency: Mapping[str, np.ndarray]
    """Logits of a probe on the truth, fitted to the students' states, by method."""
    released: Answers | None
    """Supervisor and ceiling trained as the released code does."""
    is_answering: bool
    """Labels are texts: right or wrong is all that is known of an answer."""


class Outcome(NamedTuple):
    """What a whole run left."""

    pairs: tuple[PairOutcome, ...]
    admission: tuple[Admitted, ...]
    left_out: tuple[str, ...]
    """What could not be done, and why."""
    inapplicable: tuple[str, ...]
    """Methods that make no sense for a task or a pair of models, and why."""
    parameters: Mapping[str, int]
    num_oracle: int
    """Test cases that an oracle's choice is measured on."""


class Findings(NamedTuple):
    """What the page draws beside the report's metrics."""

    outcome: Outcome
    headline: tuple[str, str]
    """The pair of models in the metrics without a suffix: first supervisor, last student."""
    calibration: Mapping[str, Calibration]
    """Of supervisor and student, by "task/who"."""


def judge_admission(names: tuple[str, str, str], trial: Trial, rules: AdmissionConfig, seed: int) -> Admitted:
    """Return whether a task counts for a pair of models (names: task, weak, strong).

    Without a ceiling it counts as far as it was looked at.
    """
    groups, weak = trial.groups, correct_answers(trial.weak, trial.truth)
    found = {"weak": accuracy(weak, groups, seed=seed)}
    above: dict[str, Measure] = {}
    for key in ("zero_shot", "zero_shot_balanced", "probe"):
        if key in trial.base:
            right = correct_answers(trial.base[key], trial.truth)
            found[key] = accuracy(right, groups, seed=seed)
            above[key] = difference(right, weak, groups, seed=seed)
    best = max(above.values(), key=lambda measure: measure.low if measure.low is not None else -1.0)
    found["base_above_weak"] = best
    reasons = []
    if (found["weak"].value or 0.0) < rules.min_weak:
        reasons.append(f"the weak supervisor is right in {found['weak']}; expected at least {rules.min_weak:g}")
    if best.low is None or best.low <= 0.0:
        reasons.append(f"the strong base model does not clearly know it: {best} above the weak supervisor")
    if trial.ceiling is not None:
        top = correct_answers(trial.ceiling, trial.truth)
        found["ceiling"] = accuracy(top, groups, seed=seed)
        found["gap"] = gap = difference(top, weak, groups, seed=seed)
        if gap.low is None or gap.low < rules.min_gap:
            what = "is weaker than the weak one" if (gap.value or 0.0) < 0 else "is too close"
            reasons.append(f"the strong ceiling {what}: gap {gap}; expected its interval above {rules.min_gap:g}")
    return Admitted(*names, not reasons, tuple(reasons), found)


def measure_all(outcome: Outcome, run: Run) -> tuple[Report, Findings]:
    """Return the report and what the page draws."""
    seed = run.seed
    names = [(one.weak, one.strong) for one in outcome.admission]
    main_pair = (names[0][0], names[-1][1])
    metrics: dict[str, Measure] = {}
    calibrations: dict[str, Calibration] = {}
    for pair in outcome.pairs:
        suffix = "" if (pair.admitted.weak, pair.admitted.strong) == main_pair else f"/{_pair_name(pair.admitted)}"
        metrics |= {f"{name}{suffix}": measure for name, measure in measures_of(pair, outcome.num_oracle, seed).items()}
        if not suffix and not pair.is_answering:
            answers, task = pair.answers, pair.admitted.task
            shown = {"weak": answers.weak, **{m: answers.students[m] for m in POOLED if m in answers.students}}
            for who, logits in shown.items():
                reliability = reliability_of(logits, answers.truth, answers.groups, seed=seed)
                calibrations[f"{task}/{who}"] = reliability
                metrics[f"calibration_error/{task}/{who}"] = reliability.expected_error
    for one in outcome.admission:
        prefix = f"admission/{one.task}"
        suffix = "" if (one.weak, one.strong) == main_pair else f"/{_pair_name(one)}"
        metrics |= {f"{prefix}/{name}{suffix}": measure for name, measure in one.measured.items()}
    counted = {one.task for one in outcome.admission if one.is_admitted}
    tried = {one.task for one in outcome.admission}
    pooled: dict[str, Measure] = {"tasks_admitted": Measure(len(counted), None, None, len(tried), "tasks")}
    for pair_names in dict.fromkeys(names):
        suffix = "" if pair_names == main_pair else f"/{'-'.join(pair_names)}"
        chosen = [
            pair for pair in outcome.pairs
            if (pair.admitted.weak, pair.admitted.strong) == pair_names and pair.admitted.is_admitted
        ]  # fmt: skip
        pooled |= {f"{name}{suffix}": measure for name, measure in pooled_measures(chosen, seed).items()}
    main = [
        pair for pair in outcome.pairs
        if (pair.admitted.weak, pair.admitted.strong) == main_pair and pair.admitted.is_admitted
    ]  # fmt: skip
    rows = rows_of(main, pooled, seed)
    report = Report(
        "weak-to-strong", run.elapsed(), run.config_hash, pooled | metrics, rows, alarms_of(outcome, pooled), 0
    )
    return report, Findings(outcome, main_pair, calibrations)


def _pair_name(one: Admitted) -> str:
    return f"{one.weak}-{one.strong}"


def measures_of(pair: PairOutcome, num_oracle: int, seed: int) -> dict[str, Measure]:
    """Return the metrics of one task and pair of models."""
    answers, task, groups = pair.answers, pair.admitted.task, pair.answers.groups
    weak, top = answers.correct(answers.weak), answers.correct(answers.ceiling)
    found = {
        f"accuracy/weak/{task}": accuracy(weak, groups, seed=seed),
        f"accuracy/ceiling/{task}": accuracy(top, groups, seed=seed),
        f"gap/{task}": difference(top, weak, groups, seed=seed),
    }
    for key in ("zero_shot", "zero_shot_balanced", "probe"):
        if key in pair.base:
            found[f"accuracy/{key}/{task}"] = accuracy(answers.correct(pair.base[key]), groups, seed=seed)
    for method, logits in answers.students.items():
        right = answers.correct(logits)
        floor, best = weak, top
        if method.startswith("released") and pair.released is not None:
            floor, best = answers.correct(pair.released.weak), answers.correct(pair.released.ceiling)
            found[f"accuracy/released_weak/{task}"] = accuracy(floor, groups, seed=seed)
            found[f"accuracy/released_ceiling/{task}"] = accuracy(best, groups, seed=seed)
        found[f"accuracy/student/{task}/{method}"] = accuracy(right, groups, seed=seed)
        found[f"pgr/{task}/{method}"] = gap_recovered([(floor, right, best, groups)], seed=seed)
        if method != "naive" and "naive" in answers.students:
            plain = answers.correct(answers.students["naive"])
            found[f"gain_over_naive/{task}/{method}"] = difference(right, plain, groups, seed=seed)
        if not pair.is_answering:
            teacher = pair.released.weak if method.startswith("released") and pair.released else answers.weak
            for name, where in (("right", floor), ("wrong", 1.0 - floor)):
                part = [(logits, teacher, where, groups)]
                found[f"agreement/{name}/{task}/{method}"] = agreement(part, seed=seed)
        if curves := pair.curves.get(method):
            found |= curve_measures(f"{task}/{method}", curves, num_oracle)
    probed = dict(pair.saliency)
    if "saliency/ceiling" in pair.base:
        probed["ceiling"] = pair.base["saliency/ceiling"]
    for who, logits in probed.items():
        found[f"saliency/{task}/{who}"] = accuracy(answers.correct(logits), groups, seed=seed)
    return found


def curve_measures(name: str, curves: Sequence[Curve], num_oracle: int) -> dict[str, Measure]:
    """Return the true accuracy at the checkpoint kept, at the last, and at the one an oracle would have chosen.

    The oracle chooses by the truth on one half of the cases and is measured on the other; the first two are measured on
    that other half too, so that the three compare. Intervals are Wilson's over the cases of one seed.
    """

    def at(choose: str) -> Measure:
        values = []
        for curve in curves:
            places = {"final": len(curve.steps) - 1, "oracle": int(np.argmax(curve.oracle))}
            place = places.get(choose, curve.steps.index(curve.kept_step) if curve.kept_step in curve.steps else -1)
            values.append(curve.oracle_measured[place])
        mean = float(np.mean(values))
        return Measure(mean, *wilson_interval(mean, num_oracle), num_oracle, "accuracy")

    return {f"along_training/{choose}/{name}": at(choose) for choose in ("kept", "final", "oracle")}


def pooled_measures(pairs: Sequence[PairOutcome], seed: int) -> dict[str, Measure]:
    """Return gaps recovered and agreement over all admitted tasks of one pair of models."""
    methods = list(dict.fromkeys((*POOLED, *(method for pair in pairs for method in pair.answers.students))))
    found = {}
    for method in methods:
        parts = []
        for pair in pairs:
            if method in pair.answers.students:
                anchors = pair.released if method.startswith("released") and pair.released else pair.answers
                truth, right = pair.answers.truth, pair.answers.correct(pair.answers.students[method])
                floor, top = correct_answers(anchors.weak, truth), correct_answers(anchors.ceiling, truth)
                parts.append((floor, right, top, pair.answers.groups))
        found[f"pgr/{method}"] = gap_recovered(parts, seed=seed)
    judged = [pair for pair in pairs if not pair.is_answering and "naive" in pair.answers.students]
    for name in ("right", "wrong"):
        parts_of_agreement = []
        for pair in judged:
            right = pair.answers.correct(pair.answers.weak)
            where = right if name == "right" else 1.0 - right
            parts_of_agreement.append((pair.answers.students["naive"], pair.answers.weak, where, pair.answers.groups))
        found[f"agreement/{name}"] = agreement(parts_of_agreement, seed=seed)
    return found


def rows_of(pairs: Sequence[PairOutcome], pooled: Mapping[str, Measure], seed: int) -> dict[str, Measure]:
    """Return the headline rows: mean accuracy over admitted tasks of supervisor, naive student, ceiling, zero-shot."""
    shown = [pair for pair in pairs if "naive" in pair.answers.students]
    if not shown:
        return {}
    answers = [pair.answers for pair in shown]
    columns = {
        "floor": [one.correct(one.weak) for one in answers],
        "student": [one.correct(one.students["naive"]) for one in answers],
        "ceiling": [one.correct(one.ceiling) for one in answers],
    }
    if all("confidence" in one.students for one in answers):
        columns["confidence"] = [one.correct(one.students["confidence"]) for one in answers]
    if all("zero_shot" in pair.base for pair in shown):
        columns["zero_shot"] = [pair.answers.correct(pair.base["zero_shot"]) for pair in shown]
    groups = [f"{k}/{group}" for k, one in enumerate(answers) for group in (one.groups or range(one.weak.shape[1]))]
    rows = {name: accuracy(np.concatenate(found, axis=1), groups, seed=seed) for name, found in columns.items()}
    return rows | {"gap_recovered": pooled["pgr/naive"]}


def alarms_of(outcome: Outcome, pooled: Mapping[str, Measure]) -> list[str]:
    """Return what a reader must know before the numbers."""
    found = [f"left out: {line}" for line in outcome.left_out]
    if not any(one.is_admitted for one in outcome.admission):
        found.insert(
            0, "no task was admitted: there is no gap that a student could recover (see the table of admission)"
        )
    return found


def headline_names(report: Report) -> list[str]:
    """Return the metrics that the terminal shows."""
    wanted = [f"pgr/{method}" for method in POOLED]
    wanted += [name for name in report.metrics if name.startswith("pgr/") and name.count("/") == 2]
    return [*wanted, "agreement/right", "agreement/wrong", "tasks_admitted"]
