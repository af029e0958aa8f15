"""Forward passes over prompts with completions: the hidden states by which completions are judged, however rows look.

The completions of one prompt share a row where that is exact and saves work (`prompt_sharing.py`); every other sequence
has a row of its own, or is packed with others. The numbers are the same.

Legend: N completion tokens of a batch, S its completions, D hidden units.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from qinglan.models.language_model import TokenBatch, TokenSequence, hidden_states
from qinglan.models.prompt_sharing import PromptTree, TreeBatch, can_share_prompt, make_tree_batch, tree_states
from qinglan.models.tokens import collate, plan_rows


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
) -> list[CompletionBatch]:
    """Return the `chosen` sequences in batches for forward passes of all `models`, tensors on their device.

    Args:
        sequences: prompts with completions.
        chosen: numbers in `sequences`.
        models: every model that will read the batches; all must be able to share prompts, or none is shared.
        max_tokens: budget of rows * columns of one batch; only a row that is longer by itself may exceed it.
        pack: where no prompt is shared, put several sequences into a row where they fit.
    """
    device, by_prompt = models[0].device, dict[tuple[int, ...], list[int]]()
    for number in chosen:
        ids, num_prompt = sequences[number]
        by_prompt.setdefault(tuple(ids[:num_prompt]), []).append(number)
    groups = list(by_prompt.values())
    if all(can_share_prompt(model) for model in models) and _sharing_pays(sequences, groups, models[0]):
        trees = [_tree_of([sequences[number] for number in group]) for group in groups]
        plan = plan_rows([tree.num_tokens for tree in trees], max_tokens, pack=False)
        return [
            CompletionBatch(
                make_tree_batch([trees[i] for [i] in rows], device), [number for [i] in rows for number in groups[i]]
            )
            for rows in plan
        ]
    candidates = [sequences[number] for number in chosen]
    plan = plan_rows([len(one.token_ids) for one in candidates], max_tokens, pack)
    batches = [collate(candidates, rows).to(device) for rows in plan]
    return [CompletionBatch(batch, [chosen[place.original] for place in batch.sequence_rows]) for batch in batches]


def completion_states(model: PreTrainedModel, batch: CompletionBatch) -> CompletionStates:
    """Return the hidden states of a batch's completions; gradients flow."""
    rows = batch.rows
    if isinstance(rows, TreeBatch):
        hidden = tree_states(model, rows)
        before, ends = (rows.target_rows, rows.predicting_columns), (rows.end_rows, rows.end_columns)
        return CompletionStates(hidden[before], hidden[ends])
    hidden = hidden_states(model, rows)
    places, columns = rows.target_mask.nonzero(as_tuple=True)
    end_rows, end_columns = torch.tensor([(one.row, one.end - 1) for one in rows.sequence_rows]).unbind(dim=1)
    return CompletionStates(hidden[places, columns - 1], hidden[end_rows, end_columns])


def _tree_of(sequences: Sequence[TokenSequence]) -> PromptTree:
    num_prompt = sequences[0].num_prompt_tokens
    return PromptTree(sequences[0].token_ids[:num_prompt], [one.token_ids[num_prompt:] for one in sequences])


def _sharing_pays(sequences: Sequence[TokenSequence], groups: Sequence[Sequence[int]], model: PreTrainedModel) -> bool:
    """Return True if rows of a shared prompt are possible and take fewer products than separate ones.

    A token of a row with T columns costs about 12 D products a layer, and 2 T for attention, at half the speed of the
    others (measured on a CPU); a causal kernel skips half of these, the mask of a tree does not.
    """
    width = 12 * model.config.get_text_config().hidden_size
    shared = separate = 0
    for group in groups:
        lengths, num_prompt = (
            [len(sequences[number].token_ids) for number in group],
            sequences[group[0]].num_prompt_tokens,
        )
        if min(lengths) == num_prompt:
            return False  # nothing was completed, so the state at the end is the prompt's
        columns = sum(lengths) - (len(group) - 1) * num_prompt
        shared += columns * (width + 4 * columns)
        separate += sum(length * (width + 2 * length) for length in lengths)
    return shared < separate
