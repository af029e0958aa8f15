"""Capability probes of a base model: what it can do after pretraining, measured greedily on text it has not seen.

A loss that looks good hides much; these rates gate the base family. Each probe gives the beginning of a document and
what must follow. Documents come from their own streams; sums, entities and wordings marked held out are so here too.
"""

import random
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from qinglan.core.rng import stream_seed
from qinglan.tasks import corpus, document, lexicon, numbers, passages, questions, world
from qinglan.tasks.assistant import grade, make_item, overall
from qinglan.tasks.induction import WORDS
from qinglan.tasks.item import Draw, Item
from qinglan.tasks.reading import mentioned, words
from qinglan.tasks.writing import plain_sentence


class Probe(NamedTuple):
    """The beginning of a document, and the test of what the model writes after it."""

    beginning: str
    passes: Callable[[str], bool]
    max_new_tokens: int = 48
    """Tokens that the model may write."""


def begins_with(expected: str) -> Callable[[str], bool]:
    """Return the test that a continuation begins with the expected words."""
    target = words(expected)
    return lambda text: words(text)[: len(target)] == target


def copying(draw: Draw) -> Probe:
    """Random words, said again."""
    members = [draw.rng.choice(WORDS) for _ in range(draw.rng.randrange(3, 9))]
    text = ", ".join(members)
    return Probe(f"{text}. Again:", begins_with(text))


def digits(draw: Draw) -> Probe:
    """Random numbers, said again."""
    members = [str(draw.rng.randrange(10 ** draw.rng.randrange(1, 4))) for _ in range(draw.rng.randrange(3, 7))]
    text = ", ".join(members)
    return Probe(f"{text}. Copy:", begins_with(text))


def quoting(draw: Draw) -> Probe:
    """A line quoted by its number."""
    rng = draw.rng
    lines = [plain_sentence(draw, rng.choice(lexicon.ANIMALS), rng.choice(lexicon.TOOLS)) for _ in range(4)]
    number = rng.randrange(4)
    numbered = " ".join(f"{place}. {line}" for place, line in enumerate(lines, start=1))
    return Probe(f"{numbered} Line {number + 1} says:", begins_with(lines[number]))


def _answers(item: Item) -> Callable[[str], bool]:
    pool, value = world.POOLS[item.key["pool"]], item.key["value"]
    entity = item.key["entity"].split()

    def passes(text: str) -> bool:
        # A question of two hops may be answered step by step, so the whole answer counts, up to the next question.
        answer = text.split("Question:")[0]
        return [name for name in mentioned(answer, pool) if name not in entity] == [value]

    return passes


def _question(draw: Draw, hops: str, held_out: bool) -> Probe:
    item = questions.open_question(Draw(draw.rng, held_out))
    while hops not in item.tags:
        item = questions.open_question(Draw(draw.rng, held_out))
    return Probe(f"Question: {item.messages[-1].content} Answer:", _answers(item))


def recall(draw: Draw) -> Probe:
    """A fact asked in a known wording."""
    return _question(draw, "one_hop", held_out=False)


def recall_held_out(draw: Draw) -> Probe:
    """A fact about a held-out entity, in a held-out wording."""
    return _question(draw, "one_hop", held_out=True)


def two_hops(draw: Draw) -> Probe:
    """A question of two hops, entity and wording held out."""
    return _question(draw, "two_hop", held_out=True)


def closed_qa(draw: Draw) -> Probe:
    """A question on a new passage."""
    story = passages.make_story(draw, 4)
    slot = draw.rng.choice([name for name in story.slots if name in passages.SLOT_ANSWERS])
    question = draw.wording(passages.SLOT_QUESTIONS[slot]).format(**story.slots)
    pool, value = passages.SLOT_POOLS[slot], story.slots[slot]
    subject = story.slots["who"]

    def passes(text: str) -> bool:
        named = mentioned(text.split(".")[0], pool)
        return value in named and not set(named) - {value, subject}

    return Probe(f"{story.text} {question}", passes)


def sorting(draw: Draw) -> Probe:
    """Four words brought in order."""
    members = draw.rng.sample(corpus.questions_words(), 4)
    return Probe(f"In order, {', '.join(members)}:", begins_with(", ".join(sorted(members))))


def sums(draw: Draw) -> Probe:
    """A sum of a held-out pair of numbers."""
    key = numbers.arithmetic(Draw(draw.rng, held_out=True)).key
    op = "plus" if key["total"] == key["a"] + key["b"] else "minus"
    return Probe(f"{key['a']} {op} {key['b']} is", begins_with(str(key["total"])))


def extraction(draw: Draw) -> Probe:
    """All people, animals, colours or foods of a new text, as a reply in a thread."""
    return _reply(draw, "extract")


def rewriting(draw: Draw) -> Probe:
    """A sentence rewritten as asked for in a held-out wording, as a reply in a thread."""
    return _reply(draw, "rewrite")


def _reply(draw: Draw, use_case: str) -> Probe:
    item = make_item(Draw(draw.rng, held_out=True), use_case)
    beginning = f"{document.USER}{item.messages[-1].content}{document.ASSISTANT}"
    return Probe(beginning, lambda text: overall(grade(item, text)) >= 0.9)


PROBES: dict[str, Callable[[Draw], Probe]] = {
    "copying": copying,
    "digits": digits,
    "quoting": quoting,
    "recall": recall,
    "recall_held_out": recall_held_out,
    "two_hops": two_hops,
    "closed_qa": closed_qa,
    "sorting": sorting,
    "sums": sums,
    "extraction": extraction,
    "rewriting": rewriting,
}


T = TypeVar("T")


def draw_items(makers: Mapping[str, Callable[[Draw], T]], name: str, count: int, seed: int) -> list[T]:
    """Return `count` items of the probe called `name`, the same for the same seed."""
    draw = Draw(random.Random(stream_seed(seed, "probe", name)), held_out=False)
    return [makers[name](draw) for _ in range(count)]
