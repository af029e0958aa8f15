"""Which cells a weak-to-strong study consists of, wave by wave."""

from collections.abc import Iterator, Sequence

from qinglan.core.run import Run
from qinglan.evals.weak_to_strong import Admitted
from qinglan.recipes.weak_to_strong_answers import ANSWERING_METHODS, answer_sides, is_answering
from qinglan.recipes.weak_to_strong_config import WeakToStrongConfig
from qinglan.recipes.weak_to_strong_data import (
    OWN_FILE,
    cases_of,
    chain_of,
    open_model,
    records_cell,
    sides_of,
)
from qinglan.recipes.weak_to_strong_grid import Cell, is_model, short
from qinglan.supervisors.rules import is_rule, load_rule
from qinglan.supervisors.weak import labels_of_rule
from qinglan.tasks.base_models import resolve_model
from qinglan.tasks.judgements import TASKS as JUDGING
from qinglan.tasks.judgements import task_named

FIRST_ADMISSION_SEED = 1000
"""Admission has fine-tuning seeds of its own, far from those of the study."""


def tasks_of(config: WeakToStrongConfig) -> tuple[str, ...]:
    """Return the tasks: the user's file, or those of the built-in world."""
    return (OWN_FILE,) if config.data.file or config.comparisons else config.tasks


def check_input(config: WeakToStrongConfig, seed: int) -> None:
    """Open every model and rule and read the user's file, so that a mistake shows before the run's folder is made."""
    for name in dict.fromkeys((*config.weak, *config.strong, *config.steps_between)):
        if is_model(name):
            open_model(config, name)
        elif is_rule(name):
            load_rule(name, config.data.classes)
    for task in tasks_of(config):
        if task == OWN_FILE:
            test = sides_of(config, task, seed, 0).test
            for name in filter(is_rule, config.weak):
                rule = load_rule(name, config.data.classes)
                labels_of_rule(rule, [one.case for one in test], [one.fields for one in test], name=name)
        elif task == "lichess":
            answer_sides(config, task, seed, 0)
        elif not is_answering(task):
            task_named(task)


def add_inputs(run: Run, config: WeakToStrongConfig) -> None:
    """Note models and the user's files with their hashes, and the runs that made them."""
    for name in dict.fromkeys((*config.weak, *config.strong, *config.steps_between)):
        if is_model(name):
            run.add_input(f"model {name}", resolve_model(name))
    for name, path in {"data": config.data.file, "comparisons": config.comparisons, "puzzles": config.puzzles}.items():
        if path is not None:
            run.add_input(name, path)


# ---------------------------------------------------------------------------------------------------------- cells


def own_records(config: WeakToStrongConfig, seed: int) -> list[Cell]:
    """Return a cell for every model and every task in which models first write what they remember."""
    models = dict.fromkeys(name for name in (*config.weak, *config.strong, *config.steps_between) if is_model(name))
    asked = [
        task
        for task in tasks_of(config)
        if task in JUDGING and any(one.case.after_record is not None for one in cases_of(config, task, seed))
    ]
    return [records_cell(task, model) for task in asked for model in models]


def _anchors(config: WeakToStrongConfig, tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Return base and supervisor cells of tasks and seeds."""
    cells = []
    for task in tasks:
        for seed in seeds:
            cells += [Cell("base", task, strong, seed) for strong in config.strong]
            cells += [Cell("supervisor", task, weak, seed) for weak in config.weak]
    return cells


def trials(config: WeakToStrongConfig) -> list[Cell]:
    """Return the cells that admission rests on first: what supervisors and base models know."""
    return _anchors(config, tasks_of(config), admission_seeds(config))


def trial_ceilings(config: WeakToStrongConfig, so_far: Sequence[Admitted]) -> list[Cell]:
    """Return the ceilings of admission, where the rules that need none are kept, or where all tasks are studied."""
    chosen = [one for one in so_far if one.measured and (one.is_admitted or config.students == "all")]
    seeds = admission_seeds(config)
    return [Cell("ceiling", one.task, full_names(config, one)[1], s) for one in chosen for s in seeds]


def admission_seeds(config: WeakToStrongConfig) -> list[int]:
    """Return the fine-tuning seeds of admission."""
    return [FIRST_ADMISSION_SEED + number for number in range(config.admission.seeds)]


def chosen_pairs(config: WeakToStrongConfig, admission: Sequence[Admitted]) -> list[Admitted]:
    """Return the tasks with the pairs of models whose students are trained."""
    return [one for one in admission if one.is_admitted or (config.students == "all" and one.measured)]


def full_names(config: WeakToStrongConfig, one: Admitted) -> tuple[str, str]:
    """Return supervisor and student as the configuration names them."""
    by_name = {short(name): name for name in (*config.weak, *config.strong)}
    return by_name[one.weak], by_name[one.strong]


def floors_and_ceilings(config: WeakToStrongConfig, admission: Sequence[Admitted]) -> list[Cell]:
    """Return base, supervisor and ceiling cells of the study's seeds, those of the released code among them."""
    tasks = dict.fromkeys(one.task for one in chosen_pairs(config, admission))
    cells = _anchors(config, list(tasks), range(config.seeds))
    ceilings = dict.fromkeys((one.task, full_names(config, one)[1]) for one in chosen_pairs(config, admission))
    cells += [Cell("ceiling", task, strong, seed) for task, strong in ceilings for seed in range(config.seeds)]
    if config.released:
        cells += [
            cell._replace(method="released")
            for cell in cells
            if cell.role in ("supervisor", "ceiling") and not is_answering(cell.task)
        ]
    return cells


def methods_of(config: WeakToStrongConfig, task: str) -> list[str]:
    """Return the methods that make sense for a task."""
    if is_answering(task):
        return [method for method in config.methods if method in ANSWERING_METHODS]
    return [*config.methods, *(("released_naive", "released_confidence") if config.released else ())]


def makes_sense(config: WeakToStrongConfig, seed: int, one: Admitted, method: str) -> bool:
    """Return whether a method can be tried on a task by a pair of models; few-shot prompting wants texts with verdicts.

    Bootstrapping wants a model between the two.
    """
    if method == "bootstrap":
        return bool(chain_of(config, *full_names(config, one)))
    case = None if is_answering(one.task) else cases_of(config, one.task, seed)[0].case
    shown_as_text = case is not None and case.verdicts is not None and not case.messages and len(case.texts) == 1
    return method != "few_shot" or shown_as_text


def students(config: WeakToStrongConfig, admission: Sequence[Admitted]) -> Iterator[list[Cell]]:
    """Yield waves of cells: students of the supervisor, then link after link, then bootstrapped students."""
    direct: list[Cell] = []
    links: list[list[Cell]] = [[] for _ in config.steps_between]
    last: list[Cell] = []
    for one in chosen_pairs(config, admission):
        weak, strong = full_names(config, one)
        chain = chain_of(config, weak, strong)
        for seed in range(config.seeds):
            for method in methods_of(config, one.task):
                cell = Cell("student", one.task, strong, seed, weak=weak, method=method)
                if method != "bootstrap":
                    direct.append(cell)
                elif chain:
                    last.append(cell)
                    for level, model in enumerate(chain):
                        links[level].append(Cell("link", one.task, model, seed, weak=weak))
    yield from (wave for wave in (direct, *links, last) if wave)
