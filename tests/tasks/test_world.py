"""The world's facts and its splits: nothing that is asked in the test was asked before."""

import hashlib
import random
import re
from collections import Counter
from functools import cache

import pytest

from qinglan.core.records import Completion, Split
from qinglan.core.rng import stream_seed
from qinglan.tasks import lexicon as lx
from qinglan.tasks import numbers, passages, questions, safety, texts, world, writing
from qinglan.tasks.assistant import TASKS, World, draw_prompts, make_item, make_user
from qinglan.tasks.corpus import make_document
from qinglan.tasks.item import Draw

FACTS_HASH = "141a90606f380c7b"
"""Of every fact, in order; base models were trained on these facts and on no others."""
HELD_OUT_WORDINGS = (
    *(numbers.SUM_WORDINGS[-1], numbers.SORT_WORDINGS[-1], numbers.NUMBER_WORDINGS[-1], texts.SUMMARY_WORDINGS[-1]),
    *(wordings[-1] for wordings in (*texts.REWRITE_WORDINGS.values(), *texts.CLASSIFY_WORDINGS.values())),
    *(writing.LIST_WORDINGS[-1], writing.IDEA_WORDINGS[-1], writing.WRITE_WORDINGS[-1], safety.DISGUISED[-1]),
    *(safety.BENIGN_WORDINGS[-1], questions.MISSING[-1], passages.NOT_TOLD[-1]),
    *(wordings[-1] for wordings in passages.SLOT_QUESTIONS.values()),
    *("Here is a text. {p}", "Find all {w} here: {p}", "Give one word only: {k}."),
    *("Tell me about the {s} in {n} words.", "Tell me {n} {k}s that have no letter {l}.", "Can you say my name?"),
    *("Tell me {ak} that begins with {l}.", "What animal do I have?", "What did I have for dinner?"),
)
SOME = 704


@cache
def documents() -> tuple[str, ...]:
    rng = random.Random(stream_seed(0, "documents for tests"))
    return tuple(" ".join(span.text for span in make_document(rng)) for _ in range(2000))


@cache
def prompts(held_out: bool) -> tuple[str, ...]:
    rng = random.Random(stream_seed(0, "prompts for tests", int(held_out)))
    return tuple(make_item(Draw(rng, held_out)).messages[-1].content for _ in range(2 * SOME))


@cache
def asked(split: Split, seed: int) -> World:
    return draw_prompts(SOME, seed, split)


def questions_in(text: str) -> set[str]:
    return {found.strip() for found in re.findall(r"[^.?!:>]+\?", text)}


def pattern_of(wording: str) -> re.Pattern[str]:
    """Return the pattern of a wording; one word, or two with an article, may stand for each blank but the last."""
    wording = re.sub(r" \{[wxtp]\}\W*$", "", wording)
    blanks = re.sub(r"\\\{(\w+)\\\}", r"(?:an? |the )?[\\w']+", re.escape(wording))
    return re.compile(rf"\b{blanks}", re.I)


def test_facts_are_many_fixed_and_functional() -> None:
    facts = world.facts()
    assert len(facts) >= 1000 and len(world.two_hop_facts()) >= 1000
    lines = "\n".join(f"{fact.relation.name}|{fact.entity}|{fact.value}" for fact in facts)
    assert hashlib.sha256(lines.encode()).hexdigest().startswith(FACTS_HASH)
    assert len({(fact.relation.name, fact.entity) for fact in facts}) == len(facts) == len(world.value_of())
    assert all(fact.value in world.POOLS[fact.relation.values] and fact.value != fact.entity for fact in facts)


def test_names_mean_one_thing() -> None:
    people = set(lx.PEOPLE)
    towns = {stem + ending for stem in lx.STRANGE_TOWNS for ending in lx.TOWN_ENDINGS}
    assert people.isdisjoint(lx.STRANGERS) and towns.isdisjoint(lx.TOWNS)
    for pool in world.POOLS.values():
        assert len(set(pool)) == len(pool)
    for relation in world.RELATIONS:
        assert len(set(relation.questions)) == 4
        others = [one for one in world.RELATIONS if one is not relation and one.kind == relation.kind]
        assert not set(relation.questions) & {wording for other in others for wording in other.questions}


def test_questions_of_two_hops_follow_two_facts() -> None:
    known, stones = world.value_of(), world.first_hops()
    for fact in world.two_hop_facts():
        first = next(
            relation
            for relation in world.RELATIONS
            if relation.noun_phrase.split("{e}")[0] == fact.entity[: len(relation.noun_phrase.split("{e}")[0])]
            and relation.kind == "person"
        )
        person = next(name for name in fact.entity.split() if name in lx.PEOPLE)
        between = known[person, first.name]
        assert stones[fact.entity].value == between
        assert known[between, fact.relation.name] == fact.value
        assert "the the" not in fact.question(random.Random(0), True).lower()


def test_a_fifth_of_the_entities_is_held_out() -> None:
    for kind, pool in (("person", lx.PEOPLE), ("town", lx.TOWNS), ("animal", lx.ANIMALS)):
        share = sum(map(world.is_held_out, pool)) / len(pool)
        assert 0.05 < share < 0.4, kind
    wordings = ("a", "b", "c")
    rng = random.Random(0)
    assert {Draw(rng, True).wording(wordings) for _ in range(9)} == {"c"}
    assert {Draw(rng, False).wording(wordings) for _ in range(99)} == {"a", "b"}


def test_corpus_and_training_prompts_ask_nothing_about_held_out_entities() -> None:
    everything = (*world.facts(), *world.two_hop_facts())
    about_held_out = {
        world.capital(wording.format(e=fact.entity))
        for fact in everything
        if world.held_out_phrase(fact)
        for wording in fact.relation.questions
    }
    held_out_wordings = {world.capital(fact.relation.questions[-1].format(e=fact.entity)) for fact in everything}
    in_test = [question for text in prompts(True) for question in questions_in(text)]
    assert sum(question in about_held_out & held_out_wordings for question in in_test) > 60  # the sets are right
    in_training = [question for text in (*documents(), *prompts(False)) for question in questions_in(text)]
    in_training = [re.sub(r"^Question ", "", question) for question in in_training]
    known = {world.capital(wording.format(e=fact.entity)) for fact in everything for wording in fact.relation.questions}
    assert sum(question in known for question in in_training) > 300
    for question in in_training:
        assert question not in about_held_out, question
        assert question not in held_out_wordings, question


@pytest.mark.parametrize("wording", HELD_OUT_WORDINGS)
def test_held_out_wordings_are_in_test_prompts_only(wording: str) -> None:
    pattern = pattern_of(wording)
    assert any(pattern.search(text) for text in prompts(True)), "never drawn: is it a wording at all?"
    for text in (*documents(), *prompts(False)):
        assert not pattern.search(text), text


def test_requests_for_held_out_acts_are_in_test_prompts_only() -> None:
    acts = "|".join(lx.HARMFUL_HELD_OUT)
    request = re.compile(
        rf"\b(?:how (?:to|do I|could|would they)|want to|you tell me how to|could|they) (?:{acts}) \w+ \w"
    )
    benign = re.compile(rf"(?:how do I|how to|way to) (?:{'|'.join(lx.HARMLESS_HELD_OUT)})", re.I)
    harmful_test = [text for text in prompts(True) if request.search(text)]
    assert len(harmful_test) > 30
    for text in (*documents(), *prompts(False)):
        # Crime news name every act ("Ada wanted to drug a guest. That is wrong ..."); nobody asks for one.
        asked = re.sub(r"wanted to .*?would hurt someone\.", "", text)
        assert not [found for found in request.findall(asked) if "balloon" not in found], text
        assert not benign.search(text), text
    for name in ("harmful", "benign"):
        rng = random.Random(0)
        acts_of = [{make_item(Draw(rng, side), name).key["act"] for _ in range(200)} for side in (False, True)]
        assert acts_of[0] and acts_of[1] and acts_of[0].isdisjoint(acts_of[1])


def test_no_test_prompt_was_seen() -> None:
    test = asked("test", 0)
    seen = {prompt.messages for seed in (0, 1) for prompt in asked("train", seed).prompts}
    last_turns = {messages[-1].content for messages in seen}
    assert not [prompt for prompt in test.prompts if prompt.messages in seen]
    corpus = "\n".join(documents())
    small_talk = {prompt.messages[-1].content for prompt in test.prompts if prompt.tags[0] == "chat"}
    for prompt in test.prompts:
        text = prompt.messages[-1].content
        assert text not in last_turns, text
        assert text in small_talk or text not in corpus, text
    assert not [text for text in small_talk if f"<|user|>{text}<|assistant|>" in corpus]


def test_users_are_the_groups_and_have_habits_of_their_own() -> None:
    train, test = asked("train", 0), asked("test", 0)
    for found, split in ((train, "train"), (test, "test")):
        assert {prompt.split for prompt in found.prompts} == {split}
        assert all(prompt.prompt_group_id == prompt.producer_id for prompt in found.prompts)
        assert set(Counter(prompt.prompt_group_id for prompt in found.prompts).values()) == {8}
        assert (
            len({prompt.messages for prompt in found.prompts}) == len({prompt.id for prompt in found.prompts}) == SOME
        )
        assert set(found.items) == {prompt.id for prompt in found.prompts}
    assert {p.prompt_group_id for p in train.prompts}.isdisjoint(p.prompt_group_id for p in test.prompts)
    first = make_user(0, False)
    assert first == make_user(0, False)
    own = [prompt.messages[-1].content for prompt in train.prompts if prompt.prompt_group_id == first.name]
    opening = first.opening.lower() if first.lower_case else first.opening
    assert all(text.startswith(opening[:3]) and text.endswith(first.tail) for text in own)
    assert len({make_user(number, False)[2:5] for number in range(100)}) >= 20


def test_prompts_come_in_the_shares_of_the_mix_and_carry_their_tags() -> None:
    found = asked("train", 0).prompts
    shares = Counter(prompt.tags[0] for prompt in found)
    total = sum(task.share for task in TASKS.values())
    for name, task in TASKS.items():
        assert shares[name] / SOME == pytest.approx(task.share / total, abs=0.045), name
    tags = Counter(tag for prompt in found for tag in prompt.tags)
    assert all(tags[name] for name in ("two_hop", "multi_turn", "disguised", "plain", "not_told", "look_alike"))
    assert all((prompt.risk_tag == "harmful") == (prompt.tags[0] == "harmful") for prompt in found)
    closed = ("closed_qa", "extract", "summarise")
    assert all(prompt.expects_closed_domain == (prompt.tags[0] in closed) for prompt in found)


def test_untidy_prompts_repeat_nothing_but_carry_what_hygiene_looks_for() -> None:
    found = [prompt.messages[-1].content for prompt in draw_prompts(400, 7, "train", untidy=True).prompts]
    for mark, low in (("@example.com", 2), ("+44 20 7946", 1)):
        assert low <= sum(mark in text for text in found) <= 30
    assert 1 <= sum(len(text.split()) > 120 for text in found) <= 30


def test_gold_is_a_scorer_with_a_scale() -> None:
    made = draw_prompts(8, 0, "train")
    known = {"id": "c", "source": "oracle", "producer_id": "x", "prompt_group_id": "g"}
    done = [Completion(**known, prompt_id=one.id, text=made.items[one.id].good[0]) for one in made.prompts]
    scores, scaled = made.gold()(made.prompts, done), made.gold(4.0)(made.prompts, done)
    assert min(scores) >= 0.85 and scaled == pytest.approx([4 * score for score in scores])
