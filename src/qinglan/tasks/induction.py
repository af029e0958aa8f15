"""Induction: documents that copy, quote, look up, change and count, so that a net learns to read its own context."""

from collections.abc import Callable

from qinglan.tasks import lexicon as lx
from qinglan.tasks.document import Document, Span
from qinglan.tasks.item import Draw
from qinglan.tasks.writing import plain_sentence

WORDS = tuple(sorted({*lx.PEOPLE, *lx.ANIMALS, *lx.FOODS, *lx.TOOLS, *lx.THINGS, *lx.COLOURS, *lx.PLACES, *lx.JOBS}))


SYMBOLS = tuple("abcdefghijklmnopqrstuvwxyz0123456789")


def repeated_string(draw: Draw) -> Document:
    """Random words, letters or digits without any mark between them, over and over: induction in its purest form."""
    rng = draw.rng
    pool = rng.choice((WORDS, WORDS, SYMBOLS))
    members = [rng.choice(pool) for _ in range(rng.randrange(4, 30))]
    text = " ".join(members)
    return [Span(text, 0.0), *[Span(text)] * max(1, min(5, 60 // len(members)))]


def echo(draw: Draw) -> Document:
    """Random words or digits, then the same again (induction); only the repetition counts in the loss."""
    rng = draw.rng
    if rng.random() < 0.6:
        members = [rng.choice(WORDS) for _ in range(rng.randrange(3, 13))]
    else:
        members = [str(rng.randrange(10 ** rng.randrange(1, 4))) for _ in range(rng.randrange(3, 9))]
    text = ", ".join(members)
    again = rng.choice(("Again", "Once more", "Copy", "Say it again"))
    return [Span(text + ".", 0.05), Span(f"{again}: {text}.")]


def quoted_line(draw: Draw) -> Document:
    """Numbered lines, then some of them quoted by number."""
    rng = draw.rng
    lines = [plain_sentence(draw, rng.choice(lx.ANIMALS), rng.choice(lx.TOOLS)) for _ in range(rng.randrange(2, 6))]
    numbered = " ".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
    asked = rng.sample(range(len(lines)), rng.randrange(1, len(lines)))
    return [Span(numbered, 0.2), Span(" ".join(f"Line {number + 1} says: {lines[number]}" for number in asked))]


def lookup(draw: Draw) -> Document:
    """Pairs of words, then one looked up by the other."""
    rng = draw.rng
    keys, values = rng.sample(WORDS, 5), rng.sample(WORDS, 5)
    table = ", ".join(f"{key} has {value}" for key, value in zip(keys, values, strict=True))
    order = rng.sample(range(5), 3)
    return [Span(table + ".", 0.05), Span(" ".join(f"{keys[i]} has {values[i]}." for i in order))]


def changed_copy(draw: Draw) -> Document:
    """A line, then the same line with one word changed, and the change named."""
    rng = draw.rng
    members = [rng.choice(WORDS) for _ in range(rng.randrange(3, 9))]
    place = rng.randrange(len(members))
    new = rng.choice(WORDS)
    changed = [*members[:place], new, *members[place + 1 :]]
    return [
        Span(f"{' '.join(members)}. {members[place]} becomes {new}:", 0.1),
        Span(f"{' '.join(changed)}."),
    ]


def counting(draw: Draw) -> Document:
    """A row of few different words, then how often some of them stand in it."""
    rng = draw.rng
    pool = rng.sample(WORDS, 3)
    members = [rng.choice(pool) for _ in range(rng.randrange(3, 10))]
    counts = [f"{word} {members.count(word)}" for word in pool]
    return [Span(f"{' '.join(members)}.", 0.1), Span(f"Count: {', '.join(counts)}, together {len(members)}.")]


def restated(draw: Draw) -> Document:
    """Sentences, then the same ones in another order, as a text that repeats itself does."""
    rng = draw.rng
    lines = [plain_sentence(draw, rng.choice(lx.ANIMALS), rng.choice(lx.TOOLS)) for _ in range(rng.randrange(2, 4))]
    return [Span(" ".join(lines), 0.2), Span("To say it again: " + " ".join(rng.sample(lines, len(lines))))]


INDUCTION_MIX: dict[str, tuple[float, Callable[[Draw], Document]]] = {
    "repeated_string": (0.24, repeated_string),
    "echo": (0.20, echo),
    "quoted_line": (0.18, quoted_line),
    "lookup": (0.12, lookup),
    "changed_copy": (0.12, changed_copy),
    "counting": (0.07, counting),
    "restated": (0.07, restated),
}
"""Every kind of induction document with its share among them."""
