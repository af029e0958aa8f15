"""The trunk of Llama, Mistral, Qwen2 and Qwen3, written out for processors: the same numbers with less work.

`transformers`' own forward passes serve every other architecture, and all of CUDA. Here, for the decoders that most
models are (ours among them):

- the last layer is worked out where a state is asked for: behind the keys and values nothing looks sideways any more,
  so that a prompt's tokens, which no loss reads, need no output matrix and no MLP there;
- what stands between the products are compiled kernels (`kernels.py`), which read tokens in runs, without padding;
- where there are none, a norm and a rotation are functions with their gradient written out, and masks become blocks
  once for all layers (`attention.py`).

Matrices are `transformers`' modules, called as they are, adapters included; only decoding has copies of its own
(`packed.py`).

Letters: B rows, T columns, H heads, K units of a head, D hidden units, M places whose states are asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from qinglan.core.device import Device
from qinglan.models import attention, kernels
from qinglan.models.kernels import Rotation, Runs
from qinglan.models.sizes import filled_up

ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Values of `config.model_type`."""
MIN_TOKENS, MAX_BYTES = 1024, 2**24
"""Batches of fewer tokens, or of models with more bytes, are computed one by one, each by all threads."""


def is_written_out(model: PreTrainedModel) -> bool:
    """Return True if `trunk_states` runs this model: a known decoder on a CPU, without windows or compiling.

    Nor may a hook wait on trunk, layers, attention, MLPs or norms, which are not called as modules (linear layers are).
    """
    config = model.config
    trunk: Any = model.base_model
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    has_window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return (
        config.model_type in ARCHITECTURES
        and (model.device.type, model.dtype) == ("cpu", torch.float32)
        and config._attn_implementation == attention.NAME
        and set(kinds) == {"full_attention"}
        and not has_window
        and "forward" not in vars(trunk)  # compiled
        and not any(map(_has_hooks, _parts(trunk)))
    )


def num_at_once(models: Sequence[PreTrainedModel], device: Device, units: Sequence[int], max_tokens: int) -> int:
    """Return how many batches are best computed at the same time; they share the budget of `max_tokens`.

    More than one for small models only, whose products keep no team of threads busy, and only where nothing of a
    forward pass is kept in the model: that is known of those that are written out here.

    Args:
        models: those that each batch runs through.
        device: its precision of products counts: `MAX_BYTES` are those of weights in it.
        units: tokens of each sequence, or of each group that stays together.
        max_tokens: never exceeded by batches together, unless by one unit alone.
    """
    num_tokens, longest = sum(units), max(units, default=0)
    if not all(is_written_out(model) and _has_fixed_rotation(model) for model in models):
        return 1
    num_weights = sum(weights.numel() for model in models for weights in model.parameters())
    if num_weights * device.compute_dtype.itemsize > MAX_BYTES:
        return 1
    most = min(max_tokens // max(1, longest), min(num_tokens, max_tokens) // MIN_TOKENS)
    return max(1, min(torch.get_num_threads(), most))


def share_of_budget(units: Sequence[int], max_tokens: int, at_once: int) -> int:
    """Return the tokens of one part where parts are cut one after the other: all workers are to have some."""
    return max_tokens if at_once == 1 else min(max_tokens, sum(units)) // at_once


def rotation_table(model: PreTrainedModel, num_positions: int) -> tuple[Tensor, Tensor] | None:
    """Return cosines and sines of positions 0 to before `num_positions`; None if they depend on the text's length."""
    if not _has_fixed_rotation(model):
        return None
    trunk: Any = model.base_model
    positions = torch.arange(num_positions, device=model.device)[None]
    cos, sin = trunk.rotary_emb(torch.empty(0, dtype=model.dtype, device=model.device), positions)
    return cos[0], sin[0]


def _has_fixed_rotation(model: PreTrainedModel) -> bool:
    trunk: Any = model.base_model
    return getattr(trunk.rotary_emb, "rope_type", "default") not in ("dynamic", "longrope")


def _parts(trunk: Any) -> Iterator[torch.nn.Module]:
    yield from (trunk, trunk.norm)
    for layer in trunk.layers:
        block = layer.self_attn
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        yield from (layer, block, layer.mlp, layer.mlp.act_fn, *norms)
        yield from (getattr(block, name) for name in ("q_norm", "k_norm") if hasattr(block, name))


def _has_hooks(part: torch.nn.Module) -> bool:
    kinds = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(kinds)


def trunk_states(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"],
    mask: Tensor | None = None,
    *,
    attend: Callable[..., Tensor] | None = None,
    places: Int[Tensor, " M"] | None = None,
    runs: Runs | None = None,
    products: Sequence["Products"] = (),
    rotations: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "B T D"] | Float[Tensor, "M D"]:
    """Return the last hidden states, behind the final norm, as `transformers` gives them.

    Args:
        model: one for which `is_written_out`.
        input_ids: tokens.
        position_ids: their positions.
        mask: what `attention.attention` takes; None: causal, and where positions start again, a sequence of its own.
        attend: what keeps keys and values of earlier tokens; default: there are none. From a layer's attention, its
            number, its queries, keys and values as they leave the matrices, the rotation and the mask to what the
            queries read, [B, T, H, K] or [B, T, HK].
        places: numbers row * T + column of the states that are asked for; default: all.
        runs: what sees what where `input_ids` are one list of tokens (B = 1), in place of `mask`.
        products: what stands in for the layers' matrices (`packed.py`).
        rotations: `rotation_table`, where it is kept.
    """
    trunk: Any = model.base_model
    states = trunk.embed_tokens(input_ids)
    if rotations is None:
        rotation = trunk.rotary_emb(states, position_ids)
    else:
        rotation = rotations[0][position_ids], rotations[1][position_ids]
    dtype = attention.product_dtype(states)
    if attend is None:
        attend = _mixing(model, position_ids, mask, runs, rotation, dtype)
    early = places if places is not None and len(places) < input_ids.numel() else None
    layers, change = trunk.layers[: model.config.num_hidden_layers], None
    for index, (layer, own) in enumerate(zip(layers, products or map(Products.of, layers), strict=True)):
        block = layer.self_attn
        states, normed = add_normalize(layer.input_layernorm, states, change, dtype)
        heads = own.heads(normed)
        mixed = attend(block, index, heads, rotation, mask).flatten(2)
        if early is not None and index == len(layers) - 1:
            states, mixed = (part.flatten(0, 1).index_select(0, early) for part in (states, mixed))
        states, normed = add_normalize(layer.post_attention_layernorm, states, own.output(mixed), dtype)
        change = own.down(gate(layer.mlp, *own.gate_and_up(normed)))
    states = add_normalize(trunk.norm, states, change, states.dtype)[1]
    return states if places is None or early is not None else states.flatten(0, 1).index_select(0, places)


def _mixing(
    model: PreTrainedModel,
    position_ids: Int[Tensor, "B T"],
    mask: Tensor | None,
    runs: Runs | None,
    rotation: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> Callable[..., Float[Tensor, "B T H K"]]:
    """Return what `trunk_states` takes as `attend` for whole texts, planned once for all layers.

    By kernels over `runs` where there are some; else by blocks of `mask`, or, where these would take too much memory,
    as in other architectures. `dtype` is that of products.
    """
    if runs is not None:
        angles = Rotation(*(part[0].contiguous() for part in rotation))

        def in_runs(block: Any, _: int, heads: Sequence[Tensor], *__: Any) -> Tensor:
            query, key, value = (part[0] for part in _split(block, heads))
            return kernels.attend(query, key, value, runs, angles, block.scaling)[None]

        return in_runs
    seen = packed_mask(position_ids) if mask is None else mask
    num_rows, length = position_ids.shape
    if attention.pays((num_rows, model.config.num_attention_heads, length), length, dtype):
        blocks = attention.plan_blocks(seen, length, length, dtype)

        def in_blocks(block: Any, _: int, heads: Sequence[Tensor], *__: Any) -> Tensor:
            parts = rotated(block, heads, rotation)
            return attention.block_attention(*parts, blocks, block.scaling).transpose(1, 2)

        return in_blocks

    def by_module(block: Any, _: int, heads: Sequence[Tensor], *__: Any) -> Tensor:
        parts = rotated(block, heads, rotation)
        return attention.attention(block, *parts, seen, scaling=block.scaling)[0]

    return by_module


def states_of_batch(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B 1 T T"] | None = None,
    places: Int[Tensor, " M"] | None = None,
) -> Float[Tensor, "B T D"] | Float[Tensor, "M D"]:
    """Return `trunk_states` of whole texts, columns and places filled up so that few different sizes occur.

    Products are compiled for each size, which takes longer than a small one takes to run, and odd sizes run slower.
    """
    num_columns, context = input_ids.shape[1], getattr(model.config, "max_position_embeddings", None)
    width = filled_up(num_columns)
    if width > (context or width):
        width = num_columns
    more = width - num_columns
    input_ids = F.pad(input_ids, (0, more))
    # They count on, so that they do not look like one more sequence.
    position_ids = torch.cat([position_ids, position_ids[:, -1:] + torch.arange(1, more + 1)], dim=1)
    mask = None if mask is None else F.pad(mask, (0, more, 0, more))
    if places is None:
        return trunk_states(model, input_ids, position_ids, mask)[:, :num_columns]
    moved = places // num_columns * width + places % num_columns
    # Some places may be asked for twice: where that makes them more than there are, nothing is gained.
    more = max(0, min(filled_up(len(places), 5), input_ids.numel()) - len(places))
    return trunk_states(model, input_ids, position_ids, mask, places=F.pad(moved, (0, more)))[: len(places)]


def states_of_runs(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"],
    tokens: Int[Tensor, " N"],
    runs: Runs,
    places: Int[Tensor, " M"] | None,
) -> Float[Tensor, "M D"] | Float[Tensor, "B T D"]:
    """Return `states_of_batch` worked out on the tokens at the places `tokens` alone, which stand in `runs`.

    Without `places` the states of all, zeros where there is no token.
    """
    more = filled_up(len(tokens), 5) - len(tokens)  # lists of tokens have more sizes than rows have
    ids, positions = (F.pad(one.flatten()[tokens], (0, more))[None] for one in (input_ids, position_ids))
    runs = runs.with_filler(more)
    if places is None:
        states = trunk_states(model, ids, positions, runs=runs)[0, : len(tokens)]
        rest = states.new_zeros(input_ids.numel(), states.shape[-1])
        return rest.index_copy(0, tokens, states).view(*input_ids.shape, -1)
    numbers = tokens.new_zeros(input_ids.numel()).index_copy_(0, tokens, torch.arange(len(tokens)))
    most = max(0, min(filled_up(len(places), 5), ids.numel()) - len(places))
    wanted = F.pad(numbers[places], (0, most))
    return trunk_states(model, ids, positions, runs=runs, places=wanted)[: len(places)]


def has_runs(model: PreTrainedModel) -> bool:
    """Return True if this model can be worked out by `states_of_runs`."""
    return is_written_out(model) and kernels.are_there()


def packed_mask(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"] | None:
    """Return who sees whom where rows hold several sequences; None where each holds one, so that causal is enough."""
    starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0))
    if not starts.any():
        return None
    segments = starts.cumsum(dim=1)
    is_causal = torch.ones(2 * position_ids.shape[1:], dtype=torch.bool).tril()
    return ((segments[:, :, None] == segments[:, None]) & is_causal)[:, None]


class Products(NamedTuple):
    """The products of a layer: from normed states to queries, keys and values; from mixed values; the MLP's three."""

    heads: Callable[[Tensor], Sequence[Tensor]]
    output: Callable[[Tensor], Tensor]
    gate_and_up: Callable[[Tensor], Sequence[Tensor]]
    down: Callable[[Tensor], Tensor]

    @staticmethod
    def of(layer: Any) -> "Products":
        """Return those of the modules as they are, adapters included."""
        block, mlp = layer.self_attn, layer.mlp
        heads, halves = (block.q_proj, block.k_proj, block.v_proj), (mlp.gate_proj, mlp.up_proj)
        return Products(
            lambda normed: [matrix(normed) for matrix in heads],
            block.o_proj,
            lambda normed: [matrix(normed) for matrix in halves],
            mlp.down_proj,
        )


def _split(block: Any, heads: Sequence[Float[Tensor, "B T _"]]) -> Sequence[Float[Tensor, "B T _ K"]]:
    """Return queries, keys and values by heads, behind their norms."""
    query, key, value = (one.view(*one.shape[:2], -1, block.head_dim) for one in heads)
    if hasattr(block, "q_norm"):
        pairs = ((block.q_norm, query), (block.k_norm, key))
        query, key = (add_normalize(norm, states, None, states.dtype)[1] for norm, states in pairs)
    return query, key, value


def rotated(
    block: Any, heads: Sequence[Float[Tensor, "B T _"]], rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, [B, H, T, K], queries and keys rotated."""
    query, key, value = _split(block, heads)
    return rotate(query, *rotation), rotate(key, *rotation), value.transpose(1, 2)


def add_normalize(
    norm: Any, states: Float[Tensor, "*n D"], added: Float[Tensor, "*n D"] | None, dtype: torch.dtype
) -> tuple[Float[Tensor, "*n D"], Float[Tensor, "*n D"]]:
    """Return states + added (None: 0), and the output of a module for RMS norm of that in `dtype`; sums are fp32."""
    if kernels.are_there():
        return kernels.add_normalize(states, added, norm.weight, norm.variance_epsilon, dtype)
    states = states if added is None else states + added
    if torch.is_grad_enabled():
        return states, _RMSNorm.apply(states, norm.weight, norm.variance_epsilon, dtype)
    exact = states.float()
    return states, (exact * _scale_of(exact, norm.variance_epsilon)).mul_(norm.weight).to(dtype)


def gate(mlp: Any, opened: Float[Tensor, "*n M"], up: Float[Tensor, "*n M"]) -> Float[Tensor, "*n M"]:
    """Return what an MLP's last matrix reads."""
    if type(mlp.act_fn) is SiLUActivation and opened.dtype == up.dtype and kernels.are_there():
        return kernels.gated(opened, up)
    return mlp.act_fn(opened) * up


def rotate(x: Float[Tensor, "B T H K"], cos: Float[Tensor, "B T K"], sin: Float[Tensor, "B T K"]) -> Tensor:
    """Return queries or keys turned by their positions, [B, H, T, K]."""
    if not torch.is_grad_enabled():
        return _rotated(x.transpose(1, 2).contiguous(), cos, sin, 1)
    return _Rotate.apply(x, cos, sin)


def _scale_of(x: Float[Tensor, "*n D"], eps: float) -> Float[Tensor, "*n 1"]:
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return mean_square.add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, equation 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.float()
        scale = _scale_of(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # dx = r g w - x r^3 mean(g w x),  dw = sum g x r: the gradient of a layer norm with mean 0, but that the mean
        # would depend on x, too; what that takes away, r mean(g w), is added again.
        x, weight, scale = ctx.saved_tensors
        gradient, units = gradient.float(), x.shape[-1:]
        wanted = [True, ctx.needs_input_grad[1], False]
        to_x, to_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x, units, torch.zeros_like(scale), scale, weight, None, wanted
        )
        to_x.add_(torch.linalg.vecdot(gradient, weight)[..., None] * scale, alpha=1 / len(weight))
        return to_x, to_weight, None, None


class _Rotate(torch.autograd.Function):
    """Rotary positions (Su et al. 2021, equation 34): [B, T, H, K] and cos, sin [B, T, K] to [B, H, T, K].

    The first half y1 = x1 cos - x2 sin and the second half y2 = x2 cos + x1 sin, in fp32, rounded to x's precision.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x.transpose(1, 2).contiguous(), cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # the transpose of a rotation turns back
        return _rotated(gradient, cos, sin, -1).transpose(1, 2), None, None


def _rotated(x: Float[Tensor, "B H T K"], cos: Tensor, sin: Tensor, way: int) -> Float[Tensor, "B H T K"]:
    half, cos, sin, exact = x.shape[-1] // 2, cos[:, None], sin[:, None], x.float()
    first, second = exact[..., :half], exact[..., half:]
    y = exact * cos
    y[..., :half].addcmul_(second, sin[..., :half], value=-way)
    y[..., half:].addcmul_(first, sin[..., half:], value=way)
    return y.to(x.dtype)
