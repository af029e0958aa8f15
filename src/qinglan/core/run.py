"""A run's folder: configuration, lineage, metrics, samples, stages that are reused, and the report.

`runs/<name>/` holds config.yaml, lineage.json, metrics.jsonl, samples.jsonl, report.json, report.html and
`stages/<stage>/`. A stage is finished when its `done.json` is there; it is reused while the hashes of its
configuration and inputs are the same. A training stage killed midway resumes from its own
checkpoints (`learn/optimize.py`).
"""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self, TextIO

from pydantic import BaseModel

import qinglan
from qinglan.core.config import Config, to_yaml
from qinglan.core.errors import InputError
from qinglan.core.files import hash_of, read_json, sha256_of, write_json, write_text


class Measure(NamedTuple):
    """A measured value with its 95% interval, the number of items it stands on, and its unit."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return "not measured"
        if self.low is None or self.high is None:
            return f"{self.value:.3f} (n={self.n})"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


class Report(NamedTuple):
    """What `report.json` says: a contract for programs (docs/instruct_gpt.md)."""

    recipe: str
    seconds: float
    config_hash: str
    metrics: dict[str, Measure]
    rows: dict[str, Measure]
    """Keys floor, student, ceiling and gap_recovered."""
    alarms: list[str]
    unscored: int

    def to_json(self) -> dict[str, Any]:
        """Return the contract's mapping; values that are not finite become null."""
        measures = {name: _finite(measure) for name, measure in self.metrics.items()}
        rows = {name: _finite(measure) for name, measure in self.rows.items()}
        return {**self._asdict(), "metrics": measures, "rows": rows}


def _finite(measure: Measure) -> dict[str, Any]:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in measure._asdict().items()}
    return finite


class Progress(NamedTuple):
    """Shows one long piece of work on standard error: done, total, rate and time left."""

    name: str
    total: int
    started: float
    quiet: bool

    def show(self, done: int, note: str = "") -> None:
        """Print the state; on a terminal the line is rewritten, in a log a line appears about every ten percent."""
        if self.quiet or self.total == 0:
            return
        elapsed = time.monotonic() - self.started
        left = elapsed / max(done, 1) * (self.total - done)
        line = f"  {self.name:<24} {done:>6}/{self.total}  {elapsed:5.0f}s, {left:4.0f}s left  {note}"
        if sys.stderr.isatty():
            end = "\n" if done >= self.total else "\r"
            print(f"\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}", end=end, file=sys.stderr, flush=True)
        elif done >= self.total or done % max(1, self.total // 10) == 0:
            print(line, file=sys.stderr, flush=True)


class Stage(NamedTuple):
    """One stage's folder inside a run."""

    run: "Run"
    name: str
    dir: Path
    key: str
    """Hash of the stage's configuration and inputs."""

    @property
    def is_done(self) -> bool:
        """True if an earlier run finished this stage with the same configuration and inputs."""
        done = self.dir / "done.json"
        return done.is_file() and read_json(done)["key"] == self.key

    def result(self) -> dict[str, Any]:
        """Return the small JSON result that `finish` wrote."""
        return read_json(self.dir / "done.json")["result"]

    def finish(self, result: dict[str, Any] | None = None) -> None:
        """Mark the stage as done; `result` is a small JSON mapping."""
        write_json(self.dir / "done.json", {"key": self.key, "stage": self.name, "result": result or {}})
        self.run.save_clock()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to the run's metrics.jsonl."""
        self.run.log(self.name, step, metrics)

    def progress(self, total: int, name: str = "") -> Progress:
        """Return a progress line for `total` steps of this stage."""
        return Progress(name or self.name, total, time.monotonic(), self.run.quiet)


class Run:
    """An open run folder, until the end of its `with` block or of the process; one process at a time."""

    def __init__(self, directory: Path, config: Config, seed: int, recipe: str, quiet: bool = False) -> None:
        self.dir = Path(directory)
        self.config = config
        self.seed = seed
        self.recipe = recipe
        self.quiet = quiet
        self.config_hash = hash_of(config.model_dump(mode="json"))
        self.started = time.monotonic()
        clock = self.dir / "stages" / "clock.json"
        self.earlier_seconds: float = read_json(clock)["seconds"] if clock.is_file() else 0.0
        self.inputs: dict[str, str] = {}
        self.parents: dict[str, dict[str, Any]] = {}
        self._lock: TextIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()

    @classmethod
    def open(
        cls, directory: Path, config: Config, *, seed: int, recipe: str, resume: bool = False, quiet: bool = False
    ) -> Self:
        """Open or create a run folder.

        Raises `InputError` where the folder holds a run with another configuration or seed, or an earlier run and
        `resume` is False, or is in use by another process.
        """
        run = cls(directory, config, seed, recipe, quiet)
        config_file = run.dir / "config.yaml"
        text = to_yaml(config, seed)
        if config_file.is_file():
            if not resume:
                raise InputError(
                    f"{run.dir}: holds a run already; add --resume to go on with it, or choose another --out"
                )
            run._check_seed()
            if _settings(config_file.read_text(encoding="utf-8")) != _settings(text):
                raise InputError(
                    f"{run.dir}: holds a run with another configuration (see {config_file}); choose another --out"
                )
        elif run.dir.is_dir() and any(run.dir.iterdir()):
            raise InputError(f"{run.dir}: is not empty and holds no run; choose another --out")
        write_text(config_file, text)
        run._lock = run._take_lock()
        run._write_lineage()
        return run

    def _check_seed(self) -> None:
        """Raise `InputError` for another seed than the run began with, with which all its stages would be emptied."""
        lineage = self.dir / "lineage.json"
        if lineage.is_file() and (before := read_json(lineage)["seed"]) != self.seed:
            raise InputError(
                f"{self.dir}: holds a run with seed {before}, not {self.seed}; go on with --seed {before}, or choose "
                "another --out"
            )

    def _take_lock(self) -> TextIO:
        lock = (self.dir / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise InputError(
                f"{self.dir}: another process is working in this folder; wait for it or choose another --out"
            ) from error
        return lock

    def _write_lineage(self) -> None:
        write_json(
            self.dir / "lineage.json",
            {
                "recipe": self.recipe,
                "command": sys.argv,
                "config_hash": self.config_hash,
                "seed": self.seed,
                "code": code_version(),
                "inputs": self.inputs,
                "parents": self.parents,
                "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

    def add_input(self, name: str, path: Path) -> str:
        """Record an input's hash, and the run that made it, in lineage.json; return the former.

        Raises `InputError` if the input is not there.
        """
        if not Path(path).exists():
            raise InputError(f"{name}: {path}: no such file or folder")
        self.inputs[name] = f"{path} sha256:{sha256_of(Path(path))}"
        if (parent := _run_that_made(Path(path))) is not None:
            self.parents[name] = parent
        self._write_lineage()
        return self.inputs[name]

    def stage(self, name: str, *parts: Any) -> Stage:
        """Return the stage `name`, keyed by `parts`: its configuration and whatever else decides its result.

        Parts are configurations, JSON-like values, or `Stage`s whose artefacts it reads. An unfinished or outdated
        stage with another key is emptied.
        """
        key = hash_of([self.seed, name, [_part_key(part) for part in parts]])
        stage = Stage(self, name, self.dir / "stages" / name, key)
        key_file = stage.dir / "key"
        if not key_file.is_file() or key_file.read_text() != key:
            if stage.dir.exists():
                shutil.rmtree(stage.dir)
            write_text(key_file, key)
        return stage

    def finished(self, stage: str) -> dict[str, Any]:
        """Return the small result of a finished stage."""
        return read_json(self.dir / "stages" / stage / "done.json")["result"]

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line of metrics; on reading, a step logged again after a resume replaces the earlier line."""
        line = json.dumps({"stage": stage, "step": step, **metrics})
        with (self.dir / "metrics.jsonl").open("ab+") as out:
            if out.tell() and out.seek(-1, os.SEEK_END) and out.read(1) != b"\n":
                line = f"\n{line}"  # a crash cut the last line short: it must not swallow this one
            out.write(f"{line}\n".encode())

    def metrics(self, stage: str) -> list[dict[str, float]]:
        """Return the metrics of a stage in order of step, the last line of each step winning."""
        path = self.dir / "metrics.jsonl"
        if not path.is_file():
            return []
        rows: dict[int, dict[str, float]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line cut short by a crash; its step is logged again after the resume
            if row["stage"] == stage:
                rows[row["step"]] = row
        return [rows[step] for step in sorted(rows)]

    def elapsed(self) -> float:
        """Return seconds since the run was opened, added to those of earlier openings up to a finished stage."""
        return self.earlier_seconds + time.monotonic() - self.started

    def save_clock(self) -> None:
        """Remember the time spent so far, for a run that is opened again."""
        write_json(self.dir / "stages" / "clock.json", {"seconds": self.elapsed()})

    def write_report(self, report: Report) -> Path:
        """Write report.json and return its path."""
        write_json(self.dir / "report.json", report.to_json())
        return self.dir / "report.json"


def _run_that_made(path: Path) -> dict[str, Any] | None:
    """Return folder, recipe, configuration's hash and seed of the run in whose folder an input lies; None for none."""
    for folder in path.resolve().parents:
        if (folder / "lineage.json").is_file() and (folder / "config.yaml").is_file():
            try:
                made = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))
            except ValueError:
                made = None  # damaged: the input is what counts, and its hash is kept
            if isinstance(made, dict):
                return {"run": str(folder)} | {key: made.get(key) for key in ("recipe", "config_hash", "seed")}
    return None


def _settings(text: str) -> list[str]:
    """Return the lines of a config.yaml but the seed's, which has a check of its own and older runs lack."""
    return [line for line in text.splitlines() if not line.startswith("seed: ")]


def _part_key(part: Any) -> Any:
    if isinstance(part, Stage):
        return part.key
    if isinstance(part, BaseModel):
        return part.model_dump(mode="json")
    return part


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `work` returns and the seconds it took."""
    started = time.monotonic()
    return work(), time.monotonic() - started


def code_version() -> dict[str, str]:
    """Return the versions that decide a result: this package, its git revision if any, Python, torch, transformers."""
    root = Path(__file__).resolve().parents[3]
    revision = ""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    return {
        "qinglan": qinglan.__version__,
        "git": revision,
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))),
        **versions,
    }
