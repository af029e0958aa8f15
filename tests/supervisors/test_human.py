"""What people do on the screen becomes the records of every supervisor."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qinglan.core.errors import InputError
from qinglan.core.records import Completion, Message, Prompt, Ranking, pairs_of
from qinglan.data.load import load_ratings
from qinglan.data.write import write_comparisons, write_records
from qinglan.supervisors.human import (
    comparison_from_ranks,
    demonstration_from_text,
    load_human_comparisons,
    ratings_from_form,
)

PROMPT = Prompt(
    id="p", source="human", producer_id="u", prompt_group_id="g", messages=(Message(role="user", content="Hi"),)
)


def completions(count):
    return [
        Completion(id=f"c{k}", source="policy", producer_id="m", prompt_group_id="g", prompt_id="p", text=f"text {k}")
        for k in range(count)
    ]


def test_ranks_of_places_become_a_ranking_of_items():
    group = comparison_from_ranks(
        PROMPT, completions(4), [2, 0, 3, 1], [1, 2, 2, None], labeler="ann", seconds_spent=12.5
    )
    assert group.comparison.label == Ranking(groups=((2,), (0, 3)))
    assert group.comparison.order_shown == (2, 0, 3, 1)
    assert (group.comparison.producer_id, group.comparison.source, group.comparison.seconds_spent) == (
        "ann",
        "human",
        12.5,
    )


@given(data=st.data(), count=st.integers(2, 6))
@settings(max_examples=50, deadline=None)
def test_the_order_on_the_screen_does_not_change_the_pairs(data, count):
    ranks = data.draw(st.lists(st.none() | st.integers(1, 4), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    if sum(rank is not None for rank in ranks) < 2:
        with pytest.raises(InputError, match="fewer than two"):
            comparison_from_ranks(PROMPT, completions(count), order, [ranks[item] for item in order], labeler="ann")
        return
    straight = comparison_from_ranks(PROMPT, completions(count), range(count), ranks, labeler="ann")
    shuffled = comparison_from_ranks(PROMPT, completions(count), order, [ranks[item] for item in order], labeler="ann")
    assert pairs_of(shuffled.comparison.label) == pairs_of(straight.comparison.label)
    for first, second, _ in pairs_of(straight.comparison.label):
        assert ranks[first] < ranks[second]


def test_screens_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="each item once"):
        comparison_from_ranks(PROMPT, completions(2), [0, 0], [1, 2], labeler="ann")
    with pytest.raises(InputError, match="each item once"):
        comparison_from_ranks(PROMPT, completions(2), [0, 1], [1], labeler="ann")
    with pytest.raises(InputError, match="empty demonstration"):
        demonstration_from_text(PROMPT, " \n", labeler="ann")


def test_demonstrations_and_ratings(tmp_path):
    shown = demonstration_from_text(PROMPT, " Hello ", labeler="ann", with_model_suggestions=True)
    assert (shown.demonstration.text, shown.demonstration.with_model_suggestions) == ("Hello", True)
    scales = {"quality": (1, 7), "harmful": (0, 1)}
    ratings = ratings_from_form(completions(1)[0], {"quality": 6, "harmful": None}, scales, labeler="ann")
    assert [(one.attribute, one.value) for one in ratings] == [("quality", 6), ("harmful", None)]
    write_records(tmp_path / "ratings.jsonl", ratings)
    assert load_ratings(tmp_path / "ratings.jsonl").records == ratings
    with pytest.raises(InputError, match="quality: got 9; expected 1 to 7"):
        ratings_from_form(completions(1)[0], {"quality": 9}, scales, labeler="ann")
    with pytest.raises(InputError, match="no such attribute"):
        ratings_from_form(completions(1)[0], {"tone": 1}, scales, labeler="ann")


def test_only_people_and_only_those_asked_for(tmp_path):
    groups = [
        comparison_from_ranks(PROMPT, completions(3), [0, 1, 2], [1, 2, 3], labeler=name) for name in ("ann", "bob")
    ]
    model = groups[0].comparison.model_copy(update={"id": "by a model", "source": "principle_model"})
    groups.append(groups[0]._replace(comparison=model))
    path = tmp_path / "judged.jsonl"
    write_comparisons(path, groups)
    assert len(load_human_comparisons(path).records) == 2
    loaded = load_human_comparisons(path, without=["bob"])
    assert [group.comparison.producer_id for group in loaded.records] == ["ann"]
    assert loaded.notes["comparisons by models, left out"] == 1
    assert loaded.notes["comparisons by other labelers, left out"] == 1
    with pytest.raises(InputError, match="no comparison by the people asked for"):
        load_human_comparisons(path, labelers=["eve"])
