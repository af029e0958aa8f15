"""What a live row remembers between two tokens: its keys and values, or, for any other kind of model, its tokens.

`make_row_memory` looks at the model and tries its slots on four tokens against plain forward passes; a model that does not
pass runs through `TokenMemory`, which is exact for every causal LM and slow, and says so once on standard error.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from qinglan.models.kv_cache import AttentionPlan, SlotCache, attention_plan

MAX_FORWARD_TOKENS = 8192
"""Tokens in one forward pass of `TokenMemory`."""


class RowMemory(Protocol):
    """Rows in slots 0, 1, ...; the live ones stand first."""

    def prefill(self, prompts: Sequence[Sequence[int]], targets: Sequence[int], sources: Sequence[int]) -> None:
        """Let slot `targets[i]` hold prompt `sources[i]`."""

    def decode(
        self, tokens: Int[Tensor, " live"], positions: Int[Tensor, " live"], width: int
    ) -> Float[Tensor, "live vocab"]:
        """Append a token to each live row, at its position, and return the logits after it."""

    def copy(self, targets: Sequence[int], sources: Sequence[int], width: int) -> None:
        """Copy slots `sources`, of at most `width` tokens, over slots `targets`."""


class TokenMemory:
    """Remembers tokens and runs every row in full at every step: exact for any causal LM, and slow."""

    def __init__(self, model: PreTrainedModel, num_slots: int) -> None:
        self.model = model
        self.slots: list[list[int]] = [[] for _ in range(num_slots)]

    def prefill(self, prompts: Sequence[Sequence[int]], targets: Sequence[int], sources: Sequence[int]) -> None:
        """Let slot `targets[i]` hold prompt `sources[i]`."""
        for target, source in zip(targets, sources, strict=True):
            self.slots[target] = list(prompts[source])

    def decode(
        self, tokens: Int[Tensor, " live"], positions: Int[Tensor, " live"], width: int
    ) -> Float[Tensor, "live vocab"]:
        """Append a token to each live row and run rows of equal length together, so that nothing is padded."""
        by_length: dict[int, list[int]] = {}
        for slot, (token, position) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            self.slots[slot] = [*self.slots[slot][:position], token]
            by_length.setdefault(position + 1, []).append(slot)
        slots, logits = [], []
        for length, group in by_length.items():
            rows = max(1, MAX_FORWARD_TOKENS // length)
            for start in range(0, len(group), rows):
                part = group[start : start + rows]
                input_ids = torch.tensor([self.slots[slot] for slot in part], device=tokens.device)
                logits.append(self.model(input_ids=input_ids, use_cache=False).logits[:, -1])
                slots += part
        order = torch.tensor(slots, device=tokens.device).argsort()
        return torch.cat(logits)[order]

    def copy(self, targets: Sequence[int], sources: Sequence[int], width: int) -> None:
        """Copy slots `sources` over slots `targets`."""
        for target, source in zip(targets, sources, strict=True):
            self.slots[target] = list(self.slots[source])


class ModelFacts(NamedTuple):
    """What the sampler knows about a model."""

    plan: AttentionPlan | None
    """None: no keys and values to keep."""
    bytes_per_token: int
    """Memory that one token of one row takes."""


_FACTS: WeakKeyDictionary[PreTrainedModel, ModelFacts] = WeakKeyDictionary()
"""Facts follow from the architecture, so a model is tried once however often it samples."""


def model_facts(model: PreTrainedModel, name: str, dtype: torch.dtype | None) -> ModelFacts:
    """Return what memory a model needs; `dtype` is that of keys and values, None for the model's own."""
    if model not in _FACTS:
        plan = attention_plan(model)
        why = "it keeps no plain keys and values" if plan is None else None
        per_token = 8
        if plan is not None:
            why, per_token = _try_slots(model, plan, dtype)
        if why is not None:
            print(f"sampling from {name}: {why}; taking the slower path without a cache (exact)", file=sys.stderr)
        _FACTS[model] = ModelFacts(plan if why is None else None, per_token)
    return _FACTS[model]


def make_row_memory(
    model: PreTrainedModel, facts: ModelFacts, num_slots: int, max_width: int, dtype: torch.dtype | None
) -> RowMemory:
    """Return memory for `num_slots` rows of up to `max_width` tokens."""
    if facts.plan is None:
        return TokenMemory(model, num_slots)
    return SlotCache(model, facts.plan, num_slots, max_width, dtype)


def _try_slots(model: PreTrainedModel, plan: AttentionPlan, dtype: torch.dtype | None) -> tuple[str | None, int]:
    """Decode two rows of unequal length by slots and by plain forward passes.

    Returns what went wrong, or None, and the bytes that a token takes. The errors caught are those that a model raises
    which does not take positions, masks or a cache in the usual form.
    """
    rows = [[0, 1, 2, 3, 1], [2, 0, 1]]
    cache = SlotCache(model, plan, 2, 5, dtype)
    device = model.device
    try:
        cache.prefill([row[:-1] for row in rows], [0, 1], [0, 1])
        last = torch.tensor([row[-1] for row in rows], device=device)
        positions = torch.tensor([len(row) - 1 for row in rows], device=device)
        got = cache.decode(last, positions, 5).float()
        per_token = cache.bytes_per_token()
        want = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0, -1] for row in rows]
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError) as error:
        return f"its attention does not take a cache by slots ({type(error).__name__}: {error})", 8
    expected = torch.stack(want).float()
    tolerance = 1e-3 if cache.mask_dtype == torch.float32 else 5e-2
    if (got - expected).abs().max() > tolerance * expected.abs().max():
        return "a cache by slots changes its logits (an unknown kind of attention or position)", 8
    return None, per_token
