"""Run benchmarks: `python -m benchmarks [JOB ...] [--setting llama mini] [--pairs N] [--no-tune | --only-tune]`."""

import argparse
import importlib
import os
import sys
from pathlib import Path

from benchmarks.harness import ROOT, compare, report, tune
from benchmarks.peers import python_of_this_environment, python_with_old_trl
from benchmarks.workloads import SETTINGS, prepare

JOBS = ("reward", "sampling", "rloo", "ppo", "sft")
ALONE = ("limits", "growth")
"""Without a peer."""


def main() -> None:
    """Prepare the settings, tune both sides, run them by turns, write and print the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(JOBS + ALONE)}; default: all")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--pairs", type=int, default=6, help="slices of each side, by turns")
    modes = {"always": "try every setting", "missing": "those not tried", "only": "and stop there"}
    parser.add_argument("--tune", choices=modes, default="always", help=str(modes))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="models, data and logs")
    chosen = parser.parse_args()
    unknown = set(chosen.jobs) - set(JOBS + ALONE)
    if unknown:
        parser.error(f"no such job: {', '.join(sorted(unknown))}; expected some of {', '.join(JOBS + ALONE)}")
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    for job in chosen.jobs or JOBS + ALONE:
        if job in ALONE:
            importlib.import_module(f"benchmarks.{job}").main()
            continue
        found = {}
        for setting in chosen.setting:
            folder = chosen.work / setting
            if not (folder / "workload.json").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                prepare(setting, folder)
            tune(job, setting, folder, lambda side, job=job: python_of(job, side), again=chosen.tune == "always")
            if chosen.tune != "only":
                found[setting] = compare(job, setting, folder, chosen.pairs, lambda side, job=job: python_of(job, side))
        if found:
            report(job, found)


def python_of(job: str, side: str) -> str:
    """Return the interpreter for one side of a job."""
    if side == "ours":
        return sys.executable
    uses_old = getattr(importlib.import_module(f"benchmarks.{job}"), "USES_OLD_TRL", False)
    return python_with_old_trl() if uses_old else python_of_this_environment()


if __name__ == "__main__":
    main()
