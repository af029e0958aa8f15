"""A decoder's matrices packed for decoding on a CPU: fewer and faster products, from a copy that `generate` keeps.

For every product oneDNN first brings the weights into an order of its own. With the few rows of a decoding step that
takes a quarter of the product's time and more (LOG.md), and one copy in that order serves all steps. Queries, keys and
values come out of one product then, and so do the two halves of the MLP.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qinglan.core.device import has_packed_products
from qinglan.models.trunk import Products, is_written_out


def packed_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Return what packed matrices of `dtype` would take; 0 where there are none: adapters, hooks, other processors."""
    if not (is_written_out(model) and has_packed_products(dtype)):
        return 0
    matrices = [matrix for layer in _layers(model) for group in _groups(layer) for matrix in group]
    has_hooks = any(matrix._forward_hooks or matrix._forward_pre_hooks for matrix in matrices)
    is_plain = not has_hooks and all(type(matrix) is nn.Linear for matrix in matrices)
    return sum(matrix.weight.numel() for matrix in matrices) * dtype.itemsize if is_plain else 0


@torch.no_grad()
def pack_products(model: PreTrainedModel, num_rows: int, dtype: torch.dtype) -> list[Products]:
    """Return the products of every layer with packed copies of its weights, for about `num_rows` rows."""
    return [_packed_layer(layer, num_rows, dtype) for layer in _layers(model)]


def _packed_layer(layer: Any, num_rows: int, dtype: torch.dtype) -> Products:
    heads, output, gate_and_up, down = (_pack(group, num_rows, dtype) for group in _groups(layer))
    sizes = [matrix.out_features for matrix in _groups(layer)[0]]

    return Products(
        lambda states: heads(states).split(sizes, dim=-1), output, lambda states: gate_and_up(states).chunk(2, -1), down
    )


def _layers(model: PreTrainedModel) -> Sequence[Any]:
    trunk: Any = model.base_model
    return trunk.layers[: model.config.num_hidden_layers]


def _groups(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """Return the matrices of a layer, those together that read the same states."""
    block, mlp = layer.self_attn, layer.mlp
    return (block.q_proj, block.k_proj, block.v_proj), (block.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


def _pack(matrices: Sequence[nn.Linear], num_rows: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return x -> x W^T + b with the matrices one below the other in W [out, in], kept in oneDNN's order."""
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat([m.weight.to(dtype) for m in matrices]), num_rows)
    biases = [matrix.bias.to(dtype) for matrix in matrices if matrix.bias is not None]
    bias = torch.cat(biases) if biases else None
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
