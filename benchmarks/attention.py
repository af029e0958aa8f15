"""Attention, forward and backward, of rows from 82 to 1,024 tokens: PyTorch's fused kernel against `block_attention`.

8 heads of 32 units, 1,024 to 2,000 tokens in all; the least CPU milliseconds of several runs, since neighbours on the
machine only add to it.
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


def main() -> None:
    """Measure and write results/attention.json."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from qinglan.core.device import Device, small_products
    from qinglan.models.attention import block_attention, plan_blocks

    torch.set_num_threads(1)
    Device.detect("cpu", "float32")
    rows = []
    for num_rows, num_tokens in SHAPES:
        row: dict[str, Any] = {"rows": num_rows, "tokens": num_tokens}
        for name, dtype in (
            ("fused_fp32", torch.float32),
            ("ours_fp32", torch.float32),
            ("fused_bf16", torch.bfloat16),
            ("ours_bf16", torch.bfloat16),
        ):
            # As in a model: [rows, tokens, heads, units] seen as [rows, heads, tokens, units].
            shape = (num_rows, num_tokens, HEADS, UNITS)
            query, key, value, gradient = (torch.randn(shape, dtype=dtype).transpose(1, 2) for _ in range(4))
            leaves = [part.requires_grad_() for part in (query, key, value)]

            def run(leaves: Any = leaves, gradient: Any = gradient, is_ours: bool = name.startswith("ours")) -> None:
                if is_ours:
                    blocks = plan_blocks(None, leaves[0].shape[2], leaves[0].shape[2], leaves[0].dtype)
                    block_attention(*leaves, blocks, UNITS**-0.5).backward(gradient)
                else:
                    with small_products():  # by MKL, as PyTorch comes; by oneDNN short rows are far slower
                        scaled_dot_product_attention(*leaves, is_causal=True).backward(gradient)

            row[name] = milliseconds(run)
        rows.append(row)
        print(f"attention: {row}", flush=True)
    settings = machine() | {"heads": HEADS, "units": UNITS, "threads": 1, "load_average": os.getloadavg()[0]}
    write(RESULTS / "attention.json", {"unit": "CPU ms, forward and backward", "rows": rows, "settings": settings})


if __name__ == "__main__":
    main()
