"""Run benchmarks: `python -m benchmarks [JOB ...] [--setting llama mini] [--dtype float32 bfloat16] [--pairs N]`."""

import argparse
import importlib
import os
import sys
from functools import partial
from pathlib import Path

from benchmarks.harness import DTYPES, ROOT, case_of, compare, compare_otherwise, report, tune, tuned_options
from benchmarks.peers import python_of_this_environment, python_with_old_trl
from benchmarks.workloads import SETTINGS, prepare

JOBS = ("reward", "sampling", "rloo", "ppo", "sft")
ALONE = ("limits", "growth", "attention")
"""Without a peer."""


def main() -> None:
    """Prepare the settings, tune both sides, run them by turns, write and print the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(JOBS + ALONE)}; default: all")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="of both sides' matrix products")
    parser.add_argument("--others", type=int, default=2, help="slices against the peer set otherwise; 0: none")
    parser.add_argument("--pairs", type=int, default=6, help="slices of each side, by turns")
    modes = {
        "always": "try every setting",
        "missing": "those not tried",
        "only": "and stop there",
        "never": "take what was found before, for bf16 in fp32 if need be",
    }
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
            for dtype in chosen.dtype:
                case = (job, setting, dtype, folder)
                if chosen.tune != "never":
                    tune(*case, partial(python_of, job), again=chosen.tune == "always")
                if chosen.tune == "only":
                    continue
                one = compare(*case, chosen.pairs, partial(python_of, job))
                if chosen.others and setting == "llama":
                    otherwise = partial(compare_otherwise, *case, chosen.others, partial(python_of, job))
                    defaults = getattr(importlib.import_module(f"benchmarks.{job}"), "PEER_DEFAULTS", None)
                    if defaults is not None:
                        one["ratio_to_peer_defaults"] = otherwise(defaults)
                    if dtype == "float32":
                        best = tuned_options(job, setting, dtype)["peer"]["best"]
                        one["ratio_to_peer_with_onednn"] = otherwise(best | {"onednn": True})
                found[case_of(setting, dtype)] = one
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
