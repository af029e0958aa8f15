"""One side of a benchmark in a process of its own: `python -m benchmarks.worker JOB SIDE FOLDER OPTIONS FD`.

Reads "run" from standard input, runs one slice of the job and writes a JSON line to file descriptor FD: units done,
seconds, CPU seconds. On "end" it writes how much memory it took. What libraries print goes to standard error.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.workloads import Workload


def memory_mib(name: str) -> float:
    """Return "VmHWM" (the highest) or "VmRSS" (at present) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}; this benchmark wants Linux")


def main() -> None:
    """Set a side up and run slices as asked."""
    job, side, folder, options, fd = sys.argv[1:]
    chosen = json.loads(options)
    out = os.fdopen(int(fd), "w", buffering=1)
    sys.stdout = sys.stderr
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(chosen.pop("threads", int(os.environ["OMP_NUM_THREADS"])))
    if chosen.pop("onednn", False):  # the peer with the products that ours chooses (core/device.py)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    work = Workload.load(Path(folder))
    make_slice = getattr(importlib.import_module(f"benchmarks.{job}"), side)(work, chosen)
    at_start = memory_mib("VmRSS")
    out.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        if line.strip() == "end":
            break
        run = make_slice()
        wall, cpu = time.perf_counter(), time.process_time()
        units = run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        out.write(json.dumps({"units": units, "seconds": wall, "cpu_seconds": cpu}) + "\n")
    peak = memory_mib("VmHWM")
    out.write(json.dumps({"peak_mib": peak, "start_mib": at_start}) + "\n")


if __name__ == "__main__":
    main()
