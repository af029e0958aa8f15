"""What the cells of a weak-to-strong study left: who is admitted, and the answers that are handed to the measures."""

from collections.abc import Sequence

import numpy as np

from qinglan.core.errors import InputError
from qinglan.core.run import Run
from qinglan.evals.recovery import Answers
from qinglan.evals.weak_to_strong import Admitted, Curve, Outcome, PairOutcome, Trial, judge_admission
from qinglan.recipes import weak_to_strong_study as study
from qinglan.recipes.weak_to_strong_answers import is_answering, truth_of
from qinglan.recipes.weak_to_strong_config import WeakToStrongConfig
from qinglan.recipes.weak_to_strong_data import num_parameters
from qinglan.recipes.weak_to_strong_fitting import NUM_CURVE
from qinglan.recipes.weak_to_strong_grid import Cell, reason_of, result_of, short


def admit(run: Run, config: WeakToStrongConfig) -> list[Admitted]:
    """Return for every task and pair of models whether it counts, as far as its cells are done, and why not."""
    found = []
    seeds = study.admission_seeds(config)
    for task in study.tasks_of(config):
        for weak in config.weak:
            for strong in config.strong:
                cells = [Cell(role, task, model, s) for role, model in _pair(weak, strong) for s in seeds]
                reasons = [reason for cell in cells if (reason := reason_of(run, cell)) is not None]
                names = (task, short(weak), short(strong))
                if reasons:
                    found.append(Admitted(*names, False, (reasons[0],), {}))
                    continue
                truth, groups = truth_of(run, config, task)
                supervisor = _rows(run, [Cell("supervisor", task, weak, s) for s in seeds])
                if supervisor is None:
                    raise InputError(f"{task}: supervisor {short(weak)} is missing")
                ceiling = _rows(run, [Cell("ceiling", task, strong, s) for s in seeds])
                trial = Trial(truth, groups, supervisor, _base(run, task, strong, seeds), ceiling)
                found.append(judge_admission(names, trial, config.admission, run.seed))
    return found


def _pair(weak: str, strong: str) -> list[tuple[str, str]]:
    return [("supervisor", weak), ("ceiling", strong), ("base", strong)]


def _rows(run: Run, cells: Sequence[Cell], key: str = "test") -> np.ndarray | None:
    """Return what each cell left under a name, [S, N]; None if one of them left nothing."""
    rows = [(result_of(run, cell) or {}).get(key) for cell in cells]
    return None if any(row is None for row in rows) else np.array(rows, dtype=float)


def _base(run: Run, task: str, strong: str, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Return what the strong base model says without training."""
    cells = [Cell("base", task, strong, s) for s in seeds]
    base = {key: found for key in ("zero_shot", "probe") if (found := _rows(run, cells, key)) is not None}
    if "zero_shot" in base and (median := _rows(run, cells, "median")) is not None:
        base["zero_shot_balanced"] = base["zero_shot"] - median.reshape(-1, 1)
    return base


def _anchor_answers(
    run: Run, config: WeakToStrongConfig, task: str, weak: str, strong: str, seeds: Sequence[int], method: str = ""
) -> tuple[Answers, dict[str, np.ndarray]]:
    """Return answers of supervisor and ceiling, and what the base model says, for seeds that are all there."""
    truth, groups = truth_of(run, config, task)
    ceilings = [Cell("ceiling", task, strong, s, method=method) for s in seeds]
    supervisor = _rows(run, [Cell("supervisor", task, weak, s, method=method) for s in seeds])
    top, saliency = _rows(run, ceilings), _rows(run, ceilings, "saliency")
    if supervisor is None or top is None:
        raise InputError(f"{task}: supervisor {short(weak)} or ceiling {short(strong)} is missing")
    extra = {} if saliency is None else {"saliency/ceiling": saliency}
    return Answers(truth, groups, supervisor, top, {}), _base(run, task, strong, seeds) | extra


def outcome(run: Run, config: WeakToStrongConfig, admission: Sequence[Admitted]) -> Outcome:
    """Collect what all cells left, for the measures; what is missing is listed with its reason."""
    left_out = [f"{one.task}, {one.weak} to {one.strong}: {one.reasons[0]}" for one in admission if not one.measured]
    found, inapplicable = [], list[str]()
    for one in study.chosen_pairs(config, admission):
        try:
            found.append(_pair_outcome(run, config, one, left_out, inapplicable))
        except InputError as error:
            left_out.append(str(error))
    parameters = {short(name): num_parameters(config, name) for name in (*config.weak, *config.strong)}
    return Outcome(tuple(found), tuple(admission), tuple(left_out), tuple(inapplicable), parameters, NUM_CURVE // 2)


def _pair_outcome(
    run: Run, config: WeakToStrongConfig, one: Admitted, left_out: list[str], inapplicable: list[str]
) -> PairOutcome:
    weak, strong = study.full_names(config, one)
    seeds, name = list(range(config.seeds)), f"{one.task}, {one.weak} to {one.strong}"
    answers, base = _anchor_answers(run, config, one.task, weak, strong, seeds)
    students: dict[str, np.ndarray] = {}
    curves, saliency = {"ceiling": _curves(run, [Cell("ceiling", one.task, strong, s) for s in seeds])}, {}
    for method in study.methods_of(config, one.task):
        cells = [Cell("student", one.task, strong, s, weak, method) for s in seeds]
        results = [result for cell in cells if (result := result_of(run, cell)) is not None]
        if len(results) < len(cells):
            why = next((reason for cell in cells if (reason := reason_of(run, cell))), "no model between the two")
            applies = study.makes_sense(config, run.seed, one, method)
            (left_out if applies else inapplicable).append(f"{name}, {method}: {why}")
            continue
        students[method] = np.array([result["test"] for result in results], dtype=float)
        curves[method] = _curves(run, cells)
        if all("saliency" in result for result in results):
            saliency[method] = np.array([result["saliency"] for result in results], dtype=float)
    released = None
    if config.released and not is_answering(one.task):
        released, _ = _anchor_answers(run, config, one.task, weak, strong, seeds, "released")
    answers = answers._replace(students=students)
    return PairOutcome(one, answers, base, curves, saliency, released, is_answering(one.task))


def _curves(run: Run, cells: Sequence[Cell]) -> list[Curve]:
    """Return the true accuracy along the training of every seed, where it was looked at."""
    found = []
    for cell in cells:
        rows = [row for row in run.metrics(cell.name) if "true_accuracy" in row]
        if rows:
            steps = tuple(int(row["step"]) for row in rows)
            true, oracle, measured = (
                tuple(row[key] for row in rows) for key in ("true_accuracy", "oracle", "oracle_measured")
            )
            found.append(Curve(steps, true, oracle, measured, int(rows[-1].get("kept_step", steps[-1]))))
    return found
