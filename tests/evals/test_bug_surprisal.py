"""Surprisal of planted bugs, worked by hand with a scorer that knows where they are."""

import pytest
import torch
from conftest import make_tokenizer

from qinglan.evals.bug_surprisal import Reviewed, bug_surprisal, line_surprisals
from qinglan.models.language_model import TokenSequence

TOKENIZER = make_tokenizer(bos=True)
RIGHT = "a\nb\nc\n"


def scorer(surprising: dict[str, float]):
    """Give every token -0.1, and each character in `surprising` minus its value."""

    def score(sequences: list[TokenSequence]) -> list[torch.Tensor]:
        found = []
        for ids, num_prompt in sequences:
            texts = [TOKENIZER.decode([one]) for one in ids[num_prompt:]]
            found.append(torch.tensor([-surprising.get(text, 0.1) for text in texts]))
        return found

    return score


def test_a_line_feed_belongs_to_the_line_that_it_opens() -> None:
    ids = TOKENIZER("a\nb", add_special_tokens=False).input_ids
    assert len(ids) == 3
    assert line_surprisals(TOKENIZER, ids, [-1.0, -3.0, -2.0]) == [1.0, 3.0]


def test_hits_and_auc_by_hand() -> None:
    programs = [
        Reviewed("t", RIGHT, 0),
        Reviewed("t", RIGHT, 0),
        Reviewed("t", "a\nX\nc", 2),  # X surprises most, and line 2 is the faulty one: a hit
        Reviewed("t", "a\nb\nY", 1),  # Y surprises most, but line 1 is faulty: a miss
    ]
    found = bug_surprisal(TOKENIZER, scorer({"X": 5.0, "Y": 4.0}), programs, seed=0)
    # The most surprising lines: 0.1, 0.1 of the right ones, 5 and 4 of the tampered ones: all pairs are in order.
    assert found.auc.value == 1.0 and found.hit_rate.value == 0.5 and found.hit_rate.n == 2
    assert found.chance.value == pytest.approx(1 / 3)  # three lines each


def test_equal_surprisal_is_no_sign() -> None:
    programs = [Reviewed("t", RIGHT, line) for line in (0, 0, 1, 2)]
    assert bug_surprisal(TOKENIZER, scorer({}), programs, seed=0).auc.value == pytest.approx(0.5)
