"""Forward passes over sampled episodes: the hidden state before every sampled token, however the rows are laid out.

The K samples of one prompt share a row where that is exact and saves work (`prompt_sharing.py`); every other episode
has a row of its own, or is packed with others. The numbers are the same.

Legend: N sampled tokens of a batch, E its episodes, D hidden units.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from qinglan.learn.batch import make_batches
from qinglan.learn.prompt_sharing import PromptTree, TreeBatch, can_share_prompt, make_tree_batch, tree_states
from qinglan.models.language_model import TokenBatch, TokenSequence, hidden_states
from qinglan.models.tokens import plan_rows


class EpisodeBatch(NamedTuple):
    """Episodes in rows."""

    rows: TokenBatch | TreeBatch
    episodes: list[int]
    """The caller's numbers of the episodes, in the order in which tokens and states are given."""

    @property
    def sampled_ids(self) -> Int[Tensor, " N"]:
        """The sampled tokens, episode by episode."""
        if isinstance(self.rows, TreeBatch):
            return self.rows.input_ids[self.rows.target_rows, self.rows.target_columns]
        return self.rows.input_ids[self.rows.target_mask]


class EpisodeStates(NamedTuple):
    """Hidden states by which episodes are judged."""

    before: Float[Tensor, "N D"]
    """Before each sampled token, episode by episode."""
    ends: Float[Tensor, "E D"]
    """After the last one."""


def make_episode_batches(
    sequences: Sequence[TokenSequence],
    chosen: Sequence[int],
    models: Sequence[PreTrainedModel],
    *,
    max_tokens: int,
    pack: bool = False,
) -> list[EpisodeBatch]:
    """Return the `chosen` sequences in batches for forward passes of all `models`, tensors on their device.

    Args:
        sequences: prompts with what was sampled.
        chosen: numbers in `sequences`.
        models: every model that will read the batches; all must be able to share prompts, or none is shared.
        max_tokens: budget of rows * columns of one batch; only a row that is longer by itself may exceed it.
        pack: put several episodes that share no prompt into a row where they fit.
    """
    device, by_prompt = models[0].device, dict[tuple[int, ...], list[int]]()
    for episode in chosen:
        ids, num_prompt = sequences[episode]
        by_prompt.setdefault(tuple(ids[:num_prompt]), []).append(episode)
    groups = list(by_prompt.values())
    if all(can_share_prompt(model) for model in models) and _sharing_pays(sequences, groups, models[0]):
        trees = [_tree_of([sequences[episode] for episode in group]) for group in groups]
        plan = plan_rows([tree.num_tokens for tree in trees], max_tokens, pack=False)
        return [
            EpisodeBatch(
                make_tree_batch([trees[i] for [i] in rows], device), [one for [i] in rows for one in groups[i]]
            )
            for rows in plan
        ]
    batches = make_batches([sequences[episode] for episode in chosen], max_tokens=max_tokens, pack=pack)
    return [
        EpisodeBatch(batch.to(device), [chosen[place.original] for place in batch.sequence_rows]) for batch in batches
    ]


def episode_states(model: PreTrainedModel, batch: EpisodeBatch) -> EpisodeStates:
    """Return the hidden states of a batch's episodes; gradients flow."""
    rows = batch.rows
    if isinstance(rows, TreeBatch):
        hidden = tree_states(model, rows)
        return EpisodeStates(hidden[rows.target_rows, rows.predicting_columns], hidden[rows.end_rows, rows.end_columns])
    hidden = hidden_states(model, rows)
    places, columns = rows.target_mask.nonzero(as_tuple=True)
    end_rows, ends = torch.tensor([(one.row, one.end - 1) for one in rows.sequence_rows]).unbind(dim=1)
    return EpisodeStates(hidden[places, columns - 1], hidden[end_rows, ends])


def _tree_of(sequences: Sequence[TokenSequence]) -> PromptTree:
    num_prompt = sequences[0].num_prompt_tokens
    return PromptTree(sequences[0].token_ids[:num_prompt], [one.token_ids[num_prompt:] for one in sequences])


def _sharing_pays(sequences: Sequence[TokenSequence], groups: Sequence[Sequence[int]], model: PreTrainedModel) -> bool:
    """Return True if rows of a shared prompt take fewer products than separate ones.

    A token of a row with T columns costs about 12 D products a layer, and 2 T for attention; a causal kernel skips
    half of these, the mask of a tree does not.
    """
    width = 12 * model.config.get_text_config().hidden_size
    shared = separate = 0
    for group in groups:
        lengths = [len(sequences[episode].token_ids) for episode in group]
        columns = sum(lengths) - (len(group) - 1) * sequences[group[0]].num_prompt_tokens
        shared += columns * (width + 2 * columns)
        separate += sum(length * (width + length) for length in lengths)
    return shared < separate
