"""Binary tasks of the built-in world: is it true, right, supported, better? Texts with labels, for weak-to-strong.

Each case ends where the corpus puts its verdict (`tasks/corpus.py` and its judging documents), so that a base model can
be asked for the verdict without any training. In the "recalled" tasks a model first writes what it remembers itself
(`models/cases.py:write_records`), then judges. Labels are drawn first and cases made for them: exactly half of each
class. Facts are grouped by fact, replies by prompt: wordings and values of one fact stay on one side.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from qinglan.core.errors import InputError, nearest
from qinglan.core.records import Case, Message, record_id
from qinglan.core.rng import stream_seed
from qinglan.data.labelled import LabelledCase
from qinglan.tasks import lexicon as lx
from qinglan.tasks import passages, world
from qinglan.tasks.assistant import grade, make_item, overall
from qinglan.tasks.code_cases import draw_task
from qinglan.tasks.code_documents import MAX_PIECES, draw_program, num_pieces, task_text
from qinglan.tasks.code_faults import tamper
from qinglan.tasks.item import Draw, Item
from qinglan.tasks.writing import plain_sentence

MAX_TRIES = 60
"""Draws that may repeat an earlier case, for each case that is wanted, before a task counts as exhausted."""


class JudgingTask(NamedTuple):
    """One task: what is judged, and how a case of a given class is made."""

    name: str
    about: str
    make: Callable[[random.Random, int], LabelledCase]


def labelled(
    label: int,
    group: str,
    text: str,
    verdicts: tuple[str, str] | None,
    *,
    messages: tuple[Message, ...] = (),
    after_record: str | None = None,
) -> LabelledCase:
    """Return a case of one text."""
    name = record_id("case", text, after_record, *(message.content for message in messages))
    return LabelledCase(Case(name, group, (text,), messages, verdicts, after_record), label)


# ---------------------------------------------------------------------------------------------------------- facts


def _fact(rng: random.Random, label: int, pool: tuple[world.Fact, ...]) -> tuple[world.Fact, str]:
    """Return a fact and its value, or another value of the same kind."""
    fact = rng.choice(pool)
    others = [value for value in world.POOLS[fact.relation.values] if value != fact.value]
    return fact, fact.value if label else rng.choice(others)


def _group(fact: world.Fact) -> str:
    return f"{fact.relation.name} of {fact.entity}"


def _claim(pool: Callable[[], tuple[world.Fact, ...]], recalled: bool) -> Callable[[random.Random, int], LabelledCase]:
    def make(rng: random.Random, label: int) -> LabelledCase:
        fact, value = _fact(rng, label, pool())
        claim = world.capital(rng.choice(fact.relation.statements).format(e=fact.entity, v=value))
        if recalled:
            text, after = f"Claim: {claim} I recall", " Verdict:"
            return labelled(label, _group(fact), text, ("false", "true"), after_record=after)
        return labelled(label, _group(fact), f"Claim: {claim} Verdict:", ("false", "true"))

    return make


def _value(recalled: bool) -> Callable[[random.Random, int], LabelledCase]:
    def make(rng: random.Random, label: int) -> LabelledCase:
        fact, value = _fact(rng, label, world.facts())
        question, tried = fact.question(rng, held_out=False), world.capital(value)
        if recalled:
            text, after = f"{question} I recall", f" {tried}"
            return labelled(label, _group(fact), text, ("false", "true"), after_record=after)
        return labelled(label, _group(fact), f"{question} {tried}", ("false", "true"))

    return make


def dispute(rng: random.Random, label: int) -> LabelledCase:
    """Two people disagree about a fact; class 1 if the first is right."""
    fact, _ = _fact(rng, 1, world.facts())
    wrong = rng.choice([value for value in world.POOLS[fact.relation.values] if value != fact.value])
    names = rng.sample([name for name in lx.PEOPLE if name not in (fact.entity, fact.value, wrong)], 2)
    values = (fact.value, wrong) if label else (wrong, fact.value)
    said = [
        f"{name} says: {world.capital(rng.choice(fact.relation.statements).format(e=fact.entity, v=value))}"
        for name, value in zip(names, values, strict=True)
    ]
    return labelled(label, _group(fact), f"{' '.join(said)} Right is", (names[1], names[0]))


HAS_TRAIT: dict[str, frozenset[str]] = {
    "instrument": frozenset(lx.split_words("piano violin harp guitar cello")),
    "animal": frozenset(
        lx.split_words(
            "fox bear wolf deer hare goat mole otter badger pony sheep rabbit donkey hamster weasel camel lynx"
        )
    ),
    "food": frozenset(lx.split_words("rice beans apples plums nuts corn grapes pears onions peas figs melon carrots")),
    "habitat": frozenset(lx.split_words("lake swamp river beach")),
}
"""By kind of value, those with the kind's trait: instruments with strings, animals with fur, foods that grow, places at
the water. The corpus never names these traits."""


def trait(rng: random.Random, label: int) -> LabelledCase:
    """Does what is asked for have a trait? Two facts in one: what it is (own record), and what that is like."""
    while True:
        fact = rng.choice(world.facts())
        having = HAS_TRAIT.get(fact.relation.values)
        if having is not None and (fact.value in having) == bool(label):
            question = fact.question(rng, held_out=False)
            return labelled(label, _group(fact), f"{question} I recall", None, after_record="")


# ------------------------------------------------------------------------------------------------------- passages


def told(rng: random.Random, label: int) -> LabelledCase:
    """Does a passage tell what a question asks for? Both kinds of question occur with an answer elsewhere."""
    while True:
        story = passages.make_story(Draw(rng, held_out=True), rng.randrange(2, 6))
        slot = rng.choice(("companion", "day", "place", "animal", "food"))
        if (slot in story.slots) == bool(label):
            question = rng.choice(passages.SLOT_QUESTIONS[slot][:-1]).format(**story.slots)
            return labelled(label, story.text, f"{story.text} {question}", None)


# ---------------------------------------------------------------------------------------------------- small puzzles


def membership(rng: random.Random, label: int) -> LabelledCase:
    """Was a word among some others?"""
    pool = rng.choice((lx.PEOPLE, lx.ANIMALS, lx.FOODS, lx.TOWNS, lx.THINGS))
    members = rng.sample(pool, rng.randrange(3, 9))
    asked = rng.choice(members if label else [word for word in pool if word not in members])
    return labelled(label, f"{asked} {' '.join(members)}", f"Among {', '.join(members)}? {asked}:", ("no", "yes"))


SPELLED = tuple(sorted({*lx.ANIMALS, *lx.FOODS, *lx.TOOLS, *lx.INSTRUMENTS}))


def letters(rng: random.Random, label: int) -> LabelledCase:
    """Does a word have a letter?"""
    while True:
        word, letter = rng.choice(SPELLED), rng.choice("eaoirstlnucdmphbgk")
        if (letter in word) == bool(label):
            return labelled(label, word, f"With the letter {letter}? {word}:", ("no", "yes"))


def grammar(rng: random.Random, label: int) -> LabelledCase:
    """A sentence, or the same with two neighbouring words changed; nobody in the corpus gives verdicts on this."""
    sentence = plain_sentence(Draw(rng, held_out=True), rng.choice(lx.ANIMALS), rng.choice(lx.TOOLS))
    found = sentence.split()
    place = rng.choice([i for i in range(len(found) - 2) if found[i] != found[i + 1]])
    if not label:
        found[place], found[place + 1] = found[place + 1], found[place]
    return labelled(label, sentence, " ".join(found), None)


def sentiment(rng: random.Random, label: int) -> LabelledCase:
    """Is a review good or bad? Some say what was not good before they say what was."""
    while True:
        item = make_item(Draw(rng, held_out=True), "classify")
        if item.key["kind"] == "mood" and (item.key["label"] == "good") == bool(label):
            return labelled(label, item.key["text"], "", ("Bad", "Good"), messages=item.messages)


def program(rng: random.Random, label: int) -> LabelledCase:
    """Does a program do what its specification says? The wrong ones have one plausible fault that changes results."""
    draw = Draw(rng, held_out=True)
    while True:
        task = draw_task(draw, "basic")
        text = draw_program(draw, task)
        if not label:
            found = tamper(draw, text, task.cases)
            if found is None:
                continue
            text = found.program
        shown = f"{task_text(task)} {text}\n Verdict:"
        if num_pieces(shown) <= MAX_PIECES:
            return labelled(label, task.composition.operations, shown, ("wrong", "correct"))


# ---------------------------------------------------------------------------------------------------------- replies


def _item_with_replies(rng: random.Random, use_cases: tuple[str, ...]) -> tuple[Item, str, str]:
    """Return an item with a good and a faulty reply that the answer key tells apart."""
    while True:
        item = make_item(Draw(rng, held_out=True), rng.choice(use_cases) if use_cases else None)
        good, bad = rng.choice(item.good), rng.choice(sorted(item.faulty.values()))
        if overall(grade(item, good)) - overall(grade(item, bad)) >= 0.15:
            return item, good, bad


def _prompt_group(item: Item) -> str:
    return " | ".join(message.content for message in item.messages)


def _reply(*use_cases: str) -> Callable[[random.Random, int], LabelledCase]:
    def make(rng: random.Random, label: int) -> LabelledCase:
        item, good, bad = _item_with_replies(rng, use_cases)
        reply = good if label else bad
        return labelled(label, _prompt_group(item), reply, ("bad", "good"), messages=item.messages)

    return make


def _better(recalled: bool) -> Callable[[random.Random, int], LabelledCase]:
    def make(rng: random.Random, label: int) -> LabelledCase:
        item, good, bad = _item_with_replies(rng, ("open_qa", "closed_qa", "arithmetic", "sorting", "classify"))
        first, second = (good, bad) if label else (bad, good)
        shown = f"Request: {item.messages[-1].content} First: {first} Second: {second}"
        words, group = ("second", "first"), _prompt_group(item)
        if recalled:
            return labelled(label, group, f"{shown} I recall:", words, after_record=" Better:")
        return labelled(label, group, f"{shown} Better:", words)

    return make


def preference(rng: random.Random, label: int) -> LabelledCase:
    """Two replies to one prompt, as two texts: the setting of reward models; class 1 if the first is better."""
    item, good, bad = _item_with_replies(rng, ())
    pair = (good, bad) if label else (bad, good)
    name = record_id("case", *pair, *(message.content for message in item.messages))
    return LabelledCase(Case(name, _prompt_group(item), pair, item.messages), label)


TASKS: dict[str, JudgingTask] = {
    task.name: task
    for task in (
        JudgingTask("claims", "a statement about the world is true, judged at once", _claim(world.facts, False)),
        JudgingTask("claims_recalled", "the same after own record", _claim(world.facts, True)),
        JudgingTask("values", "a value answers a question, judged at once", _value(False)),
        JudgingTask("values_recalled", "the same after own record", _value(True)),
        JudgingTask("two_hops", "a statement of two hops is true, after own record", _claim(world.two_hop_facts, True)),
        JudgingTask("traits", "what a fact names has a trait, after own record", trait),
        JudgingTask("disputes", "of two people who disagree the first is right", dispute),
        JudgingTask("membership", "a word is among others", membership),
        JudgingTask("letters", "a word has a letter", letters),
        JudgingTask("grammar", "a sentence has its words in order", grammar),
        JudgingTask("sentiment", "a review is good", sentiment),
        JudgingTask("programs", "a program does what its specification says", program),
        JudgingTask("sums", "a reply gives the right sum", _reply("arithmetic")),
        JudgingTask("sorting", "a reply has the right order", _reply("sorting")),
        JudgingTask("passages", "a passage supports the reply", _reply("closed_qa")),
        JudgingTask("told", "a passage tells what a question asks for", told),
        JudgingTask("answers", "a reply states the right fact", _reply("open_qa")),
        JudgingTask("constraints", "a reply obeys its constraint", _reply("constraint")),
        JudgingTask("replies", "a reply of any kind is good", _reply()),
        JudgingTask("better", "the first of two replies is better, judged at once", _better(False)),
        JudgingTask("better_recalled", "the same after own record", _better(True)),
        JudgingTask("preferences", "reward modelling: which of two replies is better", preference),
    )
}
"""Every judging task by name; the last one is of pairs."""


def task_named(name: str) -> JudgingTask:
    """Return a task. Raises `InputError` with the nearest name."""
    if name not in TASKS:
        raise InputError(f"task {name}: no such task{nearest(name, TASKS)}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def draw_cases(name: str, count: int, seed: int) -> list[LabelledCase]:
    """Return up to `count` different cases of a task, half of each class; fewer where the world has no more."""
    task = task_named(name)
    rng = random.Random(stream_seed(seed, "judgements", name))
    found: dict[tuple[object, ...], LabelledCase] = {}
    by_class = [0, 0]
    for _ in range(MAX_TRIES * count):
        label = int(by_class[0] > by_class[1])
        made = task.make(rng, label)
        key = (made.case.texts, made.case.messages, made.case.after_record)
        if key not in found:
            found[key] = made
            by_class[label] += 1
        if len(found) >= count:
            break
    return list(found.values())
