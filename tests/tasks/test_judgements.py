"""Judging and answering tasks: labels are true, classes balanced, groups mean something, nobody says two things."""

from collections import Counter

import pytest

from qinglan.core.errors import InputError
from qinglan.core.rng import stream_seed
from qinglan.tasks import world
from qinglan.tasks.answering import draw_answers
from qinglan.tasks.judgements import HAS_TRAIT, TASKS, draw_cases, task_named

FACTS = {(fact.relation.name, fact.entity): fact for fact in (*world.facts(), *world.two_hop_facts())}


@pytest.mark.parametrize("name", TASKS)
def test_half_of_each_class_different_cases_and_always_the_same(name: str) -> None:
    cases = draw_cases(name, 40, seed=3)
    assert len(cases) == 40
    assert Counter(one.label for one in cases) == {0: 20, 1: 20}
    assert len({(one.case.texts, one.case.messages) for one in cases}) == 40
    assert len({one.case.id for one in cases}) == 40
    assert cases == draw_cases(name, 40, seed=3)
    assert cases != draw_cases(name, 40, seed=4)
    assert len({one.case.prompt_group_id for one in cases}) > 10


@pytest.mark.parametrize("name", ["claims", "claims_recalled", "values", "values_recalled", "two_hops"])
def test_labels_of_facts_agree_with_the_world(name: str) -> None:
    for one in draw_cases(name, 60, seed=1):
        relation, _, entity = one.case.prompt_group_id.partition(" of ")
        fact = FACTS[relation, entity]
        said = f"{one.case.texts[0]} {one.case.after_record or ''}".replace("I recall", "")
        rest = said.lower().replace(entity.lower(), " ")
        words = rest.replace(".", " ").replace("?", " ").split()
        named = [value for value in world.POOLS[fact.relation.values] if value.lower() in words]
        assert (fact.value in named) == bool(one.label) or fact.value.lower() == fact.relation.values, said
        assert (one.case.after_record is not None) == (name.endswith("_recalled") or name == "two_hops")


def test_small_puzzles_are_labelled_rightly() -> None:
    for one in draw_cases("membership", 40, 0):
        members, asked = one.case.texts[0].removeprefix("Among ").removesuffix(":").split("? ")
        assert (asked in members.split(", ")) == bool(one.label)
    for one in draw_cases("letters", 40, 0):
        letter, word = one.case.texts[0].removeprefix("With the letter ").removesuffix(":").split("? ")
        assert (letter in word) == bool(one.label)
    for one in draw_cases("grammar", 40, 0):
        assert (one.case.texts[0] == one.case.prompt_group_id) == bool(one.label)
        assert sorted(one.case.texts[0].split()) == sorted(one.case.prompt_group_id.split())
    for one in draw_cases("disputes", 40, 0):
        relation, _, entity = one.case.prompt_group_id.partition(" of ")
        assert one.case.verdicts is not None
        right = one.case.verdicts[one.label]
        said = one.case.texts[0].split(f"{right} says:")[1].split(". ")[0]
        assert FACTS[relation, entity].value.lower() in said.lower()


def test_traits_are_those_of_the_fact_that_is_asked_for() -> None:
    for one in draw_cases("traits", 60, 0):
        relation, _, entity = one.case.prompt_group_id.partition(" of ")
        fact = FACTS[relation, entity]
        assert (fact.value in HAS_TRAIT[fact.relation.values]) == bool(one.label)
        assert one.case.texts[0].endswith("? I recall") and one.case.after_record == ""
    for kind, having in HAS_TRAIT.items():
        assert having < set(world.POOLS[kind]) and len(having) >= 4


def test_a_passage_tells_what_is_asked_for_or_does_not() -> None:
    asked = {"came along": "came", "went with": "came", "day": "on", "When": "on", "Where": "to"}
    asked |= {"animal": "saw", "eat": "ate"}  # a word of the question, and one of the sentence that answers it
    for one in draw_cases("told", 80, 0):
        story = one.case.prompt_group_id
        question = one.case.texts[0].removeprefix(story)
        wanted = next(told for word, told in asked.items() if word in question)
        assert (wanted in story.split()) == bool(one.label), one.case.texts[0]


def test_pairs_have_the_better_text_where_the_label_says() -> None:
    for one in draw_cases("preferences", 20, 0):
        assert len(one.case.texts) == 2 and one.case.messages
    first = next(one for one in draw_cases("better", 20, 0) if one.label == 1)
    assert first.case.verdicts == ("second", "first")


def test_unknown_tasks_name_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'claims'"):
        task_named("claim")
    with pytest.raises(InputError, match="did you mean 'facts'"):
        draw_answers("fact", 10, 10, 0)
    with pytest.raises(InputError, match="give it as --puzzles"):
        draw_answers("lichess", 10, 10, 0)


def test_facts_as_answers() -> None:
    pools = draw_answers("facts", 60, 30, seed=0)
    assert (len(pools.train), len(pools.test)) == (60, 30)
    groups = [{one.case.prompt_group_id for one in side} for side in pools]
    assert not groups[0] & groups[1]
    for one in pools.test:
        assert one.is_right(one.answer) and one.is_right(f"{one.answer}.")
        assert not one.is_right("I do not know")
        assert one.case.texts[0].startswith("Question: ") and one.case.texts[0].endswith(" Answer:")


@pytest.mark.parametrize("name", ["mate_in_one", "chess"])
def test_chess_puzzles_as_answers(name: str) -> None:
    pytest.importorskip("chess")
    pools = draw_answers(name, 6, 4, seed=0)
    assert (len(pools.train), len(pools.test)) == (6, 4)
    for one in (*pools.train, *pools.test):
        assert one.is_right(one.answer)
        assert not one.is_right("nonsense")
    assert not {one.case.prompt_group_id for one in pools.train} & {one.case.prompt_group_id for one in pools.test}


def test_lichess_puzzles_are_split_by_a_hash(tmp_path) -> None:
    pytest.importorskip("chess")
    rows = ["PuzzleId,FEN,Moves,Rating,Themes"]
    for number in range(8):  # black moves its king, then the rook mates on the back rank; clocks differ
        rows.append(f"p{number},6k1/5ppp/8/8/8/8/5PPP/R5K1 b - - {number} 30,g8h8 a1a8,900,mateIn1 short")
    file = tmp_path / "puzzles.csv"
    file.write_text("\n".join(rows))
    pools = draw_answers("lichess", 10, 10, 0, file)
    assert {one.case.prompt_group_id for one in pools.train} & {one.case.prompt_group_id for one in pools.test} == set()
    for one in pools.test:
        assert stream_seed(0, "lichess side", one.case.prompt_group_id) % 4 == 0
    assert all(one.is_right(one.answer) for one in (*pools.train, *pools.test))
