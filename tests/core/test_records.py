"""Records refuse what cannot be, and pairs come from labels as they were given."""

import pytest
from pydantic import ValidationError

from qinglan.core.records import Comparison, Pair, PreferenceProbability, Ranking, pairs_of
from qinglan.core.rng import numpy_stream, permutation, stream, stream_seed


def comparison(label, items=("a", "b", "c"), order=None) -> Comparison:
    return Comparison(
        id="c1", source="human", producer_id="ann", prompt_group_id="g", prompt_id="p", items=items,
        order_shown=tuple(range(len(items))) if order is None else order, label=label,
    )  # fmt: skip


def test_a_ranking_with_a_tie_gives_its_decided_pairs():
    # Best item 2, then 0 and 1 tied: C(3, 2) = 3 pairs, one of them tied.
    label = Ranking(groups=((2,), (0, 1)))
    assert pairs_of(label) == [Pair(2, 0, 1.0), Pair(2, 1, 1.0)]
    assert pairs_of(label, "half") == [Pair(0, 1, 0.5), Pair(2, 0, 1.0), Pair(2, 1, 1.0)]


def test_items_that_were_not_ranked_are_in_no_pair():
    assert pairs_of(Ranking(groups=((3,), (1,)))) == [Pair(3, 1, 1.0)]


def test_a_probability_is_kept_as_it_is():
    assert pairs_of(PreferenceProbability(p_first_better=0.8)) == [Pair(0, 1, 0.8)]


@pytest.mark.parametrize("k", [4, 9])
def test_k_strictly_ranked_items_give_all_pairs(k):
    pairs = pairs_of(Ranking(groups=tuple((i,) for i in range(k))))
    assert len(pairs) == k * (k - 1) // 2 and all(pair.first < pair.second for pair in pairs)


@pytest.mark.parametrize(
    ("label", "items", "order", "message"),
    [
        (Ranking(groups=((0,), (3,))), ("a", "b", "c"), None, "absent"),
        (Ranking(groups=((0,), (0, 1))), ("a", "b", "c"), None, "twice"),
        (Ranking(groups=((0,), (1,))), ("a", "a"), None, "twice"),
        (Ranking(groups=((0,), (1,))), ("a", "b"), (0, 0), "order_shown"),
        (PreferenceProbability(p_first_better=0.5), ("a", "b", "c"), None, "wants 2 items"),
    ],
)
def test_impossible_comparisons_are_refused(label, items, order, message):
    with pytest.raises(ValidationError, match=message):
        comparison(label, items, order)


def test_unknown_fields_and_changes_are_refused():
    record = comparison(Ranking(groups=((0,), (1,))))
    with pytest.raises(ValidationError):
        Comparison(**record.model_dump(), mood="good")
    with pytest.raises(ValidationError):
        record.prompt_id = "q"
    assert Comparison.model_validate_json(record.model_dump_json()) == record


def test_streams_are_named_by_seed_and_place():
    assert stream_seed(0, "rollout", 3) == stream_seed(0, "rollout", 3) != stream_seed(0, "rollout", 4)
    assert stream_seed(1, "rollout", 3) != stream_seed(0, "rollout", 3)
    assert 0 <= stream_seed(0, "x") < 2**63
    assert stream(0, "a").initial_seed() == stream_seed(0, "a")
    assert numpy_stream(0, "a").random() == numpy_stream(0, "a").random()
    assert sorted(permutation(7, 0, "a")) == list(range(7)) and permutation(7, 0, "a") == permutation(7, 0, "a")
