"""Where and how the arithmetic runs. Only this file may import `torch.distributed`; one process is the default."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from qinglan.core.errors import InputError

Dtype = Literal["auto", "float32", "bfloat16"]
"""Of matrix products."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names in glibc's malloc.h."""


class Device(NamedTuple):
    """A device with its matmul precision. Weights, log-probabilities and losses stay in fp32."""

    torch_device: torch.device
    compute_dtype: torch.dtype

    @staticmethod
    def detect(name: str = "auto", dtype: Dtype = "auto") -> "Device":
        """Choose CUDA if there is one, else the CPU; bf16 matmuls where a GPU has them, on a CPU if asked for by name.

        A processor that only emulates bf16 is slower with it, which is said on standard error.
        """
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch_device = torch.device(name)
        except RuntimeError as error:
            raise InputError(f"--device {name}: no such device; use auto, cpu or cuda") from error
        if torch_device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"--device {name}: this machine has no CUDA device; use --device cpu")
        if dtype == "auto":
            dtype = "bfloat16" if torch_device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
        elif dtype == "bfloat16" and torch_device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            print("--dtype bfloat16: this processor has no bf16 products, float32 would be faster", file=sys.stderr)
        if torch_device.type == "cpu":
            torch.set_num_threads(torch.get_num_threads())  # the first call changes how MKL counts; not amid a run
            choose_products()
            keep_freed_memory()
        return Device(torch_device, torch.bfloat16 if dtype == "bfloat16" else torch.float32)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which forward passes run: bf16 matmuls where asked for, else nothing."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, dtype=self.compute_dtype)


def choose_products() -> None:
    """Let oneDNN compute fp32 products on AMD processors with AVX-512, where PyTorch's default, MKL, uses half of it.

    The same precision at about twice the rate (docs/benchmarks.md). The only public switch to oneDNN allows bf16 too,
    which oneDNN takes on processors with AMX alone: a product is tried, and the switch taken back if it is rounded.
    """
    products = _products()
    before = products.fp32_precision
    if not _is_faster_by_onednn() or before == "bf16":
        return
    products.fp32_precision = "bf16"
    numbers = torch.arange(64.0 * 64).view(64, 64).sin()  # in (-1, 1): fp32 is off by 1e-6, bf16 by 1e-2
    if (numbers @ numbers - (numbers.double() @ numbers.double()).float()).abs().max() > 1e-4:
        products.fp32_precision = before


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors, which it would give back and take again page by page.

    Training is 3 to 15% faster for it and takes no more at its peak (LOG.md). Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def small_products() -> Iterator[None]:
    """Return the context for products of very small matrices, which MKL starts faster than oneDNN."""
    products = _products()
    if products.fp32_precision != "bf16":
        yield
        return
    products.fp32_precision = "none"
    try:
        yield
    finally:
        products.fp32_precision = "bf16"


def has_packed_products(dtype: torch.dtype) -> bool:
    """Return True if oneDNN is the one to compute products of `dtype` on this CPU."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and _is_faster_by_onednn()


def _products() -> Any:
    # The module puts an object in its own place when it is imported, which mypy cannot see.
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _is_faster_by_onednn() -> bool:
    return _is_amd() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")


def device_name(device: Device) -> str:
    """Return what a GPU calls itself, or "cpu"."""
    return torch.cuda.get_device_name(device.torch_device) if device.torch_device.type == "cuda" else "cpu"


def prepare_process() -> None:
    """Use every core this process may run on (`OMP_NUM_THREADS` still wins); progress is ours to show."""
    transformers_logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
