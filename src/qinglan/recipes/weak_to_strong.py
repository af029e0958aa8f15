"""Weak-to-strong generalization (Burns et al. 2023): can a weak supervisor draw out what a strong model knows?

1. A weak model is fine-tuned on the truth of half A; its soft labels of half B are the weak labels.
2. The strong student is fine-tuned on half B with the weak labels, by several methods.
3. The ceiling is the strong model fine-tuned on the same half B with the truth.
4. Performance gap recovered = (student - weak) / (ceiling - weak), only where the gap is more than noise.
Halves share no group, classes are balanced, checkpoints are chosen by the labels that each model was given. A task
counts only if it passes rules fixed beforehand, on seeds of their own; what did not pass is listed. Supervisors may be
people or rules: the same records, the same path.

Departures from the paper: docs/weak_to_strong.md. Expected numbers with their spread: docs/results.md.
The built-in world, one CPU, minutes:  qinglan weak-to-strong
Your texts:                            qinglan weak-to-strong --data.file F --weak DIR --strong DIR
"""

from pathlib import Path
from typing import Any

import numpy as np

from qinglan.cli import CommandResult, Options
from qinglan.core.device import prepare_process
from qinglan.core.records import WeakLabel
from qinglan.core.rng import stream_seed
from qinglan.core.run import Run, Stage
from qinglan.evals.report import headline, write_page
from qinglan.evals.weak_to_strong import headline_names, measure_all
from qinglan.evals.weak_to_strong_page import draw_page
from qinglan.learn.classifier import train_classifier
from qinglan.learn.labelled import Labelled
from qinglan.learn.texts import train_on_texts
from qinglan.models.cases import encode_case, verdict_logits
from qinglan.models.classifier import case_logits
from qinglan.recipes import weak_to_strong_results as results
from qinglan.recipes import weak_to_strong_study as study
from qinglan.recipes.weak_to_strong_answers import answering_cell, is_answering
from qinglan.recipes.weak_to_strong_config import WeakToStrongConfig
from qinglan.recipes.weak_to_strong_data import open_model, reading_of, sides_of, write_own_records
from qinglan.recipes.weak_to_strong_fitting import (
    fine_tuned,
    fit_seed,
    probe_logits,
    shots,
    training_of,
    weak_labels,
)
from qinglan.recipes.weak_to_strong_grid import Cell, finish, is_model, open_stage, run_cells
from qinglan.supervisors.rules import is_rule, load_rule
from qinglan.supervisors.simulated import make_labelers
from qinglan.supervisors.weak import labels_of_model, labels_of_people, labels_of_rule, save_labels

__all__ = ["WeakToStrongConfig", "main"]


def main(config: WeakToStrongConfig, options: Options) -> CommandResult:
    """Run the grid: admission on its own seeds, then supervisors and ceilings, students, measures and the page."""
    prepare_process()
    study.check_input(config, options.seed)
    out = options.out or Path("runs/weak-to-strong")
    with Run.open(out, config, seed=options.seed, recipe="weak-to-strong", resume=options.resume) as run:
        study.add_inputs(run, config)
        run_cells(run, config, study.own_records(config, run.seed), do, "own records")
        run_cells(run, config, study.trials(config), do, "admission")
        ceilings = study.trial_ceilings(config, results.admit(run, config))
        run_cells(run, config, ceilings, do, "admission, ceilings")
        admission = results.admit(run, config)
        run_cells(run, config, study.floors_and_ceilings(config, admission), do, "supervisors, ceilings")
        for wave in study.students(config, admission):
            run_cells(run, config, wave, do, "students")
        report, found = measure_all(results.outcome(run, config, admission), run)
        run.write_report(report)
        write_page(run.dir / "report.html", draw_page(run, report, found))
    return CommandResult(f"{headline(report, headline_names(report))}\n{out / 'report.html'}", report.to_json())


def do(run: Run, config: WeakToStrongConfig, cell: Cell) -> None:
    """Do one cell."""
    if cell.role == "records":
        write_own_records(run, config, cell)
        return
    if is_answering(cell.task):
        answering_cell(run, config, cell)
        return
    stage = open_stage(run, config, cell)
    roles = {"base": base, "supervisor": supervisor, "ceiling": ceiling, "link": link, "student": student}
    finish(stage, config, roles[cell.role](run, config, cell, stage))


# ------------------------------------------------------------------------------------------------- the four roles


def base(run: Run, config: WeakToStrongConfig, cell: Cell, stage: Stage) -> dict[str, Any]:
    """What a model knows before any fine-tuning: its zero-shot verdicts, and a linear probe on the truth of half B."""
    lm, read = open_model(config, cell.model), reading_of(run, config, cell, cell.model)
    found: dict[str, Any] = {"probe": probe_logits(lm, read, read.truth["half_b"])}
    if read.cases["test"][0].verdicts is not None:
        found["zero_shot"] = verdict_logits(lm, read.cases["test"]).tolist()
        # Classes are balanced, so half of the verdicts should be "yes": a threshold that takes no label.
        found["median"] = float(verdict_logits(lm, read.cases["half_b"]).median())
    return found


def supervisor(run: Run, config: WeakToStrongConfig, cell: Cell, stage: Stage) -> dict[str, Any]:
    """Step 1: learn half A by its truth (a model), then label half B and the validation cases; rules only label."""
    sides = sides_of(config, cell.task, run.seed, cell.seed, not cell.method.startswith("released"))
    if not is_model(cell.model):
        labels = {}
        for name in ("half_b", "valid", "test"):
            found = getattr(sides, name)
            cases, rows = [one.case for one in found], [one.fields for one in found]
            if is_rule(cell.model):
                labels[name] = labels_of_rule(load_rule(cell.model, config.data.classes), cases, rows, name=cell.model)
            else:
                people = make_labelers(config.num_labelers, config.labelers, stream_seed(run.seed, cell.seed))
                labels[name] = labels_of_people(people, cases, [float(one.label) for one in found], seed=cell.seed)
    else:
        lm, read = open_model(config, cell.model), reading_of(run, config, cell, cell.model)
        training = training_of(config, cell).model_copy(update={"keep": "last", "loss": "naive"})
        model = train_classifier(lm, read.labelled("half_a"), training, stage=stage, seed=fit_seed(run, cell))
        half = f"half A of {cell.task}, seed {cell.seed}"
        labels = {name: labels_of_model(model, read.cases[name], half=half) for name in ("half_b", "valid", "test")}
    for name, given in labels.items():
        save_labels(stage.dir / f"{name}.jsonl", given)
    # A supervisor that only votes is right or wrong by the side of one half that it takes.
    return {"test": [float(np.log((one.p_one + 1e-9) / (1 - one.p_one + 1e-9))) for one in labels["test"]]}


def ceiling(run: Run, config: WeakToStrongConfig, cell: Cell, stage: Stage) -> dict[str, Any]:
    """Step 3: the strong model on the student's own half with the truth (the released code takes half A)."""
    lm, read = open_model(config, cell.model), reading_of(run, config, cell, cell.model)
    half = "half_a" if cell.method == "released" else "half_b"
    training = training_of(config, cell).model_copy(update={"loss": "naive"})
    return fine_tuned(
        run, cell, stage, lm, read, taught=read.labelled(half), valid=read.labelled("valid"), training=training
    )


def student(run: Run, config: WeakToStrongConfig, cell: Cell, stage: Stage) -> dict[str, Any]:
    """Step 2: the strong model on half B with the weak labels, by one method."""
    lm, read = open_model(config, cell.model), reading_of(run, config, cell, cell.model)
    weak, valid = weak_labels(run, config, cell, read)
    if cell.method == "probe":
        return {"test": probe_logits(lm, read, weak.targets)}
    if cell.method == "few_shot":
        return {"test": verdict_logits(lm, read.cases["test"], shots(config, weak, fit_seed(run, cell))).tolist()}
    if cell.method == "generative":
        known = [*read.cases["half_a"], *read.cases["half_b"]]
        texts = [one._replace(num_prompt_tokens=1) for case in known for one in encode_case(lm, case)]
        before = run.stage(f"{cell.name}/texts", run.config_hash)
        lm = train_on_texts(lm, texts, config.texts, stage=before, seed=fit_seed(run, cell))
    return fine_tuned(run, cell, stage, lm, read, taught=weak, valid=valid, training=training_of(config, cell))


def link(run: Run, config: WeakToStrongConfig, cell: Cell, stage: Stage) -> dict[str, Any]:
    """A step of bootstrapping: a model in between learns weak labels and makes those of the next.

    It labels each half of half B after learning the other, so that no label is of a case that its maker was taught;
    the validation cases get the second maker's. (The paper's chess models get fresh data at every step.)
    """
    lm, read = open_model(config, cell.model), reading_of(run, config, cell, cell.model)
    weak, valid = weak_labels(run, config, cell, read)
    cases, targets = read.cases["half_b"], list(weak.targets)
    made: list[WeakLabel] = []
    middle = len(cases) // 2
    for part, (taught, asked) in enumerate(
        ((slice(middle, None), slice(middle)), (slice(middle), slice(middle, None)))
    ):
        part_stage = run.stage(f"{cell.name}/part{part}", run.config_hash)
        one = Labelled(cases[taught], targets[taught])
        training = training_of(config, cell).model_copy(update={"loss": "naive"})
        model = train_classifier(lm, one, training, stage=part_stage, seed=fit_seed(run, cell), valid=valid)
        name = f"half B of {cell.task}, seed {cell.seed}, other part"
        made += labels_of_model(model, cases[asked], half=name)
        validation = labels_of_model(model, read.cases["valid"], half=name)
        logits = case_logits(model, read.cases["test"]).tolist()
    save_labels(stage.dir / "half_b.jsonl", made)
    save_labels(stage.dir / "valid.jsonl", validation)
    return {"test": logits}
