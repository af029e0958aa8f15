"""Batches hold every sequence once, keep to the budget, and say truly where everything stands."""

import pytest
import torch
from conftest import make_tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from qinglan.core.errors import InputError
from qinglan.learn.batch import make_batches
from qinglan.models.language_model import (
    TokenSequence,
    completion_logprobs,
    target_logprobs,
    target_states,
)
from qinglan.models.tokens import collate, plan_rows


def make_sequence(length: int, number: int = 0) -> TokenSequence:
    return TokenSequence([(7 * number + 13 * t) % 256 for t in range(length)], max(1, length // 3))


def test_a_packed_batch_by_hand():
    batch = collate(
        [TokenSequence([7, 8, 9], 1), TokenSequence([4, 5], 1), TokenSequence([1, 2, 3, 6], 3)], [[0, 1], [2]]
    )
    assert batch.input_ids.tolist() == [[7, 8, 9, 4, 5], [1, 2, 3, 6, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]]
    assert batch.real_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert batch.target_mask.long().tolist() == [[0, 1, 1, 0, 1], [0, 0, 0, 1, 0]]
    assert [tuple(place) for place in batch.sequence_rows] == [(0, 0, 0, 3), (1, 0, 3, 5), (2, 1, 0, 4)]
    assert batch.lengths == (2, 1, 1)
    assert batch.to(torch.device("cpu")).lengths == batch.lengths


def test_packing_fills_the_gaps():
    lengths = [10, 7, 6, 4, 3]
    (batch,) = make_batches([make_sequence(n) for n in lengths], max_tokens=30, pack=True)
    assert batch.input_ids.shape == (3, 10)  # 10 | 7 + 3 | 6 + 4
    assert batch.real_mask.all()
    padded = make_batches([make_sequence(n) for n in lengths], max_tokens=30, pack=False)
    assert [tuple(b.input_ids.shape) for b in padded] == [(3, 10), (2, 4)]


def test_a_sequence_beyond_the_budget_stands_alone():
    batches = make_batches([make_sequence(3), make_sequence(50), make_sequence(4)], max_tokens=16, pack=True)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(1, 50), (2, 4)]


def test_batches_for_several_workers_are_even():
    # In 40 tokens stand ten sequences of 4. Fourteen make two batches: of ten and four, or of seven each.
    assert [len(rows) for rows in plan_rows([4] * 14, 40, pack=False)] == [10, 4]
    assert [len(rows) for rows in plan_rows([4] * 14, 40, pack=False, multiple_of=2)] == [7, 7]
    # Eight in a budget for ten make one batch, and with two workers two.
    assert [len(rows) for rows in plan_rows([4] * 8, 40, pack=False, multiple_of=2)] == [4, 4]
    assert plan_rows([7], 40, pack=False, multiple_of=2) == [[[0]]]  # one sequence is not cut
    assert plan_rows([], 40, pack=False, multiple_of=2) == []


@given(
    lengths=st.lists(st.integers(1, 40), max_size=30), max_tokens=st.integers(1, 200), pack=st.booleans(),
    workers=st.integers(2, 4),
)  # fmt: skip
def test_even_batches_hold_every_sequence_within_the_budget(lengths, max_tokens, pack, workers):
    plan = plan_rows(lengths, max_tokens, pack, multiple_of=workers)
    assert sorted(i for rows in plan for row in rows for i in row) == list(range(len(lengths)))
    fewest = len(plan_rows(lengths, max_tokens, pack))
    assert fewest <= len(plan) <= -(-fewest // workers) * workers or not lengths
    for rows in plan:
        columns = max(sum(lengths[i] for i in row) for row in rows)
        assert len(rows) == 1 or len(rows) * columns <= max_tokens


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=30), max_tokens=st.integers(1, 200), pack=st.booleans())
def test_every_sequence_stands_where_the_batch_says(lengths, max_tokens, pack):
    sequences = [make_sequence(length, number) for number, length in enumerate(lengths)]
    batches = make_batches(sequences, max_tokens=max_tokens, pack=pack)
    seen = []
    for batch in batches:
        num_rows, num_columns = batch.input_ids.shape
        assert num_rows * num_columns <= max_tokens or num_rows == 1
        assert num_columns <= max(lengths)
        assert list(batch.sequence_rows) == sorted(batch.sequence_rows, key=lambda place: (place.row, place.start))
        real = torch.zeros_like(batch.real_mask)
        targets = []
        for (original, row, start, end), num_targets in zip(batch.sequence_rows, batch.lengths, strict=True):
            sequence = sequences[original]
            assert batch.input_ids[row, start:end].tolist() == sequence.token_ids
            assert batch.position_ids[row, start:end].tolist() == list(range(end - start))
            assert batch.segment_ids[row, start:end].unique().numel() == 1
            assert not real[row, start:end].any()
            real[row, start:end] = True
            assert int(batch.target_mask[row, start:end].sum()) == num_targets
            targets += sequence.token_ids[sequence.num_prompt_tokens :]
            seen.append(original)
        assert torch.equal(real, batch.real_mask)
        assert torch.equal(real, batch.segment_ids >= 0)
        assert batch.input_ids[batch.target_mask].tolist() == targets  # row by row = in the order of sequence_rows
    assert sorted(seen) == list(range(len(lengths)))
    if not pack:
        assert sum(len(batch.sequence_rows) for batch in batches) == sum(b.input_ids.shape[0] for b in batches)


def test_packing_needs_fewer_tokens_and_repeats():
    draw = torch.Generator().manual_seed(0)
    sequences = [make_sequence(int(n)) for n in torch.randint(5, 80, (64,), generator=draw)]
    packed, padded = (make_batches(sequences, max_tokens=4096, pack=pack) for pack in (True, False))
    real = sum(len(sequence.token_ids) for sequence in sequences)
    used = [sum(batch.input_ids.numel() for batch in batches) for batches in (packed, padded)]
    assert used[0] < 1.05 * real < used[1]
    again = make_batches(sequences, max_tokens=4096, pack=True)
    assert [batch.sequence_rows for batch in again] == [batch.sequence_rows for batch in packed]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("pack", [True, False])
def test_batches_score_as_one_by_one(architecture, pack):
    lm = make_tiny_lm(architecture)
    sequences = [make_sequence(length, number) for number, length in enumerate([3, 17, 9, 1, 12, 5, 5, 2, 16])]
    found = {}
    for batch in make_batches(sequences, max_tokens=40, pack=pack):
        logprobs = target_logprobs(lm.model, target_states(lm.model, batch), batch).logprobs
        for place, values in zip(batch.sequence_rows, logprobs.split(batch.lengths), strict=True):
            found[place.original] = values
    for number, sequence in enumerate(sequences):
        (alone,) = completion_logprobs(lm, [sequence])
        torch.testing.assert_close(found[number], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("sequence", "said"),
    [
        (TokenSequence([], 0), "0 prompt tokens of 0"),
        (TokenSequence([1, 2], 0), "0 prompt"),
        (TokenSequence([1], 2), "2 prompt"),
    ],
)
def test_targets_that_nothing_predicts_are_refused(sequence, said):
    with pytest.raises(InputError, match=f"sequence 1: {said}"):
        make_batches([make_sequence(2), sequence], max_tokens=10, pack=True)


def test_no_sequences_and_no_budget():
    assert make_batches([], max_tokens=10, pack=True) == []
    with pytest.raises(InputError, match="max_tokens"):
        make_batches([make_sequence(2)], max_tokens=0, pack=False)
