"""How close to what this machine can do: training against its matrix products, decoding against its memory.

Training: operations of SFT and reward-model updates (2 for each weight and token forwards, 4 backwards; attention over
the causal half; the unembedding at targets only) per second, over the measured rate of `torch.mm`. Decoding: weights
read once a step and keys and values read once a row and step, over the measured rate of copying memory; weights of a
small model stay in the processor's caches, so that the share may exceed one. Every rate is the median of several runs,
by wall clock and by CPU time.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import RESULTS, machine, write
from benchmarks.workloads import random_llama

REPEATS = 5
NUM_LAYERS, HIDDEN, VOCABULARY = 4, 256, 1024


def seconds_of(work: Callable[[], Any], repeats: int = REPEATS) -> dict[str, float]:
    """Return the median seconds of `work` after a warm-up, by wall clock and by CPU time per thread."""
    import torch

    work()
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append((time.process_time() - cpu) / torch.get_num_threads())
    return {"wall": statistics.median(walls), "cpu": statistics.median(cpus)}


def per_second(amount: float, seconds: dict[str, float]) -> dict[str, float]:
    """Return amount per second by both clocks."""
    return {clock: amount / value for clock, value in seconds.items()}


def share(achieved: dict[str, float], limit: dict[str, float]) -> dict[str, float]:
    """Return achieved over limit by both clocks."""
    return {clock: achieved[clock] / limit[clock] for clock in achieved}


def matrix_product_rate(dtype: Any, size: int = 1024) -> dict[str, float]:
    """Return floating-point operations per second of a square product."""
    import torch

    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return per_second(10 * 2.0 * size**3, seconds_of(lambda: [torch.mm(a, b) for _ in range(10)]))


def copy_rate(mebibytes: int = 256) -> dict[str, float]:
    """Return bytes per second of copying memory (each counted once)."""
    import torch

    source = torch.zeros(mebibytes * 2**18)
    target = torch.empty_like(source)
    return per_second(source.numel() * 4.0, seconds_of(lambda: target.copy_(source)))


def trunk_weights(model: Any) -> int:
    """Return the number of weights that every token multiplies: all matrices but the embeddings."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    return sum(p.numel() for name, p in matrices if "embed" not in name and "lm_head" not in name)


def training(lm: Any) -> dict[str, Any]:
    """Return operations per second of one update of SFT, 32 sequences of 64 to 256 tokens."""
    import random

    from qinglan.learn.sft import SFTConfig, update
    from qinglan.models.language_model import TokenSequence, copy_language_model

    rng = random.Random(0)
    lengths = [rng.randint(64, 256) for _ in range(32)]
    sequences = [TokenSequence([rng.randrange(VOCABULARY) for _ in range(n)], n // 3) for n in lengths]
    student = copy_language_model(lm)
    config = SFTConfig(max_tokens=2048)
    optimizer = config.optimizer.make(student.model)
    seconds = seconds_of(lambda: update(student, optimizer, sequences, [], config, 0, "limits"))
    num_targets = sum(n - n // 3 for n in lengths)
    attention = sum(4.0 * NUM_LAYERS * HIDDEN * n * n / 2 for n in lengths)
    forward = 2.0 * trunk_weights(lm.model) * sum(lengths) + 2.0 * HIDDEN * VOCABULARY * num_targets + attention
    return {"tokens_per_second": per_second(sum(lengths), seconds), "flops": per_second(3 * forward, seconds)}


def decoding(lm: Any, num_rows: int) -> dict[str, Any]:
    """Return bytes and operations per second of decoding 64 tokens in `num_rows` rows that all stay alive."""
    from qinglan.models.generate import SamplingConfig, generate

    prompt, new = 17, 64
    endless = lm._replace(chat=lm.chat._replace(end_ids=frozenset()))
    config = SamplingConfig(max_new_tokens=new)
    seconds = seconds_of(lambda: generate(endless, [[5] * prompt] * (num_rows // 8), config, seed=0, num_samples=8), 3)
    weights = trunk_weights(lm.model) + HIDDEN * VOCABULARY
    memory = sum(2.0 * NUM_LAYERS * HIDDEN * (prompt + step) for step in range(new)) * num_rows
    operations = 2.0 * weights * num_rows * new + 2.0 * memory
    return {
        "rows": num_rows,
        "tokens_per_second": per_second(num_rows * new, seconds),
        "bytes": per_second(4.0 * (weights * new + memory), seconds),
        "flops": per_second(operations, seconds),
    }


def main() -> None:
    """Measure and write results/limits.json."""
    import torch

    from qinglan.core.device import small_products

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    with small_products():  # MKL, PyTorch's default
        mkl = matrix_product_rate(torch.float32)
    lm = random_llama(NUM_LAYERS, HIDDEN, VOCABULARY)
    fp32, bf16, copying = matrix_product_rate(torch.float32), matrix_product_rate(torch.bfloat16), copy_rate()
    trained = training(lm)
    decoded = [decoding(lm, rows) for rows in (8, 64, 512)]
    found = {
        "limits": {"fp32_flops": fp32, "fp32_mkl_flops": mkl, "bf16_flops": bf16, "copied_bytes": copying},
        "training": trained | {"share_of_fp32": share(trained["flops"], fp32)},
        "decoding": [
            one | {"share_of_copying": share(one["bytes"], copying), "share_of_fp32": share(one["flops"], fp32)}
            for one in decoded
        ],
        "settings": machine() | {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]},
    }
    write(RESULTS / "limits.json", found)
    print(
        f"limits: training reaches {found['training']['share_of_fp32']['cpu']:.2f} of the fp32 matrix-product rate; "
        + "; ".join(
            f"decoding {one['rows']} rows {one['share_of_copying']['cpu']:.2f} of copying, "
            f"{one['share_of_fp32']['cpu']:.2f} of matrix products"
            for one in found["decoding"]
        )
        + " (by CPU time)",
        flush=True,
    )
