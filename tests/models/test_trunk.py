"""The written-out trunk against transformers' forward pass: states, gradients, and the places that are asked for."""

import copy

import pytest
import torch
from conftest import make_sequences, make_tiny_lm
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from qinglan.learn.dropout import residual_dropout
from qinglan.models import kernels
from qinglan.models.adapters import LoRAConfig, trainable_copy
from qinglan.models.directory import prepare
from qinglan.models.language_model import hidden_states, save_language_model, target_states
from qinglan.models.prompt_sharing import PromptTree, make_tree_batch, tree_states
from qinglan.models.sizes import filled_up, with_filled_rows
from qinglan.models.tokens import TokenBatch, TokenSequence, collate
from qinglan.models.trunk import (
    _RMSNorm,
    _Rotate,
    is_written_out,
    states_of_batch,
    trunk_states,
)

pytestmark = pytest.mark.usefixtures("both_ways")
WRITTEN_OUT = ("llama", "qwen2", "qwen3")
LAYOUTS = ([[0], [1], [2], [3], [4], [5]], [[3, 4, 1], [2, 0, 5]])  # one sequence a row; packed


def theirs(model, batch: TokenBatch) -> torch.Tensor:
    output = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return output.last_hidden_state


def gradients(model, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of a sum in which every number of `states` has a weight of its own."""
    model.zero_grad()
    (states * torch.arange(states.numel()).view_as(states).sin()).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("rows", LAYOUTS)
@pytest.mark.parametrize("architecture", WRITTEN_OUT)
def test_states_and_gradients_equal_those_of_transformers(architecture, rows):
    lm = make_tiny_lm(architecture)
    assert is_written_out(lm.model)
    batch = collate(make_sequences(lm), rows)
    real = batch.real_mask
    found, expected = hidden_states(lm.model, batch)[real], theirs(lm.model, batch)[real]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_close(gradients(lm.model, found), gradients(lm.model, expected))


@pytest.mark.parametrize("rows", LAYOUTS)
@pytest.mark.parametrize("architecture", WRITTEN_OUT)
def test_states_at_targets_are_those_of_the_whole_pass_and_so_are_their_gradients(architecture, rows):
    lm = make_tiny_lm(architecture)
    batch = collate(make_sequences(lm), rows)
    places, columns = batch.target_mask.nonzero(as_tuple=True)
    found, expected = target_states(lm.model, batch), theirs(lm.model, batch)[places, columns - 1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_close(gradients(lm.model, found), gradients(lm.model, expected))


def test_the_last_layer_is_worked_out_where_a_state_is_asked_for_and_nowhere_else():
    lm = make_tiny_lm("llama")
    sizes: list[int] = []
    for layer in lm.model.base_model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0][..., 0].numel()))
    batch = collate(make_sequences(lm))
    num_real, num_targets = filled_up(int(batch.real_mask.sum()), 5), filled_up(int(batch.target_mask.sum()))
    target_states(lm.model, batch)
    assert num_targets < num_real < batch.input_ids.numel()  # half of these rows is padding
    num_first = num_real if kernels.library() is not None else batch.input_ids.numel()
    assert sizes == [num_first] * (len(sizes) - 1) + [num_targets]


@pytest.mark.parametrize("part", ["mlp", "self_attn", "self_attn.q_norm", "input_layernorm"])
def test_a_hook_on_a_module_that_is_not_called_sends_the_model_to_transformers(part):
    lm, calls = make_tiny_lm("qwen3"), []
    lm.model.base_model.layers[0].get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    assert not is_written_out(lm.model)
    hidden_states(lm.model, collate(make_sequences(lm)))
    assert calls == [part]


def test_damaged_weights_are_seen_in_every_state():
    lm = make_tiny_lm("llama")
    lm.model.base_model.layers[0].self_attn.q_proj.weight.data.fill_(torch.nan)
    batch = collate(make_sequences(lm))
    assert bool(hidden_states(lm.model, batch)[batch.real_mask].isnan().all())


def test_a_tree_of_completions_has_the_states_of_transformers():
    lm = make_tiny_lm("qwen3")
    trees = [PromptTree([5, 6, 7], [[8, 9], [10], [11, 12, 13]]), PromptTree([14], [[15], [16, 17]])]
    batch = make_tree_batch(trees, torch.device("cpu"))
    output = lm.model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.may_attend, position_ids=batch.position_ids, use_cache=False
    )
    expected = output.last_hidden_state[batch.target_rows, batch.predicting_columns]
    found = tree_states(lm.model, batch, batch.target_rows, batch.predicting_columns)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_bf16_products_are_as_near_to_fp32_as_those_of_transformers():
    lm = make_tiny_lm("qwen3")
    batch = collate(make_sequences(lm))
    exact = theirs(lm.model, batch)[batch.real_mask]
    with torch.autocast("cpu", torch.bfloat16):
        ours, other = hidden_states(lm.model, batch)[batch.real_mask], theirs(lm.model, batch)[batch.real_mask]
    assert ours.dtype == torch.float32
    error, their_error = (float((one - exact).norm() / exact.norm()) for one in (ours, other))
    assert 0 < error < 2 * their_error


def test_norm_and_rotation_have_the_gradients_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, 4, generator=generator)
    weight = torch.randn(4, generator=generator)
    for function, inputs in (
        (lambda x, w: _RMSNorm.apply(x, w, 1e-6, torch.float32), (x, weight)),
        (lambda x: _Rotate.apply(x, *angles(3)), (x,)),
    ):
        leaves = [part.clone().requires_grad_() for part in inputs]
        # fp32 inside: steps of 0.01 and a tolerance of 1% tell a wrong formula from rounding
        assert torch.autograd.gradcheck(function, leaves, eps=1e-2, atol=2e-2, rtol=2e-2, check_undefined_grad=False)


def angles(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(length)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    return angle.cos()[None].expand(2, -1, -1), angle.sin()[None].expand(2, -1, -1)


def test_what_the_trunk_does_not_know_goes_to_transformers():
    lm = make_tiny_lm("llama")
    assert is_written_out(lm.model)
    with residual_dropout(lm.model, 0.5, seed=0):
        assert not is_written_out(lm.model)
    assert not is_written_out(copy.deepcopy(lm.model).double())
    assert not is_written_out(make_tiny_lm("llama", attention="eager").model)
    for architecture in ("gpt2", "gemma3", "qwen2_sliding"):
        assert not is_written_out(make_tiny_lm(architecture).model)


def test_adapters_are_called_as_they_are(tmp_path):
    lm = make_tiny_lm("llama")
    save_language_model(lm, tmp_path / "base")  # an adapter names the directory of its base
    model = trainable_copy(lm.model, LoRAConfig(rank=2), seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    assert is_written_out(model)
    batch = collate(make_sequences(lm))
    found, expected = (run[batch.real_mask] for run in (hidden_states(model, batch), theirs(model, batch)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert_close(gradients(model, found), gradients(model, expected))


def test_sizes_are_filled_up_to_few():
    assert [filled_up(n) for n in (0, 1, 63, 64, 65, 82, 143, 1003)] == [0, 1, 63, 64, 66, 82, 144, 1008]
    assert len({filled_up(n) for n in range(64, 1025)}) == 4 * 32 + 1
    assert all(n <= filled_up(n) < n * 33 / 32 for n in range(1, 3000))


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_are_filled_up_have_the_states_and_gradients_of_transformers(packed):
    lm = make_tiny_lm("qwen3")
    ids = [[(7 * i + n) % 50 for i in range(n)] for n in (35, 33, 41)]
    batch = collate([TokenSequence(one, 5) for one in ids], [[0, 1], [2]] if packed else None)
    places, columns = batch.target_mask.nonzero(as_tuple=True)
    found, expected = target_states(lm.model, batch), theirs(lm.model, batch)[places, columns - 1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_close(gradients(lm.model, found), gradients(lm.model, expected))


def test_windowless_mistral_and_biases_are_known():
    for make in (
        lambda: MistralConfig(sliding_window=None, **SMALL),
        lambda: LlamaConfig(attention_bias=True, mlp_bias=True, **SMALL),
        lambda: LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}, **SMALL),
    ):
        torch.manual_seed(0)
        model = prepare(AutoModelForCausalLM.from_config(make()))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.normal_(1.0, 0.1)
        assert is_written_out(model)
        batch = collate([TokenSequence([5, 6, 7, 8], 1), TokenSequence([9, 10], 1)])
        found, expected = (run(model, batch)[batch.real_mask] for run in (hidden_states, theirs))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


def test_places_that_are_asked_for_twice_may_be_more_than_there_are():
    lm = make_tiny_lm("llama")
    ids = torch.arange(2 * 33).view(2, 33) % 40
    positions, places = torch.arange(33).expand(2, -1), torch.cat([torch.arange(66), torch.arange(66)])
    found = states_of_batch(lm.model, ids, positions, places=places)
    torch.testing.assert_close(found[:66], found[66:], atol=0, rtol=0)
    torch.testing.assert_close(found[:66], trunk_states(lm.model, ids, positions).flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_no_place_and_every_place():
    lm = make_tiny_lm("llama")
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    positions = torch.arange(3).expand(2, -1)
    whole = trunk_states(lm.model, ids, positions)
    assert trunk_states(lm.model, ids, positions, places=torch.tensor([], dtype=torch.long)).shape == (0, 16)
    every = trunk_states(lm.model, ids, positions, places=torch.arange(6).flip(0))
    assert torch.equal(every, whole.flatten(0, 1).flip(0))


def test_gradients_of_a_tree_sum_over_the_completions_that_share_a_place():
    lm = make_tiny_lm("llama")
    trees = [PromptTree([5, 6, 7], [[8, 9], [10], [11, 12, 13]])]
    batch = make_tree_batch(trees, torch.device("cpu"))
    output = lm.model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.may_attend, position_ids=batch.position_ids, use_cache=False
    )
    found = tree_states(lm.model, batch, batch.target_rows, batch.predicting_columns)
    expected = output.last_hidden_state[batch.target_rows, batch.predicting_columns]
    assert int((batch.predicting_columns == 2).sum()) == 3  # the prompt's last token predicts three first ones
    assert_close(gradients(lm.model, found), gradients(lm.model, expected))


@pytest.mark.parametrize("num_rows", [0, 1, 31, 33, 64, 587])
def test_rows_are_filled_up_with_zeros_to_few_sizes(num_rows):
    # 587 has ten binary digits, of which five are kept: the next multiple of 32 is 608.
    states = torch.randn(num_rows, 4)
    found = with_filled_rows(states)
    assert len(found) == {0: 0, 1: 1, 31: 31, 33: 34, 64: 64, 587: 608}[num_rows]
    assert torch.equal(found[:num_rows], states) and not found[num_rows:].any()
