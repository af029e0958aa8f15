"""Attention on a CPU by plain matrix products.

PyTorch's fused kernel for processors saves memory, which rows of some hundred tokens do not need, and its backward pass
is slow on them (docs/benchmarks.md has the times). Long rows and all of CUDA go to `sdpa`.

In bf16, scores and weights are rounded to bf16, as `transformers`' eager attention rounds scores; sums are fp32 inside
products, and so is the softmax.

Letters: B rows, H heads, Q queries, T columns, D units of a head.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qinglan.core.device import small_products

NAME = "qinglan"
"""Our entry in `transformers`' table of attention functions."""
QUERY_BLOCK = 128
"""Queries in one product: a block of a causal row sees no further than its own end, which saves up to half."""
COLUMN_STEP = 32
"""Columns of a block begin and end at multiples of it, since products are compiled for each size."""
MAX_WEIGHTS_BYTES = 2**27
"""Beyond it a layer goes to the fused kernel: all weights are kept for the backward pass (of a causal mask, half)."""
UNSUPPORTED = ("softcap", "position_bias", "cache")
"""Extras of single architectures that are left to `sdpa`."""


def choose_attention(model: PreTrainedModel) -> None:
    """Let a model that runs on `sdpa` choose at each call between it and `block_attention`."""
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return
    if NAME not in AttentionInterface():
        AttentionMaskInterface.register(NAME, sdpa_mask)
        AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)


class Block(NamedTuple):
    """Queries `start` to before `end` see columns `first` to before `last`.

    `added` [.., Q, t] says which of the last t they see; those before them all queries see.
    """

    start: int
    end: int
    first: int
    last: int
    added: Tensor


def attention(
    module: torch.nn.Module,
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B G T D"],
    value: Float[Tensor, "B G T D"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "B Q H D"], None]:
    """Return what `transformers`' attention functions return; G heads of keys serve H heads of queries."""
    num_queries, num_columns, dtype = query.shape[2], key.shape[2], product_dtype(query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_causal = getattr(module, "is_causal", True) if others.get("is_causal") is None else others["is_causal"]
    is_plain = dropout == 0 and all(others.get(name) is None for name in UNSUPPORTED)
    is_known = is_plain and query.device.type == "cpu" and (attention_mask is not None or is_causal)
    if is_known and num_queries == 1 and _is_added_for_rows(attention_mask):
        assert attention_mask is not None
        mixed = last_token_attention(query, key, value, attention_mask, scale).to(dtype)
    elif is_known and pays(query.shape[:3], num_columns, dtype):
        blocks = plan_blocks(attention_mask, num_queries, num_columns, dtype)
        mixed = block_attention(query.to(dtype), key.to(dtype), value.to(dtype), blocks, scale)
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    return mixed.transpose(1, 2).contiguous(), None


def _is_added_for_rows(mask: Tensor | None) -> bool:
    """Return True for a mask of numbers that is the same for all heads, as the sampler makes it."""
    return mask is not None and mask.dtype != torch.bool and mask.shape[1] == 1


def product_dtype(states: Tensor) -> torch.dtype:
    """Return the precision of matrix products of `states` on a CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype


def pays(shape: Sequence[int], num_columns: int, dtype: torch.dtype) -> bool:
    """Return True where blocks are the faster way, for queries of `shape` [B, H, Q], and take no more than they may."""
    return shape[2] > 1 and prod(shape) * num_columns * dtype.itemsize <= MAX_WEIGHTS_BYTES


def block_attention(
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B G T D"],
    value: Float[Tensor, "B G T D"],
    blocks: Sequence[Block],
    scale: float,
) -> Float[Tensor, "B H Q D"]:
    """Return softmax(scale Q K^T + mask) V, by blocks of queries."""
    num_shared = query.shape[1] // key.shape[1]
    mixed: Tensor = _Blocks.apply(query, repeat_kv(key, num_shared), repeat_kv(value, num_shared), blocks, scale)
    return mixed


def last_token_attention(
    query: Float[Tensor, "B H 1 D"],
    key: Float[Tensor, "B G T D"],
    value: Float[Tensor, "B G T D"],
    added: Float[Tensor, "B 1 1 T"],
    scale: float,
) -> Float[Tensor, "B H 1 D"]:
    """Return softmax(scale q K^T + added) V for one query a row, for all rows and heads at once, as precise as K."""
    rows, groups, columns, _ = key.shape
    query = query.to(key.dtype).reshape(rows * groups, -1, query.shape[-1])
    with torch.autocast("cpu", enabled=False), small_products():
        scores = (query @ key.flatten(0, 1).mT).mul_(scale).view(rows, groups, -1, columns).add_(added)
        mixed = torch.softmax(scores, dim=-1).flatten(0, 1) @ value.flatten(0, 1)
    return mixed.view(rows, -1, 1, value.shape[-1])


def plan_blocks(mask: Tensor | None, num_queries: int, num_columns: int, dtype: torch.dtype) -> list[Block]:
    """Return the blocks of a mask, which is True, or 0, where a query sees a column: [1 or B, 1 or H, Q, T].

    None is causal, with the last query at the last column.
    """
    lowest = torch.finfo(dtype).min
    mask = None if mask is None else mask.expand(*mask.shape[:3], num_columns)
    blocks = []
    for start in range(0, num_queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, num_queries)
        if mask is None:
            first, last, length = 0, num_columns - num_queries + end, end - start
            added = torch.full((length, length), lowest, dtype=dtype).triu_(1)[None, None]
        else:
            part = mask[:, :, start:end]
            first, last = seen_columns(part, num_columns)
            part = part[..., first:last]
            if part.dtype == torch.bool:
                added = torch.zeros(part.shape, dtype=dtype).masked_fill_(~part, lowest)
            else:
                added = part.to(dtype)
        blocks.append(Block(start, end, first, last, added))
    return blocks


def seen_columns(mask: Tensor, num_columns: int) -> tuple[int, int]:
    """Return the first column that some query of a block sees, and the one behind the last, to the next full step.

    Behind the block, and in the packed sequences before its own, no query sees anything.
    """
    # What depends on values would cut a compiled graph in two.
    if mask.shape[-1] != num_columns or torch.compiler.is_compiling():
        return 0, num_columns
    is_seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    columns = is_seen.flatten(0, 2).any(0).nonzero()[:, 0]
    if len(columns) == 0:
        return 0, num_columns
    first, last = int(columns[0]), int(columns[-1]) + 1
    return first // COLUMN_STEP * COLUMN_STEP, min(num_columns, -(-last // COLUMN_STEP) * COLUMN_STEP)


class _Blocks(torch.autograd.Function):
    """Attention by blocks of queries. What is kept for the backward pass are the inputs and the weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
        rows, heads = query.shape[:2]
        query, key, value = (states.flatten(0, 1) for states in (query, key, value))
        output, weights = query.new_empty(*query.shape[:2], value.shape[-1]), list[Tensor]()
        for start, end, first, last, added in blocks:
            scores = query.new_empty(len(query), end - start, last - first)
            torch.baddbmm(scores, query[:, start:end], key[:, first:last].mT, beta=0, alpha=scale, out=scores)
            scores.unflatten(0, (rows, heads))[..., last - first - added.shape[-1] :] += added
            # The softmax in fp32 is the faster one too.
            exact = torch.promote_types(query.dtype, torch.float32)
            seen = torch.softmax(scores, dim=-1, dtype=exact).to(query.dtype)
            torch.bmm(seen, value[:, first:last], out=output[:, start:end])
            if any(ctx.needs_input_grad):
                weights.append(seen)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.spans, ctx.scale, ctx.outer = [block[:4] for block in blocks], scale, (rows, heads)
        return output.unflatten(0, ctx.outer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # dS = P (dP - sum_t P dP), with P the weights and dP = dO V^T
        query, key, value, *weights = ctx.saved_tensors
        gradient = gradient.flatten(0, 1)
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        beta = 0 if len(ctx.spans) == 1 else 1  # a single block would only add to zeros
        for (start, end, first, last), seen in zip(ctx.spans, weights, strict=True):
            to_output = gradient[:, start:end]
            to_weights = torch.bmm(to_output, value[:, first:last].mT)
            scores = torch._softmax_backward_data(to_weights, seen, -1, seen.dtype, grad_input=to_weights)
            torch.bmm(scores, key[:, first:last], out=to_query[:, start:end])
            for total, left, right in ((to_key, scores, query[:, start:end]), (to_value, seen, to_output)):
                total[:, first:last].baddbmm_(left.mT, right, beta=beta)
        found = (to_query.mul_(ctx.scale), to_key.mul_(ctx.scale), to_value)
        return *(states.unflatten(0, ctx.outer) for states in found), None, None
