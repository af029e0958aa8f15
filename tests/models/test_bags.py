"""Attention of single new tokens by bags of places (`models/bags.py`)."""

import subprocess
import sys

import pytest
import torch
from conftest import make_tiny_lm

from qinglan.models import bags, kv_cache
from qinglan.models.attention import last_token_attention
from qinglan.models.bags import has_bags, make_bags, mix
from qinglan.models.generate import SamplingConfig, generate

# Not by `has_bags`: where the kernels belong but fail their trial, a test is to fail.
pytestmark = pytest.mark.skipif(not bags.is_built(), reason="no x86 processor, or PyTorch without fbgemm")


def buffers(slots=5, groups=2, columns=9, units=4):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(slots, groups, columns, units, generator=generator) for _ in range(2))


def mask_of(positions, width):
    seen = torch.arange(width) <= positions
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None, None]


@pytest.mark.parametrize("num_heads", [2, 6])  # one query for each head of keys, and three
def test_bags_give_what_products_give(num_heads):
    keys, values = buffers()
    positions = torch.tensor([[6], [0], [3]])  # rows of 7, 1 and 4 columns in slots 0 to 2 of 5
    query = torch.randn(3, num_heads, 1, 4, generator=torch.Generator().manual_seed(1))
    added = mask_of(positions, 7)
    found = mix(make_bags(positions, added, num_heads, keys), query, keys, values, 0.5)
    products = last_token_attention(query, keys[:3, :, :7], values[:3, :, :7], added, 0.5)
    torch.testing.assert_close(found, products.transpose(1, 2), atol=1e-6, rtol=1e-5)
    # A row of one column sees its own value and nothing else.
    torch.testing.assert_close(found[1, 0, 0], values[1, 0, 0])


def test_what_stands_behind_a_row_is_not_read():
    keys, values = buffers()
    positions = torch.tensor([[4], [1]])
    query = torch.ones(2, 2, 1, 4)
    bag = make_bags(positions, mask_of(positions, 5), 2, keys)
    before = mix(bag, query, keys, values, 1.0)
    for buffer in (keys, values):
        buffer[1, :, 2:] = torch.nan
        buffer[2:] = torch.nan
    assert torch.equal(mix(bag, query, keys, values, 1.0), before)


def test_the_sampler_draws_the_same_with_and_without_bags(monkeypatch):
    lm = make_tiny_lm("llama")
    prompts = [[5, 6, 7, 8][: 1 + number % 4] for number in range(12)]
    config = SamplingConfig(max_new_tokens=12, max_rows=bags.MIN_ROWS + 3)
    calls = []
    monkeypatch.setattr(kv_cache, "mix", lambda *given: calls.append(1) or mix(*given))
    with_bags = generate(lm, prompts, config, seed=1, num_samples=4)
    assert calls
    monkeypatch.setattr(kv_cache, "has_bags", lambda buffer: False)
    without = generate(lm, prompts, config, seed=1, num_samples=4)
    for ours, theirs in zip(with_bags, without, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_no_warning_about_sparse_tensors_reaches_the_user():
    # In a process of its own, since PyTorch warns once.
    program = """
import torch
from qinglan.models.bags import has_bags, make_bags, mix
buffer, positions = torch.zeros(2, 1, 3, 1), torch.tensor([[1]])
assert has_bags(buffer)
mix(make_bags(positions, torch.zeros(1, 1, 1, 2), 1, buffer), torch.zeros(1, 1, 1, 1), buffer, buffer, 1.0)
"""
    command = [sys.executable, "-W", "error:Sparse CSR", "-c", program]
    subprocess.run(command, check=True)


def test_kernels_that_give_other_numbers_are_not_used(monkeypatch):
    for wrong in (
        lambda *given: torch.zeros(2, 1, 1, 1),
        lambda *given: (_ for _ in ()).throw(RuntimeError("no kernel")),
    ):
        bags._has_kernels.cache_clear()
        monkeypatch.setattr(bags, "mix", wrong)
        assert not has_bags(torch.zeros(1, 1, 1, 1))
    monkeypatch.undo()
    bags._has_kernels.cache_clear()
    assert has_bags(torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    "buffer", [torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 1, device="meta")]
)
def test_other_precisions_and_devices_go_another_way(buffer):
    assert not has_bags(buffer)
