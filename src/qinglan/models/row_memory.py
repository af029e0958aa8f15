"""What a row remembers between two tokens: its keys and values or, for any other kind of model, its tokens.

`model_facts` looks at a model and tries slots of keys and values against plain forward passes. A model that does not
pass runs through `TokenMemory`, exact for every causal LM, but slow, and it is said once on standard error.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from qinglan.models.kv_cache import AttentionPlan, SlotCache, attention_plan
from qinglan.models.language_model import LanguageModel, vocabulary_logits
from qinglan.models.trunk import has_runs

MAX_FORWARD_TOKENS = 8192
"""Tokens in one forward pass of `TokenMemory`."""


class RowMemory(Protocol):
    """Rows in slots; the live ones are slots 0, 1, ... without gaps."""

    def prefill(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[int], sources: Sequence[int]
    ) -> Float[Tensor, "rows columns hidden"]:
        """Let slot `targets[i]` hold prompt `sources[i]`; return the states of all prompts, padded on the right.

        More rows and columns may follow.
        """
        ...

    def extend(
        self, tokens: Int[Tensor, "live queries"], positions: Int[Tensor, "live queries"], width: int
    ) -> Float[Tensor, "rows queries hidden"]:
        """Append tokens to each live row, at their positions, and return their states; more rows may follow."""
        ...

    def copy(self, targets: Sequence[int], sources: Sequence[int], width: int) -> None:
        """Copy slots `sources`, of at most `width` tokens, over slots `targets`."""


class TokenMemory:
    """Remembers tokens, and runs every row in full at every step."""

    def __init__(self, model: PreTrainedModel, num_slots: int) -> None:
        self.model = model
        self.slots: list[list[int]] = [[] for _ in range(num_slots)]

    def prefill(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[int], sources: Sequence[int]
    ) -> Float[Tensor, "prompts columns hidden"]:
        """Let slot `targets[i]` hold prompt `sources[i]`; return the states of all prompts, each run alone."""
        for target, source in zip(targets, sources, strict=True):
            self.slots[target] = list(prompts[source])
        # A prompt without tokens has no states; those of token 0 fill its row and are never read.
        return pad_sequence([self._run([prompt or [0]])[0] for prompt in prompts], batch_first=True)

    def extend(
        self, tokens: Int[Tensor, "live queries"], positions: Int[Tensor, "live queries"], width: int
    ) -> Float[Tensor, "live queries hidden"]:
        """Append tokens to each live row; rows of equal length run together, so that nothing is padded."""
        num_new = tokens.shape[1]
        by_length: dict[int, list[int]] = {}
        for slot, (row, position) in enumerate(zip(tokens.tolist(), positions[:, 0].tolist(), strict=True)):
            self.slots[slot] = [*self.slots[slot][:position], *row]
            by_length.setdefault(position + num_new, []).append(slot)
        slots: list[int] = []
        states = []
        for length, group in by_length.items():
            num_rows = max(1, MAX_FORWARD_TOKENS // length)
            for start in range(0, len(group), num_rows):
                part = group[start : start + num_rows]
                states.append(self._run([self.slots[slot] for slot in part])[:, -num_new:])
                slots += part
        order = torch.tensor(slots, device=tokens.device).argsort()
        return torch.cat(states)[order]

    def _run(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "rows columns hidden"]:
        input_ids = torch.tensor(rows, device=self.model.device)
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def copy(self, targets: Sequence[int], sources: Sequence[int], width: int) -> None:
        """Copy slots `sources` over slots `targets`."""
        for target, source in zip(targets, sources, strict=True):
            self.slots[target] = list(self.slots[source])


def dtype_of_keys(lm: LanguageModel) -> torch.dtype | None:
    """Return in which precision keys and values are kept, None for the model's own.

    On a CPU bf16 only where kernels of ours read them: PyTorch's bf16 products are compiled for each shape, and a step
    of decoding has many.
    """
    is_slow = lm.device.torch_device.type == "cpu" and not has_runs(lm.model)
    return None if is_slow or lm.device.compute_dtype == torch.float32 else torch.bfloat16


class ModelFacts(NamedTuple):
    """What the sampler must know about a model."""

    plan: AttentionPlan | None
    """None: there are no keys and values to keep."""
    bytes_per_token: int
    """Memory that one token of one row takes."""


_FACTS: WeakKeyDictionary[PreTrainedModel, dict[torch.dtype | None, ModelFacts]] = WeakKeyDictionary()
"""They follow from the architecture, so a model is tried once in a precision, however often it samples."""


def model_facts(model: PreTrainedModel, name: str, dtype: torch.dtype | None) -> ModelFacts:
    """Return what memory a model needs; `dtype` is that of keys and values, None for the model's own."""
    known = _FACTS.setdefault(model, {})
    if dtype not in known:
        plan = attention_plan(model)
        if plan is None:
            why, per_token = "its layers are not known to keep plain keys and values", 1
        else:
            why, per_token = _try_slots(model, plan, dtype)
        if why and all(facts.plan is not None for facts in known.values()):
            print(
                f"sampling from {name}: {why}; every step reads the whole text again, slower but exact", file=sys.stderr
            )
        known[dtype] = ModelFacts(None if why else plan, per_token * (dtype or model.dtype).itemsize)
    return known[dtype]


def make_row_memory(
    model: PreTrainedModel, facts: ModelFacts, num_slots: int, max_width: int, dtype: torch.dtype | None
) -> RowMemory:
    """Return memory for `num_slots` rows of up to `max_width` tokens."""
    if facts.plan is None:
        return TokenMemory(model, num_slots)
    return SlotCache(model, facts.plan, num_slots, max_width, dtype)


def _try_slots(model: PreTrainedModel, plan: AttentionPlan, dtype: torch.dtype | None) -> tuple[str, int]:
    """Decode two rows of unequal length, by slots and by plain forward passes.

    Returns what went wrong (nothing: an empty text) and how many numbers a token takes. The errors that are caught are
    those of a model that does not take positions, masks or a cache in the usual form.
    """
    rows = [[0, 1, 2, 3, 1], [2, 0, 1]]
    cache = SlotCache(model, plan, 2, 5, dtype)
    plain = TokenMemory(model, 2)
    last = torch.tensor([row[-1] for row in rows], device=model.device)
    positions = torch.tensor([len(row) - 1 for row in rows], device=model.device)
    logits = []
    try:
        for memory in (cache, plain):
            memory.prefill([row[:-1] for row in rows], [0, 1], [0, 1])
            logits.append(vocabulary_logits(model, memory.extend(last[:, None], positions[:, None], 5)[:, 0]))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        return f"its attention takes no cache by slots ({type(error).__name__}: {error})", 1
    is_exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    tolerance = 1e-3 if is_exact else 5e-2
    if (logits[0] - logits[1]).abs().max() > tolerance * logits[1].abs().max():
        return "with a cache by slots its logits change (an unknown kind of attention or of positions)", 1
    return "", cache.values_per_token()
