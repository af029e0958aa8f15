"""Key-value memory for the sampler: one slot per live row, written by index, shared prefixes copied, no padding kept.

It plugs into transformers' Cache interface, so that any Hugging Face causal LM with ordinary attention runs on it: a layer
stores what the model hands to `update` and gives back the part of its buffer that the live rows fill. Two departures from
the library's caches: every row has its own length (the position at which it writes is an index, not a shared counter), and
masks are made here from the lengths and passed to the model explicitly, one for each kind of attention layer.

Slots 0..num_live-1 are live, without gaps. A step costs `num_live x width`, where width is the longest live row; buffers
grow by half as the rows grow, and are not given back before the end.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

Masks = Tensor | dict[str, Tensor]
"""What a model takes as `attention_mask`: one additive mask, or one for each name in `config.layer_types`."""


class AttentionPlan(NamedTuple):
    """How far the layers of a model look back."""

    num_layers: int
    windows: dict[str, int | None]
    """Kind of layer -> number of positions it sees, its own included; None where it sees everything."""

    def masks(self, visible: Bool[Tensor, "rows 1 queries width"], distance: Int[Tensor, "rows 1 queries width"],
              dtype: torch.dtype) -> Masks:  # fmt: skip
        """Return additive masks (0 where a query sees a key): `visible`, and `distance` (query - key) within the window."""
        masks = {}
        for kind, window in self.windows.items():
            seen = visible if window is None else visible & (distance < window)
            masks[kind] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
                ~seen, torch.finfo(dtype).min
            )
        return masks if len(masks) > 1 else next(iter(masks.values()))


def attention_plan(model: PreTrainedModel) -> AttentionPlan | None:
    """Return the plan of a model whose layers all keep plain keys and values, or None (state-space, cross-attention...)."""
    if model._is_stateful or not model._supports_attention_backend or model.config.is_encoder_decoder:
        return None
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers) or not layers:
        return None
    kinds = getattr(config, "layer_types", None) or ["attention"] * len(layers)
    windows: dict[str, int | None] = {}
    for kind, layer in zip(kinds, layers, strict=True):
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        if windows.setdefault(kind, window) != window:
            return None  # one name, two windows: no mask per name can express that
    return AttentionPlan(len(layers), windows)


class SlotIndex:
    """Where the next forward pass writes and reads; shared by all layers of one cache."""

    def __init__(self) -> None:
        self.capacity = 0
        self.width = 0
        self.num_live = 0
        self.targets: Tensor | None = None
        """Prefill only: slots to fill, [m]."""
        self.sources: Tensor | None = None
        """Prefill only: row of the prefill batch that each target copies, [m]."""
        self.positions: Tensor | None = None
        """Decoding only: column that each live row writes, [num_live]."""
        self._flat: dict[int, Tensor] = {}

    def decode(self, positions: Int[Tensor, " live"], width: int) -> None:
        """Point the layers at one new token for each live row."""
        self.positions, self.num_live, self.width = positions, len(positions), width
        self.targets = self.sources = None
        self._flat = {}

    def prefill(self, targets: Int[Tensor, " slots"], sources: Int[Tensor, " slots"], width: int) -> None:
        """Point the layers at `targets`, which receive columns 0..width-1 of the batch's rows `sources`."""
        self.targets, self.sources, self.width = targets, sources, width
        self.positions = None

    def flat(self, num_heads: int) -> Int[Tensor, " live*heads"]:
        """Return the written columns as rows of a buffer seen as [slots * heads * capacity, head_dim]."""
        if num_heads not in self._flat:
            assert self.positions is not None
            starts = torch.arange(self.num_live * num_heads, device=self.positions.device) * self.capacity
            self._flat[num_heads] = starts + self.positions.repeat_interleave(num_heads)
        return self._flat[num_heads]


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, capacity, head_dim]."""

    is_sliding = False

    def __init__(self, num_slots: int, index: SlotIndex, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.index = index
        self.dtype = dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeroed buffers (what is masked must still be finite) in the shape of the first states."""
        self.keys, self.values = (
            torch.zeros(
                (self.num_slots, states.shape[1], self.index.capacity, states.shape[3]),
                dtype=self.dtype or states.dtype,
                device=states.device,
            )
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new states, [rows, heads, queries, head_dim], and return what the queries may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        index = self.index
        assert self.keys is not None and self.values is not None
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if index.targets is not None:
                buffer[:, :, : index.width].index_copy_(0, index.targets, states[index.sources].to(buffer.dtype))
            else:
                rows = states.reshape(-1, states.shape[-1]).to(buffer.dtype)
                buffer.view(-1, buffer.shape[-1]).index_copy_(0, index.flat(buffer.shape[1]), rows)
        if index.targets is not None:
            return key_states, value_states
        live, width = index.num_live, index.width
        return self.keys[:live, :, :width], self.values[:live, :, :width]

    def buffers(self) -> list[Tensor]:
        """Return the layer's buffers, none before the first token."""
        return [buffer for buffer in (self.keys, self.values) if buffer is not None]

    def grow(self, capacity: int) -> None:
        """Widen the buffers to `capacity` columns."""
        if self.is_initialized:
            self.keys, self.values = (
                torch.nn.functional.pad(buffer, (0, 0, 0, capacity - buffer.shape[2])) for buffer in self.buffers()
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (columns, offset); only asked for by models that make a mask of their own."""
        return self.index.width, 0

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self.index.width

    def get_max_length(self) -> int:
        """Return -1: the layer grows."""
        return -1


class SlotCache(Cache):
    """The slots of all layers, and the forward passes that fill and read them."""

    def __init__(
        self, model: PreTrainedModel, plan: AttentionPlan, num_slots: int, max_width: int, dtype: torch.dtype | None
    ) -> None:
        """Make a cache of `num_slots` rows up to `max_width` tokens long; `dtype` None keeps the model's own."""
        self.index = SlotIndex()
        self.slot_layers = [SlotLayer(num_slots, self.index, dtype) for _ in range(plan.num_layers)]
        super().__init__(layers=list(self.slot_layers))
        self.model = model
        self.plan = plan
        self.max_width = max_width
        self.mask_dtype = dtype or model.dtype

    def bytes_per_token(self) -> int:
        """Return what one token of one row takes, in bytes; the model must have run once."""
        buffers = [buffer for layer in self.slot_layers for buffer in layer.buffers()]
        return sum(buffer.shape[1] * buffer.shape[3] * buffer.element_size() for buffer in buffers)

    def reserve(self, width: int) -> None:
        """Make room for rows of `width` tokens."""
        if width > self.index.capacity:
            capacity = min(max(width, self.index.capacity * 3 // 2, 64), max(self.max_width, width))
            for layer in self.slot_layers:
                layer.grow(capacity)
            self.index.capacity = capacity

    def prefill(self, prompts: Sequence[Sequence[int]], targets: Sequence[int], sources: Sequence[int]) -> None:
        """Run prompts once and copy prompt `sources[i]` into slot `targets[i]`.

        They are padded on the right, and a causal mask is enough: padding stands behind every real token, and columns
        that a row has not reached are masked when it decodes.
        """
        device = self.model.device
        width = max(len(prompt) for prompt in prompts)
        if width == 0:
            return
        input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in zip(input_ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        input_ids = input_ids.to(device)
        self.reserve(width)
        self.index.prefill(torch.tensor(targets, device=device), torch.tensor(sources, device=device), width)
        columns = torch.arange(width, device=device)
        distance = (columns[:, None] - columns)[None, None]
        masks = self.plan.masks(distance >= 0, distance, self.mask_dtype)
        self.model.get_decoder()(
            input_ids=input_ids,
            attention_mask=masks,
            position_ids=columns[None].expand(len(input_ids), -1),
            past_key_values=self,
            use_cache=True,
        )

    def decode(
        self, tokens: Int[Tensor, " live"], positions: Int[Tensor, " live"], width: int
    ) -> Float[Tensor, "live vocab"]:
        """Append one token to each live row and return the logits after it; `width` is the longest row's new length."""
        self.reserve(width)
        self.index.decode(positions, width)
        distance = (positions[:, None] - torch.arange(width, device=positions.device))[:, None, None]
        masks = self.plan.masks(distance >= 0, distance, self.mask_dtype)
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=masks,
            position_ids=positions[:, None],
            past_key_values=self,
            use_cache=True,
        )
        return output.logits[:, -1]

    def copy(self, targets: Sequence[int], sources: Sequence[int], width: int) -> None:
        """Copy the first `width` columns of slots `sources` over slots `targets` (disjoint)."""
        device = self.model.device
        to, of = torch.tensor(targets, device=device), torch.tensor(sources, device=device)
        for layer in self.slot_layers:
            for buffer in layer.buffers():
                used = buffer[:, :, :width]
                used.index_copy_(0, to, used.index_select(0, of))
