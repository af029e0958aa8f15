"""Both sides of a job by turns, each in its own process, and what is written about them.

A ratio above 1 means that ours does more units a second. It is the ratio of the medians over pairs of slices, one of
each side right after the other, with a 95% bootstrap interval over pairs. Beside it stands the ratio by CPU time, which
other work on the machine disturbs less. `memory_ratio` is ours / peer in peak memory: below 1 ours needs less.

Both sides of a comparison have the same precision of matrix products, `dtype`. The peer is compared in the fastest
settings that were found; where its own defaults are others, `ratio_to_peer_defaults` is measured beside.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import select
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TUNING = RESULTS / "tuning"
PATIENCE = float(os.environ.get("QINGLAN_BENCH_PATIENCE", "300"))
"""Longest slice, in seconds; a peer's setting that takes longer counts as failed."""


class Slice(NamedTuple):
    """One timed run of one side."""

    units: float
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Units per second of wall clock."""
        return self.units / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Units per second of CPU."""
        return self.units / self.cpu_seconds


class Side:
    """A running worker process."""

    def __init__(self, job: str, side: str, folder: Path, options: dict[str, Any], python: str) -> None:
        self.log = folder / f"{job}-{side}.log"
        read_end, write_end = os.pipe()
        command = [python, "-m", "benchmarks.worker", job, side, str(folder), json.dumps(options), str(write_end)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "HF_HUB_OFFLINE": "1"}
        environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=log, pass_fds=[write_end], cwd=ROOT, env=environment, text=True
            )
        os.close(write_end)
        self.answers = os.fdopen(read_end)
        self.read()

    def read(self) -> dict[str, Any]:
        """Return the next answer; stop with the end of the log where there is none."""
        ready, _, _ = select.select([self.answers], [], [], PATIENCE)
        line = self.answers.readline() if ready else ""
        if not line:
            if not ready:
                self.process.kill()
                self.process.wait()
                raise SystemExit(f"benchmarks: {self.log.stem}: a slice took more than {PATIENCE} seconds")
            self.process.wait()
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise SystemExit(f"benchmarks: {self.log.stem} failed:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, word: str) -> dict[str, Any]:
        """Send a word and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.read()

    def run(self) -> Slice:
        """Run one slice."""
        return Slice(**self.tell("run"))

    def end(self) -> dict[str, float]:
        """End the process; return its memory in MiB."""
        memory = self.tell("end")
        self.process.wait()
        self.answers.close()
        return memory


class Ratio(NamedTuple):
    """Ours over the peer, with a 95% interval."""

    value: float
    low: float
    high: float


def ratio_of(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Return the ratio of medians of paired rates; the interval resamples pairs 10,000 times."""
    first, second = np.asarray(ours), np.asarray(peer)
    draws = np.random.default_rng(0).integers(0, len(first), size=(10_000, len(first)))
    ratios = np.median(first[draws], axis=1) / np.median(second[draws], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Ratio(float(np.median(first) / np.median(second)), float(low), float(high))


DTYPES = ("float32", "bfloat16")


def case_of(setting: str, dtype: str) -> str:
    """Return the name of a setting in a precision, as the results files have it: "llama", "llama-bfloat16"."""
    return setting if dtype == "float32" else f"{setting}-{dtype}"


def tuned_options(job: str, setting: str, dtype: str) -> dict[str, Any]:
    """Return what `tune` found, in this precision or, where nothing was tried in it, in fp32."""
    names = [case_of(setting, dtype), setting]
    paths = [TUNING / f"{job}-{name}.json" for name in names if (TUNING / f"{job}-{name}.json").is_file()]
    found: dict[str, Any] = json.loads(paths[0].read_text(encoding="utf-8"))
    return found


def tune(job: str, setting: str, dtype: str, folder: Path, python_of: Callable[[str], str], *, again: bool) -> None:
    """Try every candidate setting of both sides, warmed up; write the rates and the best of each side.

    The best is the fastest that computes the same as the other side ("differs" names what does not) and takes no more
    memory than it ("memory" names what does, "memory float32" what does in fp32). Without `again` what was tried before
    stays.
    """
    module = importlib.import_module(f"benchmarks.{job}")
    path = TUNING / f"{job}-{case_of(setting, dtype)}.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if again is False and path.is_file() else {}
    found: dict[str, Any] = {"load_average": os.getloadavg(), "threads": int(os.environ["OMP_NUM_THREADS"])} | earlier
    for name, candidates in (("ours", module.OURS[setting]), ("peer", module.PEER[setting])):
        if len(candidates) == 1:  # nothing to choose; what was best in the other setting
            found[name] = {"tried": [], "best": candidates[0]}
            write(path, found)
            continue
        tried = [done for done in found.get(name, {}).get("tried", []) if done["options"] in candidates]
        for options in [one for one in candidates if one not in [done["options"] for done in tried]]:
            try:
                side = Side(job, name, folder, options | {"dtype": dtype}, python_of(name))
                side.run()  # warm-up: a first run can be half as fast
                measured = side.run()
                side.end()
                rates = {"rate": measured.rate, "cpu_rate": measured.cpu_rate}
            except SystemExit as error:  # a setting that the peer does not support is part of the finding
                rates = {"failed": str(error).splitlines()[-1]}
            tried.append({"options": options, **rates})
            print(f"  {job}/{setting} {name} {json.dumps(options)}: {rates}", file=sys.stderr, flush=True)
            write(path, found | {name: {"tried": tried, "best": best_of(tried, dtype)}})
        found[name] = {"tried": tried, "best": best_of(tried, dtype)}
        write(path, found)


def best_of(tried: Sequence[dict[str, Any]], dtype: str) -> dict[str, Any] | None:
    """Return the options of the fastest run by CPU time among those that may be compared, or None."""
    barred = {"bf16", "differs", "memory", f"memory {dtype}"}
    working = [one for one in tried if "rate" in one and not one["options"].keys() & barred]
    best: dict[str, Any] | None = max(working, key=lambda one: one["cpu_rate"])["options"] if working else None
    return best


def compare(
    job: str, setting: str, dtype: str, folder: Path, pairs: int, python_of: Callable[[str], str]
) -> dict[str, Any]:
    """Run both sides by turns with the best settings that `tune` found; return what is written about them."""
    tuned = tuned_options(job, setting, dtype)
    chosen = {name: tuned[name]["best"] | {"dtype": dtype} for name in ("ours", "peer")}
    sides = {name: Side(job, name, folder, chosen[name], python_of(name)) for name in ("ours", "peer")}
    for side in sides.values():  # warm-up
        side.run()
    slices: dict[str, list[Slice]] = {"ours": [], "peer": []}
    loads = [os.getloadavg()[0]]
    for turn in range(pairs):
        for name in ("ours", "peer") if turn % 2 == 0 else ("peer", "ours"):
            slices[name].append(sides[name].run())
        loads.append(os.getloadavg()[0])
    memory = {name: side.end() for name, side in sides.items()}
    wall = ratio_of([s.rate for s in slices["ours"]], [s.rate for s in slices["peer"]])
    cpu = ratio_of([s.cpu_rate for s in slices["ours"]], [s.cpu_rate for s in slices["peer"]])
    above = {name: found["peak_mib"] - found["start_mib"] for name, found in memory.items()}
    return {
        "ratio": wall._asdict(),
        "cpu_ratio": cpu._asdict(),
        "memory_ratio": memory["ours"]["peak_mib"] / memory["peer"]["peak_mib"],
        "memory_ratio_above_start": above["ours"] / max(above["peer"], 1.0),
        **{name: _summary(slices[name], memory[name], chosen[name]) for name in ("ours", "peer")},
        "settings": {"model": setting, "dtype": dtype, "threads": int(os.environ["OMP_NUM_THREADS"])},
        "load_average": loads,
    }


def compare_otherwise(
    job: str,
    setting: str,
    dtype: str,
    folder: Path,
    pairs: int,
    python_of: Callable[[str], str],
    peer_options: dict[str, Any],
) -> dict[str, Any]:
    """Run both sides by turns, the peer with other options than those compared; return what is written about that."""
    ours = tuned_options(job, setting, dtype)["ours"]["best"] | {"dtype": dtype}
    theirs = peer_options | {"dtype": dtype}
    sides = [Side(job, "ours", folder, ours, python_of("ours")), Side(job, "peer", folder, theirs, python_of("peer"))]
    for side in sides:  # warm-up
        side.run()
    slices = [[side.run() for side in sides] for _ in range(pairs)]
    for side in sides:
        side.end()
    rates = [[pair[place].cpu_rate for pair in slices] for place in (0, 1)]
    return {
        "cpu_ratio": ratio_of(*rates)._asdict(),
        "options": theirs,
        "median_per_cpu_second": statistics.median(rates[1]),
    }


def _summary(slices: Sequence[Slice], memory: dict[str, float], options: dict[str, Any]) -> dict[str, Any]:
    return {
        "median": statistics.median(s.rate for s in slices),
        "median_per_cpu_second": statistics.median(s.cpu_rate for s in slices),
        "slices": [s._asdict() for s in slices],
        **memory,
        "options": options,
    }


def report(job: str, by_setting: dict[str, dict[str, Any]]) -> None:
    """Print the ratios of a job and write results/<job>.json; on top stands Llama in fp32, our default on a CPU."""
    module = importlib.import_module(f"benchmarks.{job}")
    path = RESULTS / f"{job}.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["by_setting"] if path.is_file() else {}
    every = earlier | by_setting
    on_top = next(name for name in ("llama", *every) if name in every)
    first = every[on_top]
    head = {"job": job, **{name: first[name] for name in ("ratio", "memory_ratio")}}
    head |= {"ours": first["ours"]["median"], "peer": first["peer"]["median"], "unit": module.UNIT}
    settings = {"peer": module.PEER_NAME, "must_reach": module.MUST_REACH, "aim": module.AIM, **machine()}
    settings |= first.get("settings", {"model": "llama", "dtype": "float32"})
    for name in ("cpu_ratio", "ratio_to_peer_defaults", "ratio_to_peer_with_onednn"):
        head |= {name: first[name]} if name in first else {}
    write(path, head | {"settings": settings, "by_setting": every})
    for setting, found in by_setting.items():
        ratio = found["ratio"]
        print(
            f"{job}/{setting}: {ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] by wall clock, "
            f"{found['cpu_ratio']['value']:.2f}x by CPU; memory {found['memory_ratio']:.2f}x of the "
            f"peer's; {found['ours']['median']:.4g} against {found['peer']['median']:.4g} {module.UNIT}",
            flush=True,
        )


def machine() -> dict[str, Any]:
    """Return what a number depends on: processor, cores, versions."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"processor": model, "cores": len(os.sched_getaffinity(0)), **versions}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with rounded numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(content), indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
