"""What the cells of a weak-to-strong grid read: models, cases, sides, and what each model remembers by itself."""

from functools import lru_cache
from typing import NamedTuple

from qinglan.core.device import Device
from qinglan.core.errors import InputError
from qinglan.core.files import read_json, write_json
from qinglan.core.records import Case, pairs_of, record_id
from qinglan.core.rng import stream_seed
from qinglan.core.run import Run
from qinglan.data.labelled import LabelledCase, Sides, Sizes, load_labelled, split_sides
from qinglan.data.load import load_comparisons
from qinglan.learn.labelled import Labelled
from qinglan.models.cases import case_length, write_records
from qinglan.models.language_model import LanguageModel, load_language_model, max_context
from qinglan.recipes.weak_to_strong_config import WeakToStrongConfig
from qinglan.recipes.weak_to_strong_grid import Cell, finish, is_model, open_stage, short
from qinglan.tasks.base_models import resolve_model
from qinglan.tasks.judgements import draw_cases

OWN_FILE = "your_data"
"""Name of the task that a file of texts or comparisons makes."""


@lru_cache(maxsize=4)
def open_model(config: WeakToStrongConfig, name: str) -> LanguageModel:
    """Return a base model, loaded once in a process."""
    lm = load_language_model(resolve_model(name), Device.detect(config.device, config.dtype), template=config.template)
    return lm._replace(name=short(name))


@lru_cache(maxsize=8)
def cases_of(config: WeakToStrongConfig, task: str, seed: int) -> tuple[LabelledCase, ...]:
    """Return all cases of a task, the same for every cell of a run; those of files that are too long are left out."""
    if task != OWN_FILE:
        wanted = 2 * config.num_half + config.num_valid + config.num_test
        return tuple(draw_cases(task, int(1.25 * wanted), seed))
    items = load_labelled(config.data) if config.comparisons is None else _pairs(config)
    models = [name for name in (*config.weak, *config.strong) if is_model(name)]
    readers = [open_model(config, name) for name in dict.fromkeys(models)]
    fits = [all(case_length(lm, one.case) <= max_context(lm.model) for lm in readers) for one in items]
    if not all(fits) and config.data.on_bad == "stop":
        first = next(one for one, fit in zip(items, fits, strict=True) if not fit)
        raise InputError(
            f"{config.data.file or config.comparisons}: text {first.case.texts[0][:40]!r}... exceeds the context of a "
            f"model; {fits.count(False)} of {len(items)} texts do; shorten them, or leave them out with "
            "--data.on-bad skip"
        )
    return tuple(one for one, fit in zip(items, fits, strict=True) if fit)


def _pairs(config: WeakToStrongConfig) -> list[LabelledCase]:
    """Return every decided pair of a file of comparisons as a case of two texts, better and worse in random order."""
    assert config.comparisons is not None
    found = []
    for group in load_comparisons(config.comparisons, on_bad=config.data.on_bad).records:
        pairs = [pair for pair in pairs_of(group.comparison.label) if pair.p_first_better != 0.5]
        for pair in pairs:
            texts = (group.completions[pair.first].text, group.completions[pair.second].text)
            name, label = record_id("case", group.comparison.id, *texts), int(pair.p_first_better > 0.5)
            if stream_seed(0, "pair", name) % 2:
                texts, label = texts[::-1], 1 - label
            found.append(LabelledCase(Case(name, group.prompt.prompt_group_id, texts, group.prompt.messages), label))
    return found


@lru_cache(maxsize=8)
def sides_of(config: WeakToStrongConfig, task: str, run_seed: int, seed: int, is_balanced: bool = True) -> Sides:
    """Return the four sides of a task for one fine-tuning seed; the test side is the same for all, and balanced."""
    sizes = Sizes(config.num_half, config.num_valid, config.num_test)
    items = cases_of(config, task, run_seed)
    draw = stream_seed(run_seed, "halves", seed)
    return split_sides(items, sizes, seed=draw, test_seed=run_seed, where=task, balance_training=is_balanced)


def records_cell(task: str, model: str) -> Cell:
    """Return the cell in which a model writes its own records of a task's cases, before anything is trained."""
    return Cell("records", task, model, 0)


def write_own_records(run: Run, config: WeakToStrongConfig, cell: Cell) -> None:
    """Let a model write what it remembers to every case of a task that asks for it; texts by case."""
    stage = open_stage(run, config, cell)
    asked = [one.case for one in cases_of(config, cell.task, run.seed) if one.case.after_record is not None]
    written = write_records(open_model(config, cell.model), asked)
    write_json(stage.dir / "records.json", {case.id: case.texts[0] for case in written})
    finish(stage, config, {"written": len(written)})


def reading_of(run: Run, config: WeakToStrongConfig, cell: Cell, model: str) -> "Reading":
    """Return the sides of a cell as one model reads them: with its own record where the task asks for one."""
    sides = sides_of(config, cell.task, run.seed, cell.seed, not cell.method.startswith("released"))
    file = run.dir / "stages" / records_cell(cell.task, model).name / "records.json"
    texts = read_json(file) if file.is_file() else {}

    def reading(case: Case) -> Case:
        return case._replace(texts=(texts[case.id],), after_record=None) if case.id in texts else case

    cases = {name: [reading(one.case) for one in found] for name, found in sides._asdict().items()}
    return Reading(cases, {name: [float(one.label) for one in found] for name, found in sides._asdict().items()})


class Reading(NamedTuple):
    """Cases and true classes of each side, by its name: half_a, half_b, valid, test."""

    cases: dict[str, list[Case]]
    truth: dict[str, list[float]]

    def labelled(self, side: str) -> Labelled:
        """Return a side with its true labels."""
        return Labelled(self.cases[side], self.truth[side])


def chain_of(config: WeakToStrongConfig, weak: str, strong: str) -> list[str]:
    """Return the models between supervisor and student by number of parameters, smallest first."""
    least, most = num_parameters(config, weak), num_parameters(config, strong)
    sizes = {name: num_parameters(config, name) for name in config.steps_between}
    return sorted((name for name in sizes if least < sizes[name] < most), key=lambda name: sizes[name])


def num_parameters(config: WeakToStrongConfig, name: str) -> int:
    """Return a model's number of parameters; of people and rules 0."""
    return sum(p.numel() for p in open_model(config, name).model.parameters()) if is_model(name) else 0


def labeller_of(config: WeakToStrongConfig, cell: Cell) -> Cell:
    """Return the cell that makes the weak labels of a student or link."""
    first = Cell("supervisor", cell.task, cell.weak, cell.seed, method="released" if "released" in cell.method else "")
    if cell.role == "student" and cell.method != "bootstrap":
        return first
    before = chain_of(config, cell.weak, cell.model)
    return Cell("link", cell.task, before[-1], cell.seed, weak=cell.weak) if before else first
