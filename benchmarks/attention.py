"""Attention, forward and backward, of rows from 82 to 1,024 tokens: PyTorch's kernel, `block_attention`, and ours.

8 heads of 32 units, 1,024 to 2,000 tokens in all; the least CPU milliseconds of several runs, since neighbours on the
machine only add to it. Our kernel turns queries and keys by their positions as well, the others do not.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import RESULTS, machine, write

SHAPES = ((24, 82), (8, 128), (4, 256), (2, 512), (1, 1024))
HEADS, UNITS, REPEATS = 8, 32, 4


def milliseconds(run: Callable[[], Any]) -> float:
    """Return the least CPU time of a run, after one to warm up."""
    found = []
    for _ in range(REPEATS + 1):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return 1e3 * min(found[1:])


def ways(num_rows: int, num_tokens: int, dtype: Any) -> dict[str, Callable[[], None]]:
    """Return what is measured, by name."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from qinglan.core.device import small_products
    from qinglan.models import kernels
    from qinglan.models.attention import block_attention, plan_blocks

    shape = (num_rows, num_tokens, HEADS, UNITS)
    query, key, value, gradient = (torch.randn(shape, dtype=dtype) for _ in range(4))
    leaves = [part.requires_grad_() for part in (query, key, value)]
    # As in a model: [rows, tokens, heads, units] seen as [rows, heads, tokens, units].
    by_heads, towards = [part.transpose(1, 2) for part in leaves], gradient.transpose(1, 2)
    runs = kernels.Runs.of([num_tokens] * num_rows)
    angles = torch.randn(num_rows * num_tokens, UNITS)

    def fused() -> None:
        with small_products():  # by MKL, as PyTorch comes; by oneDNN short rows are far slower
            scaled_dot_product_attention(*by_heads, is_causal=True).backward(towards)

    def products() -> None:
        blocks = plan_blocks(None, num_tokens, num_tokens, dtype)
        block_attention(*by_heads, blocks, UNITS**-0.5).backward(towards)

    def kernel() -> None:
        tokens = [part.flatten(0, 1) for part in leaves]
        rotation = kernels.Rotation(angles.cos(), angles.sin())
        kernels.attend(*tokens, runs, rotation, UNITS**-0.5).backward(gradient.flatten(0, 1))

    return {"fused": fused, "products": products, "kernel": kernel}


def main() -> None:
    """Measure and write results/attention.json."""
    import torch

    from qinglan.core.device import Device

    torch.set_num_threads(1)
    Device.detect("cpu", "float32")
    rows = []
    for num_rows, num_tokens in SHAPES:
        row: dict[str, Any] = {"rows": num_rows, "tokens": num_tokens}
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for name, run in ways(num_rows, num_tokens, dtype).items():
                row[f"{name}_{precision}"] = milliseconds(run)
        rows.append(row)
        print(f"attention: {row}", flush=True)
    settings = machine() | {"heads": HEADS, "units": UNITS, "threads": 1, "load_average": os.getloadavg()[0]}
    write(RESULTS / "attention.json", {"unit": "CPU ms, forward and backward", "rows": rows, "settings": settings})


if __name__ == "__main__":
    main()
