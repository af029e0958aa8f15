"""Tokens in one list with attention in rows of its own: the numbers of separate rows, for every token once."""

import numpy as np
import pytest
import torch
from conftest import make_tiny_lm
from test_trunk import assert_close, gradients

from qinglan.models.attention_rows import attention_rows
from qinglan.models.prompt_sharing import PromptTree, make_tree_batch, tree_end_states, tree_states
from qinglan.models.trunk import are_rows_smaller

PATHS = [np.array([0, 1, 2, 3]), np.array([0, 1, 5, 6, 7]), np.array([9])]
"""Two completions of the prompt at places 0 and 1, and a text of one token; nothing stands at places 4 and 8."""
TREES = [
    PromptTree([5, 6, 7], [[(k * n) % 50 for n in range(1, 12 + k)] for k in (1, 2, 3, 4)]),
    PromptTree([14, 15], [[(7 * k + n) % 50 for n in range(13 - k)] for k in (1, 2, 3, 4, 5)]),
]


def test_rows_by_hand():
    rows, numbers = attention_rows(PATHS, 10, width=6)
    assert numbers.tolist() == [0, 1, 2, 3, -1, 4, 5, 6, -1, 7]
    assert rows.tokens[:, :4].tolist() == [[0, 1, 2, 3], [0, 1, 4, 5], [7, 0, 0, 0]]
    assert rows.homes.tolist() == [0, 1, 2, 3, 8, 9, 10, 12]  # tokens 0 and 1 at home in the first row
    assert rows.copies.tolist() == [6, 7]


def test_spread_shows_tokens_and_collect_takes_them_home():
    rows, _ = attention_rows(PATHS, 10, width=5)
    states = torch.arange(8 * 3 * 2.0).view(1, 8, 3, 2)
    spread = rows.spread(states)
    assert spread.shape == (3, 5, 3, 2)
    assert torch.equal(spread[1, :5], states[0, [0, 1, 4, 5, 6]])
    collected = rows.collect(spread, num_tokens=10)
    assert torch.equal(collected[0, :8], states[0].flatten(1)) and not collected[0, 8:].any()


def test_gradients_are_those_of_plain_indexing():
    rows, _ = attention_rows(PATHS, 10, width=5)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 9, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()  # the last: a filler
    real = torch.zeros(3, 5, dtype=torch.float64)
    for row, path in enumerate(PATHS):
        real[row, : len(path)] = 1.0
    weights = torch.randn(3, 5, 2, 2, generator=generator, dtype=torch.float64) * real[:, :, None, None]
    (found,) = torch.autograd.grad((rows.spread(states) * weights).sum(), states)
    (expected,) = torch.autograd.grad((states[0][rows.tokens] * weights).sum(), states)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    spread = torch.randn(3, 5, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    per_token = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad((rows.collect(spread, 9)[0, :8] * per_token).sum(), spread)
    (expected,) = torch.autograd.grad((spread.flatten(0, 1)[rows.homes].flatten(1) * per_token).sum(), spread)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_tree_in_rows_has_states_and_gradients_of_transformers(architecture):
    lm = make_tiny_lm(architecture)
    batch = make_tree_batch(TREES, torch.device("cpu"))
    assert are_rows_smaller([len(path) for path in batch.paths], batch.input_ids.shape)
    output = lm.model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.may_attend, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    found = tree_states(lm.model, batch, batch.target_rows, batch.predicting_columns)
    expected = output[batch.target_rows, batch.predicting_columns]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_close(gradients(lm.model, found), gradients(lm.model, expected))
    ends = tree_end_states(lm.model, batch)
    torch.testing.assert_close(ends, output[batch.end_rows, batch.end_columns], atol=1e-5, rtol=1e-5)


def test_linear_layers_see_each_token_once():
    lm = make_tiny_lm("llama")
    sizes: list[int] = []
    layer = lm.model.base_model.layers[0]
    layer.mlp.register_forward_hook(lambda _module, inputs, _output: sizes.append(inputs[0][..., 0].numel()))
    batch = make_tree_batch(TREES, torch.device("cpu"))
    tree_end_states(lm.model, batch)
    # 3 + 12 + 13 + 14 + 15 and 2 + 12 + 11 + 10 + 9 + 8 less 1 each; 104, a size of few, is the next
    num_tokens = sum(tree.num_tokens for tree in TREES)
    assert num_tokens <= sizes[0] < num_tokens * 17 / 16
    assert sizes[0] < sum(len(path) for path in batch.paths)


def test_bf16_is_as_near_to_fp32_as_transformers_is():
    lm = make_tiny_lm("qwen3")
    batch = make_tree_batch(TREES, torch.device("cpu"))

    def theirs():
        output = lm.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.may_attend, position_ids=batch.position_ids, use_cache=False
        )
        return output.last_hidden_state[batch.end_rows, batch.end_columns].float()

    with torch.no_grad():
        exact = theirs()
        with torch.autocast("cpu", torch.bfloat16):
            ours, other = tree_end_states(lm.model, batch), theirs()
    error, their_error = (float((one - exact).norm() / exact.norm()) for one in (ours, other))
    assert 0 < error < 2 * their_error
