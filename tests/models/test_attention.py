"""Attention by blocks against attention in fp64: as near as PyTorch's own kernel, whatever the mask."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_lm

from qinglan.core.device import Device
from qinglan.models import attention
from qinglan.models.attention import block_attention, choose_attention, plan_blocks
from qinglan.models.language_model import TokenSequence, completion_logprobs, hidden_states
from qinglan.models.tokens import collate

ROWS, HEADS, UNITS = 2, 3, 16


def states(num_tokens: int, num_queries: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (num_queries or num_tokens, num_tokens, num_tokens)
    return [torch.randn(ROWS, HEADS, size, UNITS, generator=generator) for size in sizes]


def run(function, parts: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the output and the three gradients in fp64."""
    leaves = [part.to(dtype).requires_grad_() for part in parts]
    output = function(*leaves)
    output.backward(torch.ones_like(output) + parts[0].to(dtype))
    return [tensor.double() for tensor in (output.detach(), *(leaf.grad for leaf in leaves))]


def packed_mask(num_tokens: int) -> torch.Tensor:
    """Two sequences in a row, neither of which sees the other."""
    segment = (torch.arange(num_tokens) >= num_tokens // 3).int()
    return ((segment[:, None] == segment) & torch.ones(num_tokens, num_tokens).tril().bool())[None, None]


@pytest.mark.parametrize("num_tokens", [2, 82, 128, 129, 300])  # one block, a whole block, one more token, three blocks
@pytest.mark.parametrize("mask", ["causal", "bool", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_as_near_to_fp64_as_those_of_the_fused_kernel(num_tokens, mask, dtype):
    parts = states(num_tokens)
    allowed = packed_mask(num_tokens) if mask != "causal" else None
    given = allowed
    if mask == "added":
        given = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def fused(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=allowed is None)

    def ours(query, key, value):
        blocks = plan_blocks(given, num_tokens, num_tokens, query.dtype)
        return block_attention(query, key, value, blocks, UNITS**-0.5)

    exact = run(fused, parts, torch.float64)
    for found, theirs, expected in zip(run(ours, parts, dtype), run(fused, parts, dtype), exact, strict=True):
        error, their_error = (float((one - expected).norm() / expected.norm()) for one in (found, theirs))
        # One rounding costs 2^-9 = 0.002 in bf16, 2^-24 in fp32; ours rounds the scores once more.
        one_rounding = torch.finfo(dtype).eps / 4
        assert error < max(2 * their_error, 2 * one_rounding) and error < 10 * one_rounding


def test_queries_behind_a_cached_prefix_see_it():
    parts = states(10, num_queries=4)  # the last 4 of 10 columns
    blocks = plan_blocks(None, 4, 10, torch.bfloat16)
    found = block_attention(*(part.bfloat16() for part in parts), blocks, UNITS**-0.5).double()
    allowed = torch.ones(10, 10).tril().bool()[6:]
    expected = F.scaled_dot_product_attention(*(part.double() for part in parts), attn_mask=allowed)
    assert float((found - expected).norm() / expected.norm()) < 0.01


def test_heads_that_share_keys_and_values_are_as_if_each_had_its_own():
    query, key, value = states(20)
    shared = [part[:, :1] for part in (key, value)]
    own = [part[:, :1].expand(-1, HEADS, -1, -1) for part in (key, value)]
    blocks = plan_blocks(None, 20, 20, torch.float32)
    assert torch.equal(block_attention(query, *shared, blocks, 0.25), block_attention(query, *own, blocks, 0.25))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3"])
def test_a_model_takes_it_in_both_precisions_and_packed_rows_stay_apart(architecture, no_kernels, monkeypatch):
    calls = []
    plain = attention.block_attention
    monkeypatch.setattr(attention, "block_attention", lambda *given: calls.append(given[0].dtype) or plain(*given))
    lm = make_tiny_lm(architecture)
    sequences = [TokenSequence([(7 * i + n) % 50 for i in range(n)], 1) for n in (9, 5, 7)]
    exact = completion_logprobs(lm, sequences)
    assert set(calls) == {torch.float32}
    calls.clear()
    rounded = completion_logprobs(lm._replace(device=Device(torch.device("cpu"), torch.bfloat16)), sequences)
    assert set(calls) == {torch.bfloat16}
    for one, other in zip(exact, rounded, strict=True):
        assert 0 < float((one - other).abs().max()) < 0.2
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        together = hidden_states(lm.model, collate(sequences, [[0, 1, 2]]))
        alone = torch.cat([hidden_states(lm.model, collate([sequence]))[0] for sequence in sequences])
    assert float((together[0] - alone).norm() / alone.norm()) < 0.02


def test_a_model_that_runs_on_another_attention_keeps_it():
    model = make_tiny_lm("llama", attention="eager").model
    choose_attention(model)
    assert model.config._attn_implementation == "eager"
