"""Keys and values of the rows that are being written: one slot per row, written by index, prefixes copied, no padding.

It plugs into transformers' Cache interface, so that any Hugging Face causal LM with ordinary attention runs on it: a
layer stores what the model hands to `update` and gives back the part of its buffer that the live rows fill. It departs
from the library's caches in two ways: every row has its own length (where it writes is an index, not a shared counter),
and the masks are made here, from the lengths, and passed to the model, one for each kind of attention layer.

Slots 0..live-1 are live, without gaps. A step costs live x width, where width is the longest live row, or, with a
kernel of ours (`kernels.decode`), what the rows hold. Buffers are as large as the rows may ever become, but on the CPU
large ones take memory only when a column is first written.
"""

import mmap
import os
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple
from weakref import WeakMethod, WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from qinglan.models import kernels
from qinglan.models.attention import attention
from qinglan.models.cuda_graph import Space
from qinglan.models.decode_graphs import DecodeGraphs
from qinglan.models.kernels import Rotation
from qinglan.models.language_model import max_context
from qinglan.models.packed import pack_products
from qinglan.models.sizes import filled_up
from qinglan.models.trunk import Products, is_written_out, rotated, rotation_table, trunk_states

ROW_STEP = 16
"""Decoding on a CPU: live rows are filled up to a multiple of it."""
SMALL_BYTES = 2**26
"""Buffers that take no more, those of all layers together, are plain zeros (`lazy_zeros`)."""


class AttentionPlan(NamedTuple):
    """How far the layers of a model look back."""

    num_layers: int
    windows: dict[str, int | None]
    """Kind of layer (a name in `config.layer_types`) -> columns that it sees, its own included; None: all."""

    def masks(
        self, distance: Int[Tensor, "rows 1 queries columns"], dtype: torch.dtype
    ) -> Float[Tensor, "rows 1 queries columns"] | dict[str, Tensor]:
        """Return what the model takes as `attention_mask`: 0 where a query sees a column, the lowest number elsewhere.

        `distance` is the query's position less the column's. One mask if all layers are alike, else one for each kind.
        """
        masks = {}
        for kind, window in self.windows.items():
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            mask = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=seen.device)
            masks[kind] = mask.masked_fill_(seen, 0.0)
        return masks if len(masks) > 1 else next(iter(masks.values()))


def attention_plan(model: PreTrainedModel) -> AttentionPlan | None:
    """Return the plan of a model whose layers all keep plain keys and values; None for any other (state-space, ...)."""
    config = model.config.get_text_config(decoder=True)
    if model._is_stateful or not model._supports_attention_backend or config.is_encoder_decoder:
        return None
    if "longrope" in str(getattr(config, "rope_parameters", None)):
        return None  # all positions change with the length of the longest row, so that a neighbour would show
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return None  # chunks, for example, are cached as windows are, but what a query sees is another matter
    windows: dict[str, int | None] = {}
    for kind, layer in zip(kinds, layers, strict=True):
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        if windows.setdefault(kind, window) != window:
            return None  # two windows under one name: no mask per name can say that
    return AttentionPlan(len(layers), windows)


class Place(NamedTuple):
    """Where the next forward pass writes its states, and what it reads."""

    width: int
    """Columns in use."""
    numbers: dict[int, Tensor]
    """Decoding: number of heads -> places that are written, worked out by the first layer with so many heads."""
    positions: Int[Tensor, "live queries"] | None = None
    """Decoding: the columns that each live row writes."""
    targets: Int[Tensor, " slots"] | None = None
    """Prefill: the slots that receive columns 0..width-1 ..."""
    sources: Int[Tensor, " slots"] | None = None
    """... of these rows of the batch."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, capacity, head_dim]."""

    is_sliding = False

    def __init__(self, num_layers: int, num_slots: int, capacity: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.num_slots = num_slots
        self.capacity = capacity
        self.dtype = dtype
        self.place = Place(0, {})

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate buffers for states of this shape, [rows, heads, queries, head_dim]."""
        self.keys, self.values = (
            lazy_zeros(
                (self.num_slots, states.shape[1], self.capacity, states.shape[3]),
                self.dtype,
                states.device,
                num_alike=2 * self.num_layers,
            )
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new states, [rows, heads, queries, head_dim]; return the keys and values that the queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        width, numbers, positions, targets, sources = self.place
        keys, values = self.buffers()
        if positions is None:
            assert targets is not None and sources is not None
            keys[:, :, :width].index_copy_(0, targets, key_states[sources].to(keys.dtype))
            values[:, :, :width].index_copy_(0, targets, value_states[sources].to(values.dtype))
            return key_states, value_states
        live, num_heads = key_states.shape[:2]
        if num_heads not in numbers:
            # A buffer seen as one list of columns: slot s, head h, column c has number (s * heads + h) * capacity + c.
            starts = torch.arange(0, live * num_heads * self.capacity, self.capacity, device=positions.device)
            numbers[num_heads] = (starts[:, None] + positions.repeat_interleave(num_heads, 0)).flatten()
        for buffer, states in ((keys, key_states), (values, value_states)):
            states = states.reshape(-1, states.shape[-1]).to(buffer.dtype)
            buffer.view(-1, buffer.shape[-1])[numbers[num_heads]] = states
        return keys[:live, :, :width], values[:live, :, :width]

    def buffers(self) -> tuple[Tensor, ...]:
        """Return the layer's two buffers, none before the first token."""
        return tuple(buffer for buffer in (self.keys, self.values) if buffer is not None)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (columns, offset), which only a model asks for that makes a mask of its own."""
        return self.place.width, 0

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self.place.width

    def get_max_length(self) -> int:
        """Return the number of columns there are."""
        return self.capacity


_UNRECORDABLE: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose steps could not be recorded: that follows from the architecture, so it is tried, and said, once."""


class SlotCache(Cache):
    """The slots of all layers, and the forward passes that fill and read them (a `RowMemory`)."""

    def __init__(
        self, model: PreTrainedModel, plan: AttentionPlan, num_slots: int, capacity: int, dtype: torch.dtype | None
    ) -> None:
        """Make room for `num_slots` rows of up to `capacity` tokens; `dtype` None keeps the model's own."""
        kept, count = dtype or model.dtype, plan.num_layers
        self.slot_layers = [SlotLayer(count, num_slots, capacity, kept) for _ in range(count)]
        super().__init__(layers=list(self.slot_layers))
        self.model = model
        self.plan = plan
        self.mask_dtype = kept
        self.graphs: DecodeGraphs | None = None
        self.products: Sequence[Products] = ()
        self.is_written_out = is_written_out(model)
        self.rotations = rotation_table(model, capacity) if self.is_written_out else None

    def record_steps(self, num_slots: int, name: str) -> None:
        """Decode by CUDA graphs where the model is on a GPU; rows live in the first `num_slots` slots."""
        model = self.model
        if model.device.type != "cuda" or model in _UNRECORDABLE:
            return
        space = Space(model.device, f"decoding with {name}", lambda: _UNRECORDABLE.add(model))
        extend = WeakMethod(self._extend)  # else cache and graphs would keep each other alive, and all their memory

        def step(tokens: Tensor, positions: Tensor, width: int) -> Tensor:
            method = extend()
            assert method is not None
            return method(tokens, positions, width)

        self.graphs = DecodeGraphs(step, num_slots, self.slot_layers[0].capacity, space)

    def pack_products(self, num_rows: int, dtype: torch.dtype) -> None:
        """Run with packed copies of the weights (`packed.packed_bytes` says what they take)."""
        self.products = pack_products(self.model, num_rows, dtype)

    def values_per_token(self) -> int:
        """Return how many numbers one token of one row takes; the model must have run once."""
        return sum(buffer.shape[1] * buffer.shape[3] for layer in self.slot_layers for buffer in layer.buffers())

    def prefill(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[int], sources: Sequence[int]
    ) -> Float[Tensor, "rows columns hidden"]:
        """Run prompts once, copy prompt `sources[i]` into slot `targets[i]`, and return the trunk's states.

        They are padded on the right, and a causal mask is enough: padding stands behind every real token, and columns
        that a row has not reached are masked when it decodes. More rows may follow those of the prompts.
        """
        width, num_rows, device = max(len(prompt) for prompt in prompts), len(prompts), self.model.device
        if width == 0:
            return torch.empty(num_rows, 0, 0)
        if device.type == "cpu":  # few different shapes, as in `extend`
            most = min(self.slot_layers[0].capacity, max_context(self.model))
            width, num_rows = min(filled_up(width, 3 if width <= 64 else 5), most), filled_up(num_rows, 2)
        input_ids = np.zeros((num_rows, width), dtype=np.int64)
        for row, prompt in zip(input_ids, prompts, strict=False):
            row[: len(prompt)] = prompt
        place = Place(width, {}, None, torch.tensor(targets, device=device), torch.tensor(sources, device=device))
        columns = torch.arange(width, device=device)
        distance = (columns[:, None] - columns)[None, None]
        return self._forward(torch.from_numpy(input_ids).to(device), columns.expand(num_rows, -1), distance, place)

    def extend(
        self, tokens: Int[Tensor, "live queries"], positions: Int[Tensor, "live queries"], width: int
    ) -> Float[Tensor, "rows queries hidden"]:
        """Append tokens to each live row and return the trunk's states; the longest row is now `width` long.

        A row with fewer tokens is padded on the right: what it writes there is never seen by a token before it. Behind
        the live rows there may be some that fill them up.
        """
        if self.graphs is not None and tokens.shape[1] == 1:
            return self.graphs(tokens, positions, width)
        if tokens.device.type != "cpu":
            return self._extend(tokens, positions, width)
        # Products are compiled for each shape, so shapes are kept few: rows are filled up. Those beyond the live ones
        # write to free slots, though never to the last, where a prompt may be parked.
        live = len(tokens)
        more = -(-live // ROW_STEP) * ROW_STEP
        rows = more if more < self.slot_layers[0].num_slots else live
        tokens, positions = (F.pad(one, (0, 0, 0, rows - live)) for one in (tokens, positions))
        return self._extend(tokens, positions, width)

    def _extend(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        # Only padding may stand beyond the context; learned positions have no row for it.
        position_ids, place = positions.clamp(max=max_context(self.model) - 1), Place(width, {}, positions)
        if self._decodes_by_kernel(tokens):
            return self._forward(tokens, position_ids, None, place)
        distance = (positions[:, :, None] - torch.arange(width, device=positions.device))[:, None]
        return self._forward(tokens, position_ids, distance, place)

    def _decodes_by_kernel(self, tokens: Tensor) -> bool:
        """Return True for one token a row where a kernel of ours can store it and read its row."""
        is_single = tokens.device.type == "cpu" and tokens.shape[1] == 1
        is_known = all(layer.dtype in kernels.DTYPES for layer in self.slot_layers)
        return is_single and is_known and self.is_written_out and kernels.are_there()

    def copy(self, targets: Sequence[int], sources: Sequence[int], width: int) -> None:
        """Copy the first `width` columns of slots `sources` over slots `targets` (disjoint)."""
        device = self.model.device
        to, of = torch.tensor(targets, device=device), torch.tensor(sources, device=device)
        for layer in self.slot_layers:
            for buffer in layer.buffers():
                used = buffer[:, :, :width]
                used.index_copy_(0, to, used.index_select(0, of))

    def _forward(self, input_ids: Tensor, position_ids: Tensor, distance: Tensor | None, place: Place) -> Tensor:
        for layer in self.slot_layers:
            layer.place = place
        masks = None if distance is None else self.plan.masks(distance, self.mask_dtype)
        if not isinstance(masks, dict) and self.is_written_out:
            kept: Any = {"products": self.products, "rotations": self.rotations}
            return trunk_states(self.model, input_ids, position_ids, masks, attend=self._attend, **kept)
        output = self.model.base_model(
            input_ids=input_ids,
            attention_mask=masks,
            position_ids=position_ids,
            past_key_values=self,
            use_cache=True,
        )
        return output.last_hidden_state

    def _attend(
        self, block: Any, index: int, heads: Sequence[Tensor], rotation: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Float[Tensor, "rows queries heads units"] | Float[Tensor, "rows 1 hidden"]:
        """Store a layer's new keys and values, and return what its queries read (`trunk_states` says more)."""
        layer = self.slot_layers[index]
        if mask is None:
            assert layer.place.positions is not None
            if not layer.is_initialized:  # prompts of one token are not prefilled
                key, value = (states.unflatten(2, (-1, block.head_dim)).transpose(1, 2) for states in heads[1:])
                layer.lazy_initialization(key, value)
            has_norms = hasattr(block, "q_norm")
            norms = (block.q_norm.weight, block.k_norm.weight, block.q_norm.variance_epsilon) if has_norms else None
            places = (layer.buffers(), layer.place.positions)
            return kernels.decode(heads, *places, Rotation(*rotation), norms, block.scaling)
        query, key, value = rotated(block, heads, rotation)
        seen = layer.update(key, value)
        return attention(block, query, *seen, mask, scaling=block.scaling)[0]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, num_alike: int) -> Tensor:
    """Return zeros (a masked column must still be finite); on the CPU large ones take no memory before being written.

    Where all of its kind, `num_alike`, are small together, they are of the process's own memory, which is at hand: to
    take new pages would cost more than all writing.
    """
    num_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or os.name != "posix" or num_alike * num_bytes <= SMALL_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Pages of their own: torch.zeros would write every one, and numpy.zeros asks for huge ones.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
