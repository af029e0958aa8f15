"""Sums and sorting: exact answers."""

import re

from qinglan.tasks import lexicon as lx
from qinglan.tasks.item import Draw, Grade, Item, Key, user
from qinglan.tasks.reading import abstains, concision, sentences, without_bullets, words

SUM_WORDINGS = (
    "What is {a} {op} {b}?",
    "How much is {a} {op} {b}?",
    "Work out {a} {op} {b}.",
    "Please work out how much {a} {op} {b} is.",
)


def arithmetic(draw: Draw) -> Item:
    """A sum or difference of numbers up to three digits; one fifth of the pairs, chosen by a hash, is held out."""
    rng = draw.rng
    while True:
        top = rng.choice((10, 100, 100, 1000))
        a, b = rng.randrange(1, top), rng.randrange(1, top)
        if ((a * 7919 + b * 104729) % 5 == 0) == draw.held_out:
            break
    plus = rng.random() < 0.6
    if not plus and b > a:
        a, b = b, a
    total = a + b if plus else a - b
    op = "plus" if plus else "minus"
    good = (f"{a} {op} {b} is {total}.", f"It is {total}.", f"{total}.")
    slip = max(0, total + rng.choice((-10, -1, 1, 10, 2, 100)))
    wrong = slip if slip != total else total + 1
    question = draw.wording(SUM_WORDINGS).format(a=a, b=b, op=op)
    tags = ("arithmetic", f"digits_{len(str(max(a, b)))}")
    return Item(
        "arithmetic",
        tags,
        (user(question),),
        {"a": a, "b": b, "total": total},
        good,
        {"wrong": f"{a} {op} {b} is {wrong}."},
    )


def grade_arithmetic(key: Key, text: str) -> Grade:
    """The right total as the only number beside the two given ones: 1; another number is a false claim."""
    numbers = numbers_in(text)
    if sorted(numbers[:2]) == sorted((key["a"], key["b"])):
        numbers = numbers[2:]
    if not numbers:
        return Grade(0.1 if abstains(text) else 0.0, 1.0 if abstains(text) else 0.7, 1.0)
    is_denied = re.search(rf"\bnot {key['total']}\b", text) is not None
    if set(numbers) == {key["total"]} and not is_denied:
        return Grade(concision(text, 6), 1.0, 1.0)
    return Grade(0.2 if key["total"] in numbers else 0.0, 0.3, 1.0)


def numbers_in(text: str) -> list[int]:
    """Return the numbers of a text, in digits, or in words where it has no digits; "-" before a number is its sign."""
    digits = re.findall(r"(?<!\d)-?\d+", re.sub(r"(?<=\d),(?=\d{3}\b)|(?<=\d)\.0+\b", "", text))
    return [int(number) for number in digits] or [lx.NUMBER_WORDS.index(w) for w in words(text) if w in lx.NUMBER_WORDS]


SORT_WORDINGS = (
    "Sort these words: {w}.",
    "Put these words in order: {w}.",
    "Sort from a to z: {w}.",
    "Order these words from a to z: {w}.",
)
NUMBER_WORDINGS = (
    "Sort these numbers: {w}.",
    "Put these numbers in order: {w}.",
    "Sort from small to large: {w}.",
    "Order these numbers from small to large: {w}.",
)
SORTABLE = tuple(sorted({*lx.ANIMALS, *lx.FOODS, *lx.TOOLS, *lx.INSTRUMENTS}))


def sorting(draw: Draw) -> Item:
    """Three to six words or numbers to put in order."""
    rng = draw.rng
    count = rng.randrange(3, 7)
    if rng.random() < 0.6:
        members = rng.sample(SORTABLE, count)
        question = draw.wording(SORT_WORDINGS)
    else:
        members = [str(number) for number in rng.sample(range(1, 100), count)]
        question = draw.wording(NUMBER_WORDINGS)
    ordered = sorted(members, key=lambda member: int(member) if member.isdigit() else member)
    if members == ordered:
        members.reverse()
    wrong = list(ordered)
    place = rng.randrange(count - 1)
    wrong[place], wrong[place + 1] = wrong[place + 1], wrong[place]
    good = ", ".join(ordered) + "."
    return Item(
        "sorting",
        ("sorting", f"length_{count}"),
        (user(question.format(w=", ".join(members))),),
        {"ordered": ordered, "given": members},
        (good, good),
        {"wrong": ", ".join(wrong) + "."},
    )


def grade_sorting(key: Key, text: str) -> Grade:
    """The right order, after the given words or without them: 1. All members in another order: 0.3,
    as they were given: 0.1.

    Members missing or added: the share that is there, at most 0.2.
    """
    ordered, given = list(key["ordered"]), list(key["given"])
    if ordered[0].isdigit():
        found = re.findall(r"\d+", without_bullets(text))
    else:
        found = [word for word in words(text) if word in SORTABLE]
    if found == ordered or found == given + ordered:
        strays = any(set(ordered).isdisjoint(words(part)) for part in sentences(text))
        return Grade(concision(text, len(found) + 2) * (0.7 if strays else 1.0), 1.0, 1.0)
    if found == given:
        return Grade(0.1, 0.8, 1.0)
    if sorted(found) == sorted(ordered):
        return Grade(0.3, 0.8, 1.0)
    shared = len(set(found) & set(ordered))
    is_foreign = any(member not in ordered for member in found)
    too_many = len(ordered) / max(len(found), len(ordered))
    return Grade(0.2 * shared / len(ordered) * too_many, 0.5 if is_foreign else 0.8, 1.0)
