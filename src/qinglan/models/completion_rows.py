"""Forward passes over prompts with completions: the hidden states by which completions are judged, however rows look.

The completions of one prompt share a row where that is exact and saves work (`prompt_sharing.py`); every other sequence
has a row of its own, or is packed with others. The numbers are the same.

Legend: N completion tokens of a batch, S its completions, D hidden units.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from qinglan.models.language_model import TokenBatch, TokenSequence, max_context, states_at
from qinglan.models.prompt_sharing import PromptTree, TreeBatch, can_share_prompt, make_tree_batch, tree_states
from qinglan.models.tokens import collate, plan_rows
from qinglan.models.trunk import has_runs

MOST_LEFT = 15 / 16
"""Tokens with a shared prompt, as a share of those without, up to which sharing pays."""


class CompletionBatch(NamedTuple):
    """Prompts with completions, in rows."""

    rows: TokenBatch | TreeBatch
    numbers: list[int]
    """The caller's numbers of the completions, in the order in which tokens and states are given."""

    @property
    def completion_ids(self) -> Int[Tensor, " N"]:
        """The tokens of the completions, one completion after the other."""
        if isinstance(self.rows, TreeBatch):
            return self.rows.input_ids[self.rows.target_rows, self.rows.target_columns]
        return self.rows.input_ids[self.rows.target_mask]


class CompletionStates(NamedTuple):
    """Hidden states of a batch."""

    before: Float[Tensor, "N D"]
    """Before each token of a completion, one completion after the other."""
    ends: Float[Tensor, "S D"]
    """At the last one."""


def make_completion_batches(
    sequences: Sequence[TokenSequence],
    chosen: Sequence[int],
    models: Sequence[PreTrainedModel],
    *,
    max_tokens: int,
    pack: bool = False,
    multiple_of: int = 1,
) -> Iterator[CompletionBatch]:
    """Yield the `chosen` sequences in batches for forward passes of all `models`, tensors on their device.

    Args:
        sequences: prompts with completions.
        chosen: numbers in `sequences`.
        models: every model that will read the batches; all must be able to share prompts, or none is shared.
        max_tokens: budget of rows * columns of one batch; only a single sequence that is longer may exceed it.
        pack: put several sequences that share no prompt into a row where they fit.
        multiple_of: see `plan_rows`.
    """
    device, shared = models[0].device, list[list[int]]()
    if all(can_share_prompt(model) for model in models):
        context, hidden = min(map(max_context, models)), models[0].config.get_text_config().hidden_size
        in_runs = all(has_runs(model) for model in models)
        shared = [part for part in _parts(sequences, chosen, context, max_tokens, hidden, in_runs) if len(part) > 1]
    trees = [_tree_of([sequences[number] for number in part]) for part in shared]
    for rows in plan_rows([tree.num_tokens for tree in trees], max_tokens, pack=False, multiple_of=multiple_of):
        numbers = [number for [i] in rows for number in shared[i]]
        yield CompletionBatch(make_tree_batch([trees[i] for [i] in rows], device), numbers)
    in_trees = {number for part in shared for number in part}
    alone = [number for number in chosen if number not in in_trees]
    candidates = [sequences[number] for number in alone]
    for rows in plan_rows([len(one.token_ids) for one in candidates], max_tokens, pack, multiple_of):
        batch = collate(candidates, rows).to(device)
        yield CompletionBatch(batch, [alone[place.original] for place in batch.sequence_rows])


def states_before(model: PreTrainedModel, batch: CompletionBatch) -> Float[Tensor, "N D"]:
    """Return the hidden states before each token of the completions, one completion after the other; gradients flow."""
    return _states_at(model, batch.rows, *_places_before(batch.rows))


def states_at_ends(model: PreTrainedModel, batch: CompletionBatch) -> Float[Tensor, "S D"]:
    """Return the hidden state at the last token of each completion; gradients flow."""
    return _states_at(model, batch.rows, *_ends(batch.rows))


def completion_states(model: PreTrainedModel, batch: CompletionBatch) -> CompletionStates:
    """Return both of one forward pass."""
    before, ends = _places_before(batch.rows), _ends(batch.rows)
    both = (torch.cat(parts) for parts in zip(before, ends, strict=True))
    return CompletionStates(*_states_at(model, batch.rows, *both).split([len(before[0]), len(ends[0])]))


Places = tuple[Int[Tensor, " M"], Int[Tensor, " M"]]
"""Rows and columns."""


def _places_before(rows: TokenBatch | TreeBatch) -> Places:
    if isinstance(rows, TreeBatch):
        return rows.target_rows, rows.predicting_columns
    places, columns = rows.target_mask.nonzero(as_tuple=True)
    return places, columns - 1


def _ends(rows: TokenBatch | TreeBatch) -> Places:
    if isinstance(rows, TreeBatch):
        return rows.end_rows, rows.end_columns
    last = torch.tensor([(one.row, one.end - 1) for one in rows.sequence_rows], device=rows.input_ids.device)
    numbers, columns = last.unbind(dim=1)
    return numbers, columns


def _states_at(model: PreTrainedModel, rows: TokenBatch | TreeBatch, numbers: Tensor, columns: Tensor) -> Tensor:
    if isinstance(rows, TreeBatch):
        return tree_states(model, rows, numbers, columns)
    return states_at(model, rows, numbers, columns)


def lengths_of(sequences: Sequence[TokenSequence], chosen: Sequence[int]) -> list[int]:
    """Return the tokens of each of the `chosen` sequences."""
    return [len(sequences[number].token_ids) for number in chosen]


def _tree_of(sequences: Sequence[TokenSequence]) -> PromptTree:
    num_prompt = sequences[0].num_prompt_tokens
    return PromptTree(sequences[0].token_ids[:num_prompt], [one.token_ids[num_prompt:] for one in sequences])


def _parts(
    sequences: Sequence[TokenSequence],
    chosen: Sequence[int],
    context: int,
    max_tokens: int,
    hidden: int,
    in_runs: bool,
) -> list[list[int]]:
    """Return completions of one prompt that go into one row; who is alone in a part gains nothing from a tree.

    A row is no wider than `max_tokens`, nor than 3 D columns, where attention costs as much as all else (`_pays`).
    Sequences beyond the context, or with nothing completed, are left to rows of their own.
    """
    widest, by_prompt = min(max_tokens, 3 * hidden), dict[tuple[int, ...], list[list[int]]]()
    columns: dict[tuple[int, ...], int] = {}
    for number in chosen:
        ids, num_prompt = sequences[number]
        if not num_prompt < len(ids) <= context:
            continue
        prompt, length = tuple(ids[:num_prompt]), len(ids) - num_prompt
        parts = by_prompt.setdefault(prompt, [])
        if not parts or columns[prompt] + length > widest:
            parts.append([])
            columns[prompt] = num_prompt
        parts[-1].append(number)
        columns[prompt] += length
    found = [part for parts in by_prompt.values() for part in parts]
    return [part for part in found if _pays([sequences[one] for one in part], hidden, in_runs)]


def _pays(part: Sequence[TokenSequence], hidden: int, in_runs: bool) -> bool:
    """Return True if one row with a shared prompt takes less time than separate rows.

    Kernels of our own skip what a token of a tree does not see, so that every token saved is a gain. Elsewhere, in
    units of D products a layer, a token of a row with T columns costs about 12 D and, for attention, 2 T at half the
    speed of the others (measured on a CPU); causal attention skips half of these, the mask of a tree does not.
    """
    lengths = [len(one.token_ids) for one in part]
    columns = sum(lengths) - (len(part) - 1) * part[0].num_prompt_tokens
    if in_runs:
        return columns <= MOST_LEFT * sum(lengths)
    separate = sum(length * (12 * hidden + 2 * length) for length in lengths)
    return columns * (12 * hidden + 4 * columns) < separate
