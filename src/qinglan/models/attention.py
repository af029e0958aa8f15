"""Attention in bf16 on a CPU, by plain matrix products.

PyTorch's fused kernel for processors saves memory, which bf16 rows of some hundred tokens do not need, and its backward
pass is slow on them: forward and backward at 24 rows of 82 tokens take 35 ms with it, 11 ms here (8 heads of 32 units,
one thread; docs/benchmarks.md). Everything else, fp32 on a CPU and all of CUDA, goes to `sdpa` as before.

Scores and weights are rounded to bf16, as `transformers`' eager attention rounds scores; sums are fp32 inside products.

Letters: B rows, H heads, Q queries, T columns, D units of a head.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "qinglan"
"""Our entry in `transformers`' table of attention functions."""
QUERY_BLOCK = 128
"""Queries in one product: a block of a causal row sees no further than its own end, which saves up to half."""
MAX_COLUMNS = 2048
"""Longer rows go to the fused kernel: the weights that are kept would take more than 4 MiB a head."""
UNSUPPORTED = ("softcap", "position_bias", "cache")
"""Extras of single architectures that are left to `sdpa`."""


def choose_attention(model: PreTrainedModel) -> None:
    """Let a model that runs on `sdpa` choose at each call between it and `bf16_attention`."""
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return
    if NAME not in AttentionInterface():
        AttentionMaskInterface.register(NAME, sdpa_mask)
        AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)


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
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    is_bf16 = query.device.type == "cpu" and dtype == torch.bfloat16
    is_short = query.shape[2] > 1 and key.shape[2] <= MAX_COLUMNS  # a single query, as in decoding, gains nothing
    if not (is_bf16 and is_short) or dropout > 0 or any(others.get(name) is not None for name in UNSUPPORTED):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    num_shared = query.shape[1] // key.shape[1]
    query, key, value = query.to(dtype), repeat_kv(key.to(dtype), num_shared), repeat_kv(value.to(dtype), num_shared)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return bf16_attention(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


def bf16_attention(
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B H T D"],
    value: Float[Tensor, "B H T D"],
    mask: Tensor | None,
    scale: float,
) -> Float[Tensor, "B H Q D"]:
    """Return softmax(scale Q K^T + mask) V, by blocks of queries.

    `mask` is True, or 0, where a query sees a column, and broadcasts to [B, H, Q, T]; None is causal, with the last
    query at the last column.
    """
    num_queries, num_columns = query.shape[2], key.shape[2]
    lowest = torch.finfo(query.dtype).min
    blocks = []
    for start in range(0, num_queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, num_queries)
        if mask is None:
            first, last = 0, num_columns - num_queries + end
            added = torch.full((end - start, last), lowest, dtype=query.dtype).triu_(last - (end - start) + 1)
        else:
            part = mask[:, :, start:end]
            first, last = seen_columns(part, num_columns)
            part = part[..., first:last]
            if part.dtype == torch.bool:
                added = torch.zeros(part.shape, dtype=query.dtype).masked_fill_(~part, lowest)
            else:
                added = part.to(query.dtype)
        seen = slice(first, last)
        blocks.append(_Block.apply(query[:, :, start:end], key[:, :, seen], value[:, :, seen], added, scale))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def seen_columns(mask: Tensor, num_columns: int) -> tuple[int, int]:
    """Return the first column that some query of a block sees, and the one behind the last.

    Behind the block, and in the packed sequences before its own, no query sees anything.
    """
    # What depends on values would cut a compiled graph in two.
    if mask.shape[-1] != num_columns or torch.compiler.is_compiling():
        return 0, num_columns
    is_seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    columns = is_seen.flatten(0, 2).any(0).nonzero()[:, 0]
    return (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, num_columns)


class _Block(torch.autograd.Function):
    """Attention of one block of queries. What is kept for the backward pass are the weights, in bf16."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, added: Tensor, scale: float) -> Tensor:
        weights = torch.softmax((query @ key.mT).mul_(scale).add_(added), dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return weights @ value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        # dS = scale * P (dP - sum_t P dP), with P the weights and dP = dO V^T
        scores = torch._softmax_backward_data(gradient @ value.mT, weights, -1, weights.dtype).mul_(ctx.scale)
        return scores @ key, scores.mT @ query, weights.mT @ gradient, None, None
