"""Probes accept what is right and reject what is wrong; what they accept is in the world or in the text itself."""

import random
import re

import pytest

from qinglan.tasks import passages, world
from qinglan.tasks.assistant import grade, overall
from qinglan.tasks.item import Draw
from qinglan.tasks.judging import GOOD_ENOUGH
from qinglan.tasks.judging_probes import CHOICES, good_and_bad
from qinglan.tasks.probes import PROBES, Probe, draw_items

COUNT = 20
RECALLING = ("recall", "recall_held_out", "two_hops")


def accepted(probe: Probe, pool: tuple[str, ...]) -> list[str]:
    return [value for value in pool if probe.passes(f" It is {value}. Question: Where")]


@pytest.mark.parametrize("name", PROBES)
def test_probes_repeat_and_reject_empty_or_unrelated_text(name: str) -> None:
    probes = draw_items(PROBES, name, COUNT, 0)
    assert [probe.beginning for probe in probes] == [probe.beginning for probe in draw_items(PROBES, name, COUNT, 0)]
    assert len({probe.beginning for probe in probes}) > COUNT // 2
    for probe in probes:
        assert not probe.passes("") and not probe.passes(" I do not know that.") and not probe.passes("???")


@pytest.mark.parametrize("name", ["copying", "digits"])
def test_copies_must_be_exact(name: str) -> None:
    for probe in draw_items(PROBES, name, COUNT, 1):
        text = probe.beginning.split(". ")[0]
        first, rest = text.split(", ", 1)
        assert probe.passes(f" {text}. Then more")
        assert (not probe.passes(rest) and not probe.passes(f"{rest}, {first}")) or rest == text
        assert not probe.passes(f"zebra, {rest}")


def test_quotes_are_of_the_line_asked_for() -> None:
    for probe in draw_items(PROBES, "quoting", COUNT, 1):
        number = int(re.search(r"Line (\d) says:", probe.beginning)[1])
        lines = re.findall(r"\d\. (.+?\.)(?= \d\.| Line)", probe.beginning)
        assert len(lines) == 4
        assert probe.passes(f" {lines[number - 1]} Line 2 says")
        assert not any(probe.passes(line) for line in lines if line != lines[number - 1])


@pytest.mark.parametrize("name", RECALLING)
def test_questions_accept_exactly_the_true_value(name: str) -> None:
    rng = random.Random(0)
    facts = world.two_hop_facts() if name == "two_hops" else world.facts()
    by_question = {
        world.capital(wording.format(e=fact.entity)): fact for fact in facts for wording in fact.relation.questions
    }
    for probe in draw_items(PROBES, name, COUNT, 1):
        fact = by_question[probe.beginning.removeprefix("Question: ").removesuffix(" Answer:")]
        assert world.held_out_phrase(fact) == (name != "recall")
        pool = world.POOLS[fact.relation.values]
        assert accepted(probe, pool) == [fact.value]
        wrong = next(value for value in pool if value != fact.value)
        assert probe.passes(f" {fact.value}. Question: {wrong}?")  # what follows the answer does not count
        assert not probe.passes(f" {fact.value} and {wrong}.") and not probe.passes(f" {fact.value}. {wrong} too.")
        if name == "two_hops":
            first = world.first_hops()[fact.entity]
            assert probe.passes(f" {first.statement(rng)} {world.capital(first.value)}: {fact.value}.")


def test_closed_questions_accept_one_value_that_the_passage_holds() -> None:
    for probe in draw_items(PROBES, "closed_qa", COUNT, 1):
        values = {value for pool in passages.SLOT_POOLS.values() for value in accepted(probe, pool)}
        assert len(values) == 1
        assert values.pop() in probe.beginning


def test_sorting_and_sums() -> None:
    for probe in draw_items(PROBES, "sorting", COUNT, 1):
        given = probe.beginning.removeprefix("In order, ").removesuffix(":").split(", ")
        assert probe.passes(f" {', '.join(sorted(given))}. In order")
        assert not probe.passes(", ".join(sorted(given, reverse=True)))
        assert not probe.passes(", ".join(sorted(given)[:3]))
    for probe in draw_items(PROBES, "sums", COUNT, 1):
        a, op, b, _ = probe.beginning.split()
        total = int(a) + int(b) if op == "plus" else int(a) - int(b)
        assert (int(a) * 7919 + int(b) * 104729) % 5 == 0  # a pair that is held out
        assert (
            probe.passes(f" {total}. 3 plus") and not probe.passes(f" {total + 1}.") and not probe.passes(f"{total}0")
        )


@pytest.mark.parametrize("name", CHOICES)
def test_choices_repeat_are_balanced_and_have_one_right_option(name: str) -> None:
    choices = draw_items(CHOICES, name, 200, 1)
    assert choices == draw_items(CHOICES, name, 200, 1)
    assert all(len(set(choice.options)) == len(choice.options) > choice.right >= 0 for choice in choices)
    if name != "critiquing":
        assert 0.35 < sum(choice.right for choice in choices) / 200 < 0.65


def test_claims_are_about_held_out_entities_and_their_verdicts_right() -> None:
    statements = {
        world.capital(wording.format(e=fact.entity, v=fact.value))
        for fact in world.facts()
        if world.held_out_phrase(fact)
        for wording in fact.relation.statements
    }
    for choice in draw_items(CHOICES, "judging_claims_at_once", 60, 1):
        claim = choice.beginning.removeprefix("Claim: ").removesuffix(" Verdict:")
        assert choice.options[choice.right] == ("true." if claim in statements else "false.")


def test_replies_called_good_are_better_by_the_answer_key() -> None:
    draw = Draw(random.Random(3), False)
    for _ in range(60):
        item, good, bad = good_and_bad(draw)
        assert overall(grade(item, good)) >= GOOD_ENOUGH > overall(grade(item, bad))


def test_sentences_in_their_right_order_are_the_grammatical_ones() -> None:
    for choice in draw_items(CHOICES, "grammaticality", 30, 2):
        right, wrong = choice.options[choice.right], choice.options[1 - choice.right]
        assert sorted(right.split()) == sorted(wrong.split()) and right[0].isupper()
