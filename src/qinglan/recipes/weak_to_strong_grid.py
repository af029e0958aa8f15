"""The cells of a weak-to-strong grid: their names, their data, and how they are run, several at a time and only once.

A cell is one supervisor, ceiling or student of one task and seed. It is a stage of the run: finished ones are reused,
one that was stopped goes on from its checkpoint, and one whose input is bad is left out with its reason while the
others go on.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qinglan.core.device import Device, prepare_process
from qinglan.core.errors import InputError
from qinglan.core.files import read_json, write_json
from qinglan.core.run import Progress, Run, Stage
from qinglan.recipes.weak_to_strong_config import WeakToStrongConfig
from qinglan.supervisors.rules import is_rule


class Cell(NamedTuple):
    """One piece of work."""

    role: str
    """records, base, supervisor, ceiling, link or student."""
    task: str
    model: str
    seed: int
    weak: str = ""
    """The supervisor, of links and students."""
    method: str = ""

    @property
    def name(self) -> str:
        """The cell's stage."""
        parts = [self.role, short(self.weak), short(self.model), self.method, f"seed{self.seed}"]
        return f"cells/{self.task}/{'-'.join(part for part in parts if part)}"


Work = Callable[[Run, WeakToStrongConfig, Cell], None]


def short(model: str) -> str:
    """Return a model's or rule's name for metrics and folders: the last part of a path, the kind of a rule."""
    if is_rule(model):
        kind, _, rest = model.partition(":")
        return rest if kind == "column" else kind
    return Path(model).name


def is_model(name: str) -> bool:
    """Return whether a supervisor is a model, and not a rule or people."""
    return not is_rule(name) and name != "labelers"


# -------------------------------------------------------------------------------------------------------- running


def run_cells(run: Run, config: WeakToStrongConfig, cells: Sequence[Cell], work: Work, title: str) -> None:
    """Do every cell that is not done, with progress and time left; bad input leaves a reason in the cell's folder."""
    cells = list(dict.fromkeys(cells))
    progress = Progress(title, len(cells), time.monotonic(), run.quiet)
    todo = [cell for cell in cells if not is_done(run, cell)]
    finished = len(cells) - len(todo)
    workers = min(num_workers(config), len(todo))
    attempt = partial(attempt_cell, run.dir, config, run.seed, work)
    if workers <= 1:
        for cell in todo:
            attempt(cell)
            finished += 1
            _show(progress, finished, len(cells) - len(todo), cell)
        run.save_clock()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_worker) as pool:
        futures = {pool.submit(attempt, cell): cell for cell in todo}
        for future in as_completed(futures):
            future.result()
            finished += 1
            _show(progress, finished, len(cells) - len(todo), futures[future])
    run.save_clock()


def _show(progress: Progress, finished: int, reused: int, cell: Cell) -> None:
    progress._replace(total=progress.total - reused).show(finished - reused, cell.name.removeprefix("cells/"))


def num_workers(config: WeakToStrongConfig) -> int:
    """Return how many processes work at a time."""
    if config.workers:
        return config.workers
    return 1 if Device.detect(config.device).torch_device.type != "cpu" else len(os.sched_getaffinity(0))


def prepare_worker() -> None:
    """Give a worker process one thread: as many processes as cores are busy already."""
    os.environ["OMP_NUM_THREADS"] = "1"
    prepare_process()
    torch.set_num_threads(1)


def attempt_cell(directory: Path, config: WeakToStrongConfig, seed: int, work: Work, cell: Cell) -> None:
    """Do one cell in whatever process this is; the run's folder is open in the main one."""
    run = Run(directory, config, seed, "weak-to-strong", quiet=True)
    try:
        work(run, config, cell)
        (run.dir / "stages" / cell.name / "left_out.json").unlink(missing_ok=True)
    except InputError as error:
        write_json(run.dir / "stages" / cell.name / "left_out.json", {"reason": str(error)})


def is_done(run: Run, cell: Cell) -> bool:
    """Return whether a cell's result is there; a run folder holds one configuration only."""
    return (run.dir / "stages" / cell.name / "done.json").is_file()


def result_of(run: Run, cell: Cell) -> dict[str, Any] | None:
    """Return what a cell left, or None where it could not be done."""
    return run.finished(cell.name) if is_done(run, cell) else None


def reason_of(run: Run, cell: Cell) -> str | None:
    """Return why a cell was left out, if it was."""
    file = run.dir / "stages" / cell.name / "left_out.json"
    return str(read_json(file)["reason"]) if file.is_file() else None


def open_stage(run: Run, config: WeakToStrongConfig, cell: Cell) -> Stage:
    """Return the cell's stage; its key is the configuration, of which a run has one only."""
    return run.stage(cell.name, run.config_hash, cell._asdict())


def finish(stage: Stage, config: WeakToStrongConfig, result: dict[str, Any]) -> None:
    """Mark a cell as done; its models are removed unless they are to be kept."""
    if not config.keep_models:
        for directory in [stage.dir / "model", *stage.dir.glob("*/model")]:
            shutil.rmtree(directory, ignore_errors=True)
    write_json(stage.dir / "done.json", {"key": stage.key, "stage": stage.name, "result": result})
