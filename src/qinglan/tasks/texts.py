"""Work on a given text: rewriting, summarising, classifying."""

from qinglan.tasks import lexicon as lx
from qinglan.tasks.item import Draw, Grade, Item, Key, user
from qinglan.tasks.passages import make_story
from qinglan.tasks.reading import a, abstains, claimed, contains, denied, mentioned, num_copied, words

REWRITE_WORDINGS = {
    "past": ("Put this in the past: {t}", "Write this in the past tense: {t}", "Say this in the past tense: {t}"),
    "polite": ("Make this polite: {t}", "Write this in a polite way: {t}", "Say this in a polite way: {t}"),
    "swap": ("Change {x} to {y}: {t}", "Write {y} in place of {x}: {t}", "Put {y} in place of {x}: {t}"),
}


def rewriting(draw: Draw) -> Item:
    """Put a sentence in the past, make it polite, or change one word."""
    rng = draw.rng
    who, thing, place = rng.choice(lx.PEOPLE), rng.choice((*lx.TOOLS, *lx.FOODS)), rng.choice(lx.PLACES)
    kind = rng.choice(sorted(REWRITE_WORDINGS))
    x = y = ""
    if kind == "past":
        verb = rng.choice(sorted(lx.VERBS))
        shape = rng.choice(
            (
                "{who} {verb} the {thing}.",
                "{who} {verb} the {thing} at the {place}.",
                "At the {place} {who} {verb} the {thing}.",
            )
        )
        text = shape.format(who=who, verb=verb, thing=thing, place=place)
        expected = shape.format(who=who, verb=lx.VERBS[verb], thing=thing, place=place)
        wrong = text
    elif kind == "polite":
        order = rng.choice(
            ("bring me the {thing}", "open the {place}", "take the {thing} to {who}", "sell me your {thing}")
        )
        text = order.format(who=who, thing=thing, place=place).capitalize().replace(who.lower(), who) + "."
        expected = "Please " + text[0].lower() + text[1:]
        wrong = text[:-1] + " now, you fool."
    else:
        pool = rng.choice((lx.TOOLS, lx.FOODS, lx.ANIMALS))
        x, y, other = rng.sample(pool, 3)
        shape = rng.choice(
            ("{who} saw the {x} at the {place}.", "The {x} of {who} was lost.", "{who} took the {x} to the {place}.")
        )
        text = shape.format(who=who, x=x, place=place)
        expected = shape.format(who=who, x=y, place=place)
        wrong = shape.format(who=who, x=other, place=place)
    prompt = draw.wording(REWRITE_WORDINGS[kind]).format(t=text, x=x, y=y)
    key = {"kind": kind, "expected": expected, "text": text}
    return Item("rewrite", ("rewrite", kind), (user(prompt),), key, (expected, expected), {"wrong": wrong})


POLITE = frozenset(
    lx.split_words("""please kindly could would can will you may i ask be so kind as to and thank thanks me dear""")
)
"""Words that may be added to make an order polite."""
TO_BE_POLITE = frozenset(lx.split_words("please kindly thank thanks"))


def grade_rewriting(key: Key, text: str) -> Grade:
    """The expected words in order: 1, with a short lead-in 0.9. A plain copy: 0.

    Otherwise the share of kept and changed words times 0.4, or 0.1 where the change that was asked for is not there.
    """
    found, expected, given = words(text), words(key["expected"]), words(key["text"])
    if found == expected:
        return Grade(1.0, 1.0, 1.0)
    if contains(found, expected) and len(found) <= len(expected) + 5:
        return Grade(0.9, 1.0, 1.0)
    if key["kind"] == "polite" and _is_polite_form(found, given):
        return Grade(0.95, 1.0, 1.0)
    if key["kind"] == "past" and [word for word in found if word not in ("had", "has", "yesterday")] == expected:
        return Grade(0.9, 1.0, 1.0)
    if found == given:
        return Grade(0.0, 1.0, 1.0)
    overlap = len(set(expected) & set(found)) / len(set(expected) | set(found))
    is_changed = set(expected) - set(given) <= set(found)
    foreign = [name for name in mentioned(text, lx.PEOPLE) if name.lower() not in expected]
    return Grade((0.4 if is_changed else 0.1) * overlap, 0.5 if foreign else 0.8, 1.0)


def _is_polite_form(found: list[str], given: list[str]) -> bool:
    """True if the order stands in its words, with a polite word and nothing but polite words added."""
    rest = list(found)
    for word in given:
        if word not in rest:
            return False
        rest.remove(word)
    kept = [word for word in found if word in given and word not in POLITE]
    in_order = kept == [word for word in given if word not in POLITE]
    return in_order and not TO_BE_POLITE.isdisjoint(rest) and set(rest) <= POLITE


SUMMARY_WORDINGS = (
    "Sum up: {p}",
    "Sum this up in one short sentence: {p}",
    "Give a short summary. {p}",
    "Tell me in short: {p}",
)


def summarising(draw: Draw) -> Item:
    """One short sentence that says who did what, out of three to five."""
    story = make_story(draw, draw.rng.randrange(3, 6))
    slots = story.slots
    good = f"{slots['who']} {slots['verb']} {slots['count']} {slots['colour']} {slots['thing']}."
    shorter = f"{slots['who']} {slots['verb']} {slots['thing']}."
    stranger = draw.rng.choice([name for name in lx.PEOPLE if name not in story.text])
    wrong = good.replace(slots["who"], stranger)
    prompt = draw.wording(SUMMARY_WORDINGS).format(p=story.text)
    key = {"who": slots["who"], "verb": slots["verb"], "thing": slots["thing"], "passage": story.text}
    return Item(
        "summarise", ("summarise",), (user(prompt),), key, (good, shorter), {"wrong": wrong, "ignored": story.text}
    )


PRESENT = {past: present for present, past in lx.VERBS.items()}


def grade_summary(key: Key, text: str) -> Grade:
    """Who, what was done, to what: a third each, a fifth in all if twisted or denied.

    Too long (over 12 words) halves it, copying the passage leaves a fifth; what is not in the passage is invented.
    """
    found, passage = words(text), key["passage"]
    verbs = (key["verb"], PRESENT[key["verb"]])
    places = [_place(found, (key["who"].lower(),)), _place(found, verbs), _place(found, (key["thing"],))]
    helpful = sum(place is not None for place in places) / 3
    is_twisted = helpful == 1.0 and not _tells(found, places)
    if is_twisted:
        helpful = 0.2
    if num_copied(text, passage) > 1:
        helpful *= 0.2
    elif len(found) > 12:
        helpful *= 0.5
    known = set(words(passage))
    pools = (lx.PEOPLE, lx.COLOURS, lx.THINGS, lx.PLACES, lx.ANIMALS, lx.FOODS, lx.DAYS, lx.NUMBER_WORDS[2:])
    invented = [name for pool in pools for name in mentioned(text, pool) if name.lower() not in known]
    if invented:
        return Grade(0.5 * helpful, 0.0, 1.0, hallucinated=True)
    return Grade(helpful, 0.3 if is_twisted else 1.0 if helpful else 0.6, 1.0)


def _place(found: list[str], forms: tuple[str, ...]) -> int | None:
    return next((place for place, word in enumerate(found) if word in forms), None)


def _tells(found: list[str], places: list[int | None]) -> bool:
    """True for "who did it to what", or "what was done by whom", without a "not"."""
    who, verb, thing = (place or 0 for place in places)
    passive = thing < verb < who and "by" in found[verb:who]
    return (who < verb < thing or passive) and {"not", "never", "no"}.isdisjoint(found)


CLASSIFY_WORDINGS = {
    "mood": (
        "Is this review good or bad? {t}",
        "Good or bad? {t}",
        "{t} Is that good or bad?",
        "Tell me if this is good or bad: {t}",
    ),
    "kind": (
        "Is {t} an animal, a food or a tool?",
        "What is {t}: animal, food or tool?",
        "Animal, food or tool: {t}?",
        "Tell me if {t} is an animal, a food or a tool.",
    ),
}


def classifying(draw: Draw) -> Item:
    """The mood of a review (its last clause may turn it), or the kind of a thing."""
    rng = draw.rng
    if rng.random() < 0.5:
        good_mood = rng.random() < 0.5
        adjectives = lx.GOOD_WORDS if good_mood else lx.BAD_WORDS
        against = lx.BAD_WORDS if good_mood else lx.GOOD_WORDS
        first, second = rng.sample(lx.REVIEWED, 2)
        shape = rng.choice(
            (
                "The {x} was {p} and the {y} was {q}.",
                "I found the {x} {p} and the {y} {q}.",
                "Not {n}: the {x} was {p}.",
                "The {x} was not {n}, it was {p}.",
            )
        )
        p, q = rng.sample(adjectives, 2)
        text = shape.format(x=first, y=second, p=p, q=q, n=rng.choice(against))
        label, other, kind = ("good", "bad", "mood") if good_mood else ("bad", "good", "mood")
        good = (f"It is {label}.", f"The review is {label}.", label.capitalize() + ".")
        wrong = f"It is {other}."
    else:
        label, other = rng.sample(("animal", "food", "tool"), 2)
        text, kind = "the " + rng.choice(lx.KINDS[label]), "kind"
        good = (f"It is {a(label)}.", f"{a(label).capitalize()}.", label.capitalize() + ".")
        wrong = f"It is {a(other)}."
    prompt = draw.wording(CLASSIFY_WORDINGS[kind]).format(t=text)
    prompt = prompt[0].upper() + prompt[1:]
    return Item(
        "classify",
        ("classify", kind),
        (user(prompt),),
        {"kind": kind, "label": label, "text": text},
        good,
        {"wrong": wrong},
    )


SAME_MOOD = {"positive": "good", "negative": "bad"}


def grade_classification(key: Key, text: str) -> Grade:
    """The right label and no other, in at most eight words: 1. A label that stands in the review itself is none."""
    labels = ("good", "bad") if key["kind"] == "mood" else ("animal", "food", "tool")
    said = " ".join(SAME_MOOD.get(word, word) for word in text.replace(".", " .").lower().split())
    if key["kind"] == "mood":  # words of the review itself ("the room was good") are no verdict
        said = said.replace(key["text"].lower().rstrip("."), "")
    named = claimed(said, labels)
    if key["kind"] == "mood" and not named:
        named = [label for label in labels if denied(said, labels) not in ([], [label])]
    if named == [key["label"]] and key["label"] not in denied(said, labels):
        return Grade(1.0 if len(words(text)) <= 8 else 0.6, 1.0, 1.0)
    if key["label"] in named:
        return Grade(0.1, 0.6, 1.0)
    return Grade(0.0, 1.0 if abstains(text) or not named else 0.3, 1.0)
