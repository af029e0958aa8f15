"""Packed weights in decoding: the same completions and log-probabilities, wherever there are packed products."""

from itertools import chain

import pytest
import torch
from conftest import make_tiny_lm

from qinglan.core.device import has_packed_products
from qinglan.learn.dropout import residual_dropout
from qinglan.models import generate as generate_module
from qinglan.models import kv_cache, packed
from qinglan.models.adapters import LoRAConfig, trainable_copy
from qinglan.models.generate import SamplingConfig, generate
from qinglan.models.language_model import save_language_model
from qinglan.models.packed import pack_products, packed_bytes
from qinglan.models.trunk import Products

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]


@pytest.fixture
def everywhere(monkeypatch):
    """Packed products of fp32 on any processor with oneDNN, whoever computes the others."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    monkeypatch.setattr(packed, "has_packed_products", lambda dtype: dtype == torch.float32)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_product_is_that_of_the_modules(architecture, everywhere):
    lm = make_tiny_lm(architecture)  # qwen2 has biases
    states = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = lm.model.base_model.layers
        for own, layer in zip(pack_products(lm.model, 5, torch.float32), layers, strict=True):
            plain = Products.of(layer)
            wide = torch.randn(5, 1, layer.mlp.down_proj.in_features, generator=torch.Generator().manual_seed(1))
            pairs = [
                *zip(own.heads(states), plain.heads(states), strict=True),
                *zip(own.gate_and_up(states), plain.gate_and_up(states), strict=True),
                (own.output(states), plain.output(states)),
                (own.down(wide), plain.down(wide)),
            ]
            for found, expected in pairs:
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_completions_are_the_same_with_and_without(everywhere, monkeypatch):
    lm, config = make_tiny_lm("llama"), SamplingConfig(max_new_tokens=20)
    calls = []
    pack = kv_cache.pack_products
    monkeypatch.setattr(kv_cache, "pack_products", lambda *inputs: calls.append(inputs) or pack(*inputs))
    found = generate(lm, PROMPTS, config, seed=0, num_samples=3)
    assert len(calls) == 1
    monkeypatch.setattr(generate_module, "packed_bytes", lambda *_: 0)
    expected = generate(lm, PROMPTS, config, seed=0, num_samples=3)
    assert len(calls) == 1
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=0)


def test_the_copies_take_what_room_rows_leave(everywhere, monkeypatch):
    lm, calls = make_tiny_lm("llama"), []
    pack = kv_cache.pack_products
    monkeypatch.setattr(kv_cache, "pack_products", lambda *inputs: calls.append(inputs) or pack(*inputs))
    config = SamplingConfig(max_new_tokens=200, memory_budget_mib=1)
    # 2 layers x (8 keys + 8 values) x 4 bytes x 203 tokens, and 24 bytes for each of 267 logits
    row = 128 * 203 + 24 * 267
    for taken in (2**20 - 10 * row, 2**20 - 10 * row + 1):
        monkeypatch.setattr(generate_module, "packed_bytes", lambda *_, taken=taken: taken)
        generate(lm, [[5, 6, 7]] * 10, config, seed=0)
    assert len(calls) == 1


def test_few_steps_go_without(everywhere, monkeypatch):
    monkeypatch.setattr(kv_cache, "pack_products", lambda *_: pytest.fail("packed"))
    generate(make_tiny_lm("llama"), PROMPTS, SamplingConfig(max_new_tokens=15), seed=0)


def test_what_is_no_plain_matrix_is_not_packed(everywhere, tmp_path):
    lm = make_tiny_lm("llama")
    # 2 layers of 16 x 16 queries, 8 x 16 keys, 8 x 16 values, 16 x 16 output, and 3 of 16 x 32; 4 bytes each
    assert packed_bytes(lm.model, torch.float32) == 4 * 2 * (256 + 128 + 128 + 256 + 3 * 512)
    save_language_model(lm, tmp_path / "base")
    assert packed_bytes(trainable_copy(lm.model, LoRAConfig(rank=2), seed=0), torch.float32) == 0
    with residual_dropout(lm.model, 0.5, seed=0):
        assert packed_bytes(lm.model, torch.float32) == 0
    for part in (lm.model.base_model.layers[1].mlp, lm.model.base_model.layers[0].self_attn.k_proj):
        handle = part.register_forward_hook(lambda *_: None)
        assert packed_bytes(lm.model, torch.float32) == 0
        handle.remove()
    assert packed_bytes(make_tiny_lm("gpt2").model, torch.float32) == 0
    assert packed_bytes(lm.model, torch.bfloat16) == 0  # of another precision than the fixture allows


def test_other_precisions_are_left_alone():
    assert not has_packed_products(torch.float16)
    assert has_packed_products(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
