"""Work on a given text: rewriting, summarising, classifying."""

from qinglan.tasks import lexicon as lx
from qinglan.tasks.item import Draw, Grade, Item, a, abstains, mentioned, same_words, user, words
from qinglan.tasks.questions import make_story

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
        shape = rng.choice(("{who} {verb} the {thing}.", "{who} {verb} the {thing} at the {place}.", "At the {place} {who} {verb} the {thing}."))
        text = shape.format(who=who, verb=verb, thing=thing, place=place)
        expected = shape.format(who=who, verb=lx.VERBS[verb], thing=thing, place=place)
        wrong = text
    elif kind == "polite":
        order = rng.choice(("bring me the {thing}", "open the {place}", "take the {thing} to {who}", "sell me your {thing}"))
        text = order.format(who=who, thing=thing, place=place).capitalize().replace(who.lower(), who) + "."
        expected = "Please " + text[0].lower() + text[1:]
        wrong = text[:-1] + " now, you fool."
    else:
        pool = rng.choice((lx.TOOLS, lx.FOODS, lx.ANIMALS))
        x, y, other = rng.sample(pool, 3)
        shape = rng.choice(("{who} saw the {x} at the {place}.", "The {x} of {who} was lost.", "{who} took the {x} to the {place}."))
        text = shape.format(who=who, x=x, place=place)
        expected = shape.format(who=who, x=y, place=place)
        wrong = shape.format(who=who, x=other, place=place)
    prompt = draw.wording(REWRITE_WORDINGS[kind]).format(t=text, x=x, y=y)
    key = {"kind": kind, "expected": expected, "text": text}
    return Item("rewrite", ("rewrite", kind), (user(prompt),), key, (expected, expected), {"wrong": wrong})


def grade_rewriting(key: dict, text: str) -> Grade:
    """The expected words in order: 1. Partly right: 0.4 times the share of the changed and kept words, none for a plain copy."""
    if same_words(text, key["expected"]):
        return Grade(1.0, 1.0, 1.0)
    if key["kind"] == "polite" and "please" in words(text) and sorted(set(words(text)) - {"please"}) == sorted(set(words(key["text"]))):
        return Grade(0.9, 1.0, 1.0)
    if same_words(text, key["text"]):
        return Grade(0.0, 1.0, 1.0)
    expected, found = set(words(key["expected"])), set(words(text))
    overlap = len(expected & found) / max(1, len(expected | found))
    foreign = [name for name in mentioned(text, lx.PEOPLE) if name.lower() not in expected]
    return Grade(0.4 * overlap, 0.5 if foreign else 0.8, 1.0)


SUMMARY_WORDINGS = ("Sum up: {p}", "Sum this up in one short sentence: {p}", "Give a short summary. {p}", "Tell me in short: {p}")


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
    return Item("summarise", ("summarise",), (user(prompt),), key, (good, shorter), {"wrong": wrong, "ignored": story.text})


def grade_summary(key: dict, text: str) -> Grade:
    """Who, what was done, to what: a third each; too long (over 12 words) halves it; names not in the passage are invented."""
    found = words(text)
    covered = [key["who"].lower() in found, key["verb"] in found, key["thing"] in found]
    helpful = sum(covered) / 3
    if len(found) > 12:
        helpful *= 0.5 if len(found) < 0.8 * len(words(key["passage"])) else 0.3
    passage = set(words(key["passage"]))
    pools = (lx.PEOPLE, lx.COLOURS, lx.THINGS, lx.PLACES, lx.ANIMALS, lx.FOODS, lx.DAYS)
    invented = [name for pool in pools for name in mentioned(text, pool) if name.lower() not in passage]
    return Grade(helpful * (0.5 if invented else 1.0), 0.0 if invented else 1.0, 1.0, hallucinated=bool(invented))


CLASSIFY_WORDINGS = {
    "mood": ("Is this review good or bad? {t}", "Good or bad? {t}", "{t} Is that good or bad?", "Tell me if this is good or bad: {t}"),
    "kind": ("Is {t} an animal, a food or a tool?", "What is {t}: animal, food or tool?", "Animal, food or tool: {t}?",
             "Tell me if {t} is an animal, a food or a tool."),
}  # fmt: skip


def classifying(draw: Draw) -> Item:
    """The mood of a review (its last clause may turn it), or the kind of a thing."""
    rng = draw.rng
    if rng.random() < 0.5:
        good_mood = rng.random() < 0.5
        adjectives = lx.GOOD_WORDS if good_mood else lx.BAD_WORDS
        against = lx.BAD_WORDS if good_mood else lx.GOOD_WORDS
        first, second = rng.sample(lx.REVIEWED, 2)
        shape = rng.choice(("The {x} was {p} and the {y} was {q}.", "I found the {x} {p} and the {y} {q}.", "Not {n}: the {x} was {p}.",
                            "The {x} was not {n}, it was {p}."))  # fmt: skip
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
    return Item("classify", ("classify", kind), (user(prompt),), {"kind": kind, "label": label}, good, {"wrong": wrong})


def grade_classification(key: dict, text: str) -> Grade:
    """The right label and no other, in at most eight words: 1."""
    labels = ("good", "bad") if key["kind"] == "mood" else ("animal", "food", "tool")
    named = mentioned(text, labels)
    if named == [key["label"]]:
        return Grade(1.0 if len(words(text)) <= 8 else 0.6, 1.0, 1.0)
    if key["label"] in named:
        return Grade(0.1, 0.6, 1.0)
    return Grade(0.0, 1.0 if abstains(text) or not named else 0.3, 1.0)
