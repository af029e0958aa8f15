"""Products in fp32 are exact to fp32, whichever library computes them."""

import platform
import resource

import pytest
import torch

from qinglan.core import device
from qinglan.core.device import Device

LARGE = torch.arange(300.0 * 300).view(300, 300).sin()


def error() -> float:
    """Return how far a product of 300 x 300 numbers in (-1, 1) is from the one in fp64, over sqrt(300)."""
    exact = LARGE.double() @ LARGE.double()
    return float((LARGE @ LARGE - exact).abs().max()) / 300**0.5


def test_products_have_the_precision_of_fp32():
    Device.detect("cpu", "float32")
    assert error() < 2e-6  # 2^-23 a term; bf16 is off by 1e-3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_of_freed_tensors_is_not_taken_anew_page_by_page():
    Device.detect("cpu", "float32")
    torch.zeros(12 << 20)  # 48 MiB or 12,288 pages, freed at once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(12 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20 * 12288 / 4


def test_small_products_take_the_other_library_and_give_it_back_after_an_error():
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "bf16"
        with pytest.raises(ValueError, match="oops"), device.small_products():
            inside = products.fp32_precision
            with device.small_products():  # a second one, as from another thread, changes nothing
                pass
            assert products.fp32_precision == inside == "none"
            raise ValueError("oops")
        assert products.fp32_precision == "bf16"
    finally:
        products.fp32_precision = before


def test_a_processor_that_would_round_to_bf16_keeps_the_other_library(monkeypatch):
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision

    def rounded(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if first.dtype == torch.float64:
            return torch.matmul(first, second)
        return torch.matmul(first.bfloat16(), second.bfloat16()).to(first.dtype)

    try:
        products.fp32_precision = "none"
        monkeypatch.setattr(device, "_is_amd", lambda: True)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", rounded)
            device.choose_products()
        assert products.fp32_precision == "none"
        assert error() < 2e-6
    finally:
        products.fp32_precision = before
