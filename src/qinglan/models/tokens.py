"""Token sequences and the rectangular batches made from them, padded or packed.

Shapes: B rows, T columns, N targets in the whole batch. Padding stands on the right; every mask comes from lengths,
never from a comparison with the padding token, which is often the end token too. The token that fills padding is the
row's own last real token: a valid id in every vocabulary, and of no effect, since attention is causal.

Packing puts several sequences into one row and starts the positions again at 0 for each. With `attention_mask=None`,
`transformers` (5.20 and later, `masking_utils.find_packed_sequence_indices`) reads those restarts as borders and keeps
attention inside each sequence, sliding windows included.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qinglan.core.errors import InputError


class TokenSequence(NamedTuple):
    """A prompt with its completion; the targets are `token_ids[num_prompt_tokens:]`, the end token among them."""

    token_ids: list[int]
    num_prompt_tokens: int


class SequenceRow(NamedTuple):
    """Where a sequence stands: its place in the caller's list, its row, its columns from `start` to before `end`."""

    original: int
    row: int
    start: int
    end: int


class TokenBatch(NamedTuple):
    """Sequences in rows. Targets are counted row by row, that is in the order of `sequence_rows`."""

    input_ids: Tensor
    """int64 [B, T]."""
    position_ids: Tensor
    """int64 [B, T]; starts at 0 with each sequence."""
    real_mask: Tensor
    """bool [B, T]; True is a real token, False is padding."""
    target_mask: Tensor
    """bool [B, T]; True is a target. The logits one column to its left predict it."""
    segment_ids: Tensor
    """int64 [B, T]; number of the sequence inside its row, -1 for padding."""
    sequence_rows: tuple[SequenceRow, ...]
    """One entry for each sequence, ordered by row, then by start."""
    lengths: tuple[int, ...]
    """Number of targets of each sequence, in the order of `sequence_rows`; their sum is N."""

    def to(self, device: torch.device) -> "TokenBatch":
        """Return the batch with its tensors on `device`."""
        return self._replace(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            real_mask=self.real_mask.to(device),
            target_mask=self.target_mask.to(device),
            segment_ids=self.segment_ids.to(device),
        )


def collate(
    sequences: Sequence[TokenSequence], rows: Sequence[Sequence[int]] | None = None, extra_columns: int = 0
) -> TokenBatch:
    """Return one batch whose row r holds `sequences[i] for i in rows[r]`, one after the other.

    Args:
        sequences: the caller's list; `SequenceRow.original` counts in it.
        rows: indices of the sequences in each row; by default one sequence a row, in the given order.
        extra_columns: columns of padding beyond the longest row.

    Raises:
        InputError: a sequence is empty, or its number of prompt tokens is not between 1 and its length: the first token
            has nothing to its left that could predict it.
    """
    if rows is None:
        rows = [[index] for index in range(len(sequences))]
    num_columns = extra_columns + max(sum(len(sequences[i].token_ids) for i in row) for row in rows)
    shape = (len(rows), num_columns)
    input_ids = np.zeros(shape, np.int64)
    position_ids = np.zeros(shape, np.int64)
    target_mask = np.zeros(shape, np.bool_)
    segment_ids = np.full(shape, -1, np.int64)
    columns = np.arange(num_columns)
    sequence_rows: list[SequenceRow] = []
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members):
            _check(sequences[index], index)
            token_ids, num_prompt_tokens = sequences[index]
            end = start + len(token_ids)
            input_ids[row, start:end] = token_ids
            input_ids[row, end:] = token_ids[-1]
            # Padding goes on counting from the row's last sequence, so that it does not look like one more sequence.
            position_ids[row, start:] = columns[: num_columns - start]
            target_mask[row, start + num_prompt_tokens : end] = True
            segment_ids[row, start:end] = segment
            sequence_rows.append(SequenceRow(index, row, start, end))
            start = end
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        real_mask=torch.from_numpy(segment_ids >= 0),
        target_mask=torch.from_numpy(target_mask),
        segment_ids=torch.from_numpy(segment_ids),
        sequence_rows=tuple(sequence_rows),
        lengths=tuple(
            len(sequences[s.original].token_ids) - sequences[s.original].num_prompt_tokens for s in sequence_rows
        ),
    )


def _check(sequence: TokenSequence, index: int) -> None:
    length = len(sequence.token_ids)
    if not 1 <= sequence.num_prompt_tokens <= length:
        raise InputError(
            f"sequence {index}: {sequence.num_prompt_tokens} prompt tokens of {length} tokens; expected at least 1 "
            "(nothing predicts a first token) and at most all; begin the sequence with a prompt or a "
            "beginning-of-text token"
        )


def plan_rows(lengths: Sequence[int], max_tokens: int, pack: bool, multiple_of: int = 1) -> list[list[list[int]]]:
    """Plan batches within a token budget: for each batch its rows, for each row the indices of its sequences.

    Sequences are taken from the longest to the shortest (equal ones in their order), so that rows of one batch are
    alike and the batch that needs most memory comes first. A batch has as many columns as its longest sequence, and
    rows * columns <= max_tokens unless one sequence alone is longer. With `pack`, a shorter sequence goes to the row
    with the least room that still holds it (best fit, decreasing); without, each has a row of its own.

    With `multiple_of` above 1 their number is at most the next multiple of it, and they are as even as that allows: so
    many are computed at the same time, and none of who computes them should have to wait for long.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens: {max_tokens}; expected at least 1")
    if multiple_of > 1:
        return _plan_evenly(lengths, max_tokens, pack, multiple_of)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[list[int]]] = []
    rooms: list[tuple[int, int]] = []  # (columns left, row) of the rows of the last batch, ascending
    max_rows = num_columns = 0
    for index in order:
        length = lengths[index]
        fitting = bisect_left(rooms, (length, -1)) if pack else len(rooms)
        if fitting < len(rooms):
            room, row = rooms.pop(fitting)
            batches[-1][row].append(index)
            insort(rooms, (room - length, row))
            continue
        if not batches or len(batches[-1]) == max_rows:
            batches.append([])
            rooms = []
            num_columns, max_rows = length, max(1, max_tokens // max(1, length))
        insort(rooms, (num_columns - length, len(batches[-1])))
        batches[-1].append([index])
    return batches


def _plan_evenly(lengths: Sequence[int], max_tokens: int, pack: bool, multiple_of: int) -> list[list[list[int]]]:
    """Return the plan with the smallest budget that needs no more batches than the next multiple of `multiple_of`."""
    high = max_tokens
    plan = plan_rows(lengths, high, pack)
    most = -(-len(plan) // multiple_of) * multiple_of
    low = sum(lengths) // max(1, most) - 1
    while high - low > 1:
        middle = (low + high) // 2
        smaller = plan_rows(lengths, max(1, middle), pack)
        if len(smaller) <= most:
            plan, high = smaller, middle
        else:
            low = middle
    return plan


def padded_batches(sequences: Sequence[TokenSequence], max_tokens: int) -> list[TokenBatch]:
    """Return batches with one sequence a row, sorted by length, within a token budget (see `plan_rows`)."""
    plan = plan_rows([len(sequence.token_ids) for sequence in sequences], max_tokens, pack=False)
    return [collate(sequences, rows) for rows in plan]
