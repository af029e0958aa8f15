"""Score the K completions of one prompt in one row: the prompt is read once, each completion sees it and itself only.

    columns     p p p p | a a a | b b | c c c c        prompt, then completions a, b, c
    positions   0 1 2 3 | 4 5 6 | 4 5 | 4 5 6 7        they restart after the prompt
    attention   causal, and only to the prompt or to the token's own completion (a tree)

Every completion gets the hidden states that a row of its own would give it, for a fraction of the work: at K = 9, with
64 prompt tokens and 25 a completion, 289 tokens stand for 801. It needs a decoder that takes a four-dimensional mask
and has no sliding window, since a window counts columns and here columns are not positions; elsewhere the callers use
separate rows.

Letters: G prompts (rows), T columns, S completions in all, N tokens of completions in all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from qinglan.models import attention
from qinglan.models.kernels import Runs
from qinglan.models.language_model import token_logprobs
from qinglan.models.trunk import has_runs, is_written_out, states_of_batch, states_of_runs

ARCHITECTURES = frozenset({"gemma", "gpt2", "llama", "mistral", "qwen2", "qwen3"})
"""Values of `config.model_type` for which the tests show that a tree row equals separate rows."""


class PromptTree(NamedTuple):
    """A prompt and its completions, as tokens."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Columns of the row that holds the tree."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.completion_ids)


class TreeBatch(NamedTuple):
    """Trees as padded rows."""

    input_ids: Int[Tensor, "G T"]
    position_ids: Int[Tensor, "G T"]
    branches: Int[Tensor, "G T"]
    """0 the prompt, k >= 1 a completion, -1 padding."""
    end_rows: Int[Tensor, " S"]
    end_columns: Int[Tensor, " S"]
    """Place of each completion's last token, tree by tree in order."""
    target_rows: Int[Tensor, " N"]
    target_columns: Int[Tensor, " N"]
    """Place of every token of the completions, completion by completion."""
    predicting_columns: Int[Tensor, " N"]
    """Column of the token before it: for a completion's first token that is the prompt's last."""
    owners: Int[Tensor, " N"]
    """Number of the completion that the token belongs to."""
    tokens: Int[Tensor, " R"]
    """Places, row * T + column, of all tokens, without padding."""
    runs: Runs
    """The trees in that list."""

    @property
    def may_attend(self) -> Bool[Tensor, "G 1 T T"]:
        """True where the token of the row (third dimension) sees the token of the column (fourth)."""
        width, branches = self.branches.shape[1], self.branches
        is_causal = torch.ones(width, width, dtype=torch.bool, device=branches.device).tril()
        same_branch = branches[:, :, None] == branches[:, None, :]
        # Padding is a branch of its own, so that no softmax is over nothing; no real token sees it.
        return (is_causal & (same_branch | (branches == 0)[:, None, :]))[:, None]


def can_share_prompt(model: PreTrainedModel) -> bool:
    """Return True if this model gives a tree row the hidden states of separate rows."""
    config = model.config
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    has_window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return (
        config.model_type in ARCHITECTURES
        and config._attn_implementation in ("sdpa", attention.NAME)
        and set(layer_types) == {"full_attention"}
        and not has_window
    )


def make_tree_batch(trees: Sequence[PromptTree], device: torch.device) -> TreeBatch:
    """Return one row for each tree, padded on the right to the longest."""
    width = max(tree.num_tokens for tree in trees)
    input_ids = torch.zeros(len(trees), width, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    branches = torch.full_like(input_ids, -1)
    own = torch.zeros_like(input_ids, dtype=torch.int32)
    ends: list[tuple[int, int]] = []
    targets: list[tuple[int, int, int, int]] = []
    for row, tree in enumerate(trees):
        column = 0
        for branch, ids in enumerate([tree.prompt_ids, *tree.completion_ids]):
            here = slice(column, column + len(ids))
            start = 0 if branch == 0 else len(tree.prompt_ids)
            input_ids[row, here] = torch.tensor(ids)
            position_ids[row, here] = torch.arange(start, start + len(ids))
            branches[row, here] = branch
            own[row, here] = column if branch > 0 else 0
            if branch > 0:
                before = [len(tree.prompt_ids) - 1, *range(column, column + len(ids) - 1)]
                targets += [(row, column + k, before[k], len(ends)) for k in range(len(ids))]
                ends.append((row, column + len(ids) - 1))
            column += len(ids)
    is_real = (branches >= 0).flatten()
    prompt_lengths = torch.tensor([len(tree.prompt_ids) for tree in trees], dtype=torch.int32)
    shared = torch.where(branches > 0, prompt_lengths[:, None], 0)
    runs = Runs.of([tree.num_tokens for tree in trees])
    rows, columns = torch.tensor(ends).unbind(dim=1)
    target_rows, target_columns, predicting_columns, owners = torch.tensor(targets, device=device).unbind(dim=1)
    return TreeBatch(
        input_ids.to(device),
        position_ids.to(device),
        branches.to(device),
        end_rows=rows.to(device),
        end_columns=columns.to(device),
        target_rows=target_rows,
        target_columns=target_columns,
        predicting_columns=predicting_columns,
        owners=owners,
        tokens=is_real.nonzero()[:, 0],
        runs=runs._replace(own=own.flatten()[is_real], shared=shared.flatten()[is_real]),
    )


def tree_states(
    model: PreTrainedModel, batch: TreeBatch, rows: Int[Tensor, " M"], columns: Int[Tensor, " M"]
) -> Float[Tensor, "M D"]:
    """Return the trunk's last hidden states at some places; gradients flow."""
    places = rows * batch.input_ids.shape[1] + columns
    if is_written_out(model):
        if has_runs(model):
            return states_of_runs(model, batch.input_ids, batch.position_ids, batch.tokens, batch.runs, places)
        return states_of_batch(model, batch.input_ids, batch.position_ids, batch.may_attend, places)
    output = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.may_attend,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1).index_select(0, places)


def tree_end_states(model: PreTrainedModel, batch: TreeBatch) -> Float[Tensor, "S D"]:
    """Return the hidden state at the last token of each completion, tree by tree; gradients flow."""
    return tree_states(model, batch, batch.end_rows, batch.end_columns)


def tree_logprobs(model: PreTrainedModel, batch: TreeBatch) -> Float[Tensor, " S"]:
    """Return the log-probability of each whole completion given its prompt, in nats; gradients flow."""
    states = tree_states(model, batch, batch.target_rows, batch.predicting_columns)
    targets = batch.input_ids[batch.target_rows, batch.target_columns]
    logprobs = token_logprobs(model, states, targets, with_entropy=False).logprobs
    return logprobs.new_zeros(len(batch.end_rows)).index_add(0, batch.owners, logprobs)
