"""Batches by token budget, padded or packed, for training.

Packing fills the columns that padding would waste and changes no number: log-probabilities, scores and gradients equal
those of the sequences one by one (tests compare them on every supported architecture). Without packing, attention takes
the faster path of a plain causal mask; it pays where lengths are alike, packing where they differ.
"""

from collections.abc import Sequence

from qinglan.models.tokens import TokenBatch, TokenSequence, collate, plan_rows


def make_batches(
    sequences: Sequence[TokenSequence], *, max_tokens: int, pack: bool, multiple_of: int = 1
) -> list[TokenBatch]:
    """Return batches that hold every sequence once, from the longest to the shortest.

    Args:
        sequences: token ids with their number of prompt tokens; `sequence_rows` counts in this list.
        max_tokens: budget of rows * columns of one batch; only a single sequence that is longer may exceed it.
        pack: put several sequences into a row where they fit; attention stays inside each.
        multiple_of: see `plan_rows`.
    """
    plan = plan_rows([len(sequence.token_ids) for sequence in sequences], max_tokens, pack, multiple_of)
    return [collate(sequences, rows) for rows in plan]
