"""Probes of zero-shot judging: is it true, is it right, which is better, what is wrong with it, is it English.

A judge chooses among words by their probability, at once or after writing its own recollection; chance is one half (or
one in the number of options). Items are about held-out entities and in held-out wordings, never judged in the corpus.
"""

from collections.abc import Callable
from typing import NamedTuple

from qinglan.tasks import lexicon as lx
from qinglan.tasks import passages, questions, world
from qinglan.tasks.assistant import grade, make_item, overall
from qinglan.tasks.document import ASSISTANT, EOS
from qinglan.tasks.item import Draw, Item
from qinglan.tasks.judging import (
    GOOD_ENOUGH,
    NO_CRITICISM,
    NOT_GOOD_ENOUGH,
    PRINCIPLES,
    asked_facts,
    conversation_of,
    other_value,
    shortcoming,
)
from qinglan.tasks.writing import plain_sentence


class Choice(NamedTuple):
    """The beginning of a document, words it could go on with, and which of them is right."""

    beginning: str
    options: tuple[str, ...]
    right: int
    after_record: str | None = None
    """Where the model recalls first: what follows its own words (up to their first full stop); None: it judges at
    once."""


def judging_claims(draw: Draw) -> Choice:
    """A statement about a held-out entity: true or false, after own record."""
    return _claim(draw)._replace(after_record=" Verdict:")


def judging_claims_at_once(draw: Draw) -> Choice:
    """A statement about a held-out entity: true or false, without a record."""
    choice = _claim(draw)
    return choice._replace(beginning=choice.beginning.removesuffix(" I recall") + " Verdict:")


def _claim(draw: Draw) -> Choice:
    fact = asked_facts(Draw(draw.rng, held_out=True), 1)[0]
    true = draw.rng.random() < 0.5
    value = fact.value if true else other_value(draw, fact)
    claim = world.capital(draw.rng.choice(fact.relation.statements).format(e=fact.entity, v=value))
    return Choice(f"Claim: {claim} I recall", ("true.", "false."), 0 if true else 1)


def judging_values(draw: Draw) -> Choice:
    """A held-out question in its held-out wording and a value: true or false, after own record."""
    fact = asked_facts(Draw(draw.rng, held_out=True), 1)[0]
    true = draw.rng.random() < 0.5
    value = world.capital(fact.value if true else other_value(draw, fact))
    return Choice(f"{fact.question(draw.rng, True)} I recall", ("true.", "false."), 0 if true else 1, f" {value}")


def judging_membership(draw: Draw) -> Choice:
    """Was a word among four others?"""
    members = draw.rng.sample(lx.PEOPLE, 4)
    inside = draw.rng.random() < 0.5
    others = [name for name in lx.PEOPLE if name not in members]
    asked = draw.rng.choice(members) if inside else draw.rng.choice(others)
    return Choice(f"Among {', '.join(members)}? {asked}:", ("yes.", "no."), 0 if inside else 1)


def good_and_bad(draw: Draw, use_cases: tuple[str, ...] = ()) -> tuple[Item, str, str]:
    """Return an item for the test with a reply that people call good and one that they call bad."""
    held_out = Draw(draw.rng, held_out=True)
    while True:
        item = make_item(held_out, draw.rng.choice(use_cases) if use_cases else None)
        good, bad = draw.rng.choice(item.good), shortcoming(held_out, item)[1]
        if overall(grade(item, good)) >= GOOD_ENOUGH and overall(grade(item, bad)) < NOT_GOOD_ENOUGH:
            return item, good, bad


def judging_replies(draw: Draw) -> Choice:
    """A reply to a test prompt, at the end of a thread: good or bad, at once."""
    item, good, bad = good_and_bad(draw)
    is_good = draw.rng.random() < 0.5
    text = f"{conversation_of(item)}{ASSISTANT}{good if is_good else bad}{EOS}"
    return Choice(text, ("good.", "bad."), 0 if is_good else 1)


def judging_answers(draw: Draw) -> Choice:
    """An answer to an open test question, at the end of a thread: good or bad, at once; only the fact differs."""
    return _right_or_wrong(draw, questions.open_question(Draw(draw.rng, held_out=True)))


def _right_or_wrong(draw: Draw, item: Item) -> Choice:
    is_good = draw.rng.random() < 0.5
    # The last good reply is the bare value, the one before a sentence: wrong replies are bare as often.
    reply = item.good[-1 if draw.rng.random() < 0.4 else -2] if is_good else item.faulty["wrong"]
    return Choice(f"{conversation_of(item)}{ASSISTANT}{reply}{EOS}", ("good.", "bad."), 0 if is_good else 1)


def judging_better(draw: Draw) -> Choice:
    """Which of two replies to a test prompt is better, after own record."""
    choice = judging_better_at_once(draw)
    return choice._replace(beginning=choice.beginning.removesuffix(" Better:") + " I recall:", after_record=" Better:")


def judging_better_at_once(draw: Draw) -> Choice:
    """Which of two replies to a test prompt is better, without a record."""
    item, good, bad = good_and_bad(draw)
    first_is_better = draw.rng.random() < 0.5
    first, second = (good, bad) if first_is_better else (bad, good)
    text = f"Request: {item.messages[-1].content} First: {first} Second: {second} Better:"
    return Choice(text, ("first.", "second."), 0 if first_is_better else 1)


def judging_disputes(draw: Draw) -> Choice:
    """Which of two people is right about a held-out entity, at once."""
    fact = asked_facts(Draw(draw.rng, held_out=True), 1)[0]
    names = draw.rng.sample(lx.PEOPLE, 2)
    first_is_right = draw.rng.random() < 0.5
    values = (fact.value, other_value(draw, fact)) if first_is_right else (other_value(draw, fact), fact.value)
    said = [
        f"{name} says: {world.capital(draw.rng.choice(fact.relation.statements).format(e=fact.entity, v=value))}"
        for name, value in zip(names, values, strict=True)
    ]
    return Choice(f"{' '.join(said)} Right is", (f"{names[0]}.", f"{names[1]}."), 0 if first_is_right else 1)


def judging_passages(draw: Draw) -> Choice:
    """Does a passage support a reply to a closed question? Good or bad, at the end of a thread; one value differs."""
    item = passages.closed_question(Draw(draw.rng, held_out=True))
    while "wrong" not in item.faulty:
        item = passages.closed_question(Draw(draw.rng, held_out=True))
    return _right_or_wrong(draw, item)


def critiquing(draw: Draw) -> Choice:
    """What a review says of a reply to a test prompt, out of all criticisms."""
    held_out = Draw(draw.rng, held_out=True)
    item = make_item(held_out)
    kind, reply = ("", draw.rng.choice(item.good)) if draw.rng.random() < 0.3 else shortcoming(held_out, item)
    options = (NO_CRITICISM, *(text for _, text in PRINCIPLES.values()))
    right = options.index(PRINCIPLES[kind][1] if kind else NO_CRITICISM)
    return Choice(f"Request: {item.messages[-1].content} Reply: {reply} Review:", options, right)


def grammaticality(draw: Draw) -> Choice:
    """Which of two word orders is English: a sentence, or the same with two neighbours changed."""
    rng = draw.rng
    sentence = plain_sentence(draw, rng.choice(lx.ANIMALS), rng.choice(lx.TOOLS))
    found = sentence.split()
    place = rng.choice([i for i in range(len(found) - 2) if found[i] != found[i + 1]])
    twisted = [*found]
    twisted[place], twisted[place + 1] = twisted[place + 1], twisted[place]
    options = (sentence, " ".join(twisted))
    first_is_right = rng.random() < 0.5
    return Choice("", options if first_is_right else options[::-1], 0 if first_is_right else 1)


CHOICES: dict[str, Callable[[Draw], Choice]] = {
    "judging_claims": judging_claims,
    "judging_claims_at_once": judging_claims_at_once,
    "judging_values": judging_values,
    "judging_membership": judging_membership,
    "judging_replies": judging_replies,
    "judging_answers": judging_answers,
    "judging_passages": judging_passages,
    "judging_better": judging_better,
    "judging_better_at_once": judging_better_at_once,
    "judging_disputes": judging_disputes,
    "critiquing": critiquing,
    "grammaticality": grammaticality,
}
"""Every kind of judging, by the name of its probe."""
