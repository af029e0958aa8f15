"""Short passages and what is asked of them: closed questions, some of which the passage does not answer; extraction."""

from typing import NamedTuple

from qinglan.tasks import lexicon as lx
from qinglan.tasks import world
from qinglan.tasks.item import Draw, Grade, Item, Key, user
from qinglan.tasks.reading import (
    abstains,
    claimed,
    concision,
    denied,
    listing,
    mentioned,
    num_copied,
    states,
    words,
)

NOT_SAID_REPLIES = ("The text does not say.", "The text does not say that.")


class Story(NamedTuple):
    """A short passage with what it says, by slot."""

    sentences: tuple[str, ...]
    slots: dict[str, str]

    @property
    def text(self) -> str:
        """The whole passage."""
        return " ".join(self.sentences)


SLOT_POOLS: dict[str, tuple[str, ...]] = {
    "who": lx.PEOPLE,
    "companion": lx.PEOPLE,
    "day": lx.DAYS,
    "count": lx.NUMBER_WORDS,
    "colour": lx.COLOURS,
    "thing": lx.THINGS,
    "place": lx.PLACES,
    "animal": lx.ANIMALS,
    "food": lx.FOODS,
}
SLOT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "who": ("Who {verb} the {thing}?", "Which person {verb} the {thing}?", "By whom were the {thing} {verb}?"),
    "companion": ("Who came along?", "Who went with {who}?", "Who came with {who}?"),
    "day": ("On what day was it?", "When was it?", "On which day was this?"),
    "count": ("How many {thing} were there?", "How many {thing} did {who} have?", "What was the number of {thing}?"),
    "colour": (
        "What colour were the {thing}?",
        "Which colour did the {thing} have?",
        "Of what colour were the {thing}?",
    ),
    "place": ("Where did {who} go?", "Where was {who}?", "To what place did {who} go?"),
    "animal": ("What animal did they see?", "Which animal was there?", "Which animal did they see?"),
    "food": ("What did they eat?", "Which food did they eat?", "What food did they eat?"),
}
SLOT_ANSWERS: dict[str, str] = {
    "who": "{who} {verb} the {thing}.",
    "companion": "{companion} came along.",
    "day": "It was on {day}.",
    "count": "There were {count} {thing}.",
    "colour": "The {thing} were {colour}.",
    "place": "{who} went to the {place}.",
    "animal": "They saw a {animal}.",
    "food": "They ate {food}.",
}
NOT_TOLD = ("How old is {who}?", "What did {who} pay?", "Why did {who} go?", "What was the weather like?")


def make_story(draw: Draw, num_sentences: int) -> Story:
    """Return a random passage of 2 to 5 sentences; its first sentence carries who, verb, count, colour and thing."""
    rng = draw.rng
    who, companion = rng.sample(lx.PEOPLE, 2)
    slots = {
        "who": who,
        "companion": companion,
        "day": rng.choice(lx.DAYS),
        "count": rng.choice(lx.NUMBER_WORDS[2:]),
        "colour": rng.choice(lx.COLOURS),
        "thing": rng.choice(lx.THINGS),
        "place": rng.choice(lx.PLACES),
        "animal": rng.choice(lx.ANIMALS),
        "food": rng.choice(lx.FOODS),
        "verb": rng.choice(lx.PASSIVE_VERBS),
    }
    optional = {
        "place": rng.choice(("{who} went to the {place}.", "Then {who} walked to the {place}.")),
        "companion": rng.choice(("{companion} came along.", "With {who} came {companion}.")),
        "day": rng.choice(("It was on {day}.", "This was on {day}.")),
        "animal": rng.choice(("There they saw a {animal}.", "On the way they saw a {animal}.")),
        "food": rng.choice(("Later they ate {food}.", "After that they ate {food}.")),
    }
    chosen = rng.sample(sorted(optional), num_sentences - 1)
    told = {name: slots[name] for name in ("who", "verb", "count", "colour", "thing", *chosen)}
    first = rng.choice(("{who} {verb} {count} {colour} {thing}.", "One day {who} {verb} {count} {colour} {thing}."))
    sentences = [first, *(optional[name] for name in chosen)]
    return Story(tuple(sentence.format(**slots) for sentence in sentences), told)


def closed_question(draw: Draw) -> Item:
    """A passage and a question on it; one in five asks for what the passage does not say."""
    rng = draw.rng
    story = make_story(draw, rng.randrange(3, 6))
    form = draw.wording(
        ("{p} {q}", "Read this: {p} {q}", "Text: {p} Question: {q}", "Here is a text. {p} Now tell me: {q}")
    )
    if rng.random() < 0.2:
        missing = [slot for slot in SLOT_ANSWERS if slot not in story.slots]
        slot = rng.choice(missing) if rng.random() < 0.5 and missing else None
        template = draw.wording(SLOT_QUESTIONS[slot]) if slot else draw.wording(NOT_TOLD)
        question = template.format(**story.slots)
        answer = (
            SLOT_ANSWERS[slot]
            if slot
            else rng.choice(("{who} is nine years old.", "{who} paid ten coins.", "It was cold."))
        )
        pool = {name: rng.choice(SLOT_POOLS[name]) for name in SLOT_POOLS}
        invented = answer.format(**{**pool, **story.slots})
        prompt = user(form.format(p=story.text, q=question))
        key = {"told": False, "question": question, "passage": story.text}
        return Item("closed_qa", ("closed_qa", "not_told"), (prompt,), key, NOT_SAID_REPLIES, {"invented": invented})
    slot = rng.choice([name for name in story.slots if name in SLOT_ANSWERS])
    question = draw.wording(SLOT_QUESTIONS[slot]).format(**story.slots)
    good = SLOT_ANSWERS[slot].format(**story.slots)
    other = rng.choice([value for value in SLOT_POOLS[slot] if value != story.slots[slot]])
    wrong = SLOT_ANSWERS[slot].format(**{**story.slots, slot: other})
    short = world.capital(story.slots[slot]) + "."
    if rng.random() < 0.4:  # as often as right replies are short, so that their form gives nothing away
        wrong = world.capital(other) + "."
    key = {"told": True, "slot": slot, "value": story.slots[slot], "passage": story.text}
    prompt = user(form.format(p=story.text, q=question))
    return Item("closed_qa", ("closed_qa", "told"), (prompt,), key, (good, good, short), {"wrong": wrong})


def grade_closed_question(key: Key, text: str) -> Grade:
    """Right value alone: 1. Values foreign to the passage, and claims where it tells nothing, are hallucinations.

    Copying the passage is no answer: each sentence of it beyond the first divides what the right value is worth.
    """
    if not key["told"]:
        return _grade_not_told(key, text)
    pool, value = SLOT_POOLS[key["slot"]], key["value"]
    subject = mentioned(key["passage"], lx.PEOPLE)[0] if key["slot"] == "companion" else None
    named = [name for name in claimed(text, pool) if name != subject or name == value]
    if abstains(text) and not named:
        return Grade(0.1, 0.6, 1.0)
    told = mentioned(key["passage"], pool)
    invented = any(name not in told for name in named)
    if named == [value] and value not in denied(text, pool):
        copies = max(1, num_copied(text, key["passage"]))
        return Grade(concision(text, 6) / copies * (0.5 if abstains(text) else 1.0), 1.0, 1.0)
    if value in named:
        return Grade(0.3, 0.2 if invented else 0.6, 1.0, hallucinated=invented)
    return Grade(0.0, 0.0 if invented else 0.4, 1.0, hallucinated=invented)


def _grade_not_told(key: Key, text: str) -> Grade:
    """Saying that the passage does not tell: 1, if nothing is told after all."""
    known = set(words(key["passage"])) | set(words(key["question"]))
    pools = (*SLOT_POOLS.values(), lx.JOBS, lx.TOWNS)
    invented = any(name.lower() not in known for pool in pools for name in claimed(text, pool))
    invented = invented or any(word.isdigit() and word not in known for word in words(text))
    if abstains(text):
        return Grade(0.3, 0.3, 1.0, hallucinated=True) if invented else Grade(concision(text, 10), 1.0, 1.0)
    claims = invented or (states(text) and not num_copied(text, key["passage"]))
    return Grade(0.0, 0.0 if claims else 0.5, 1.0, hallucinated=claims)


EXTRACTED: dict[str, tuple[str, str]] = {
    "people": ("who", "person"),
    "animals": ("animal", "animal"),
    "colours": ("colour", "colour"),
    "foods": ("food", "food"),
}


def extraction(draw: Draw) -> Item:
    """List all people, animals, colours or foods of a text."""
    rng = draw.rng
    what = rng.choice(sorted(EXTRACTED))
    pool = SLOT_POOLS[EXTRACTED[what][0]]
    members = rng.sample(pool, rng.randrange(2, 5))
    names = rng.sample([name for name in lx.PEOPLE if name not in members], len(members))
    sentences = {
        "people": lambda m, n: f"{m} {rng.choice(lx.PASSIVE_VERBS)} the {rng.choice(lx.THINGS)}.",
        "animals": lambda m, n: f"{n} saw a {m} near the {rng.choice(lx.PLACES)}.",
        "colours": lambda m, n: f"{n} has {m} {rng.choice(lx.THINGS)}.",
        "foods": lambda m, n: f"{n} ate {m} on {rng.choice(lx.DAYS)}.",
    }[what]
    passage = " ".join(sentences(member, name) for member, name in zip(members, names, strict=True))
    form = draw.wording(
        (
            "List all {w} in this text: {p}",
            "Which {w} are in this text? {p}",
            "{p} Name the {w} in it.",
            "Find all {w} here: {p}",
        )
    )
    good = world.capital(", ".join(members)) + "."
    missing = world.capital(", ".join([*members[:-2], rng.choice([m for m in pool if m not in members])])) + "."
    key = {"members": members, "what": what, "passage": passage}
    reply = (good, good, f"The {what} are {listing(members)}.")
    return Item("extract", ("extract", what), (user(form.format(w=what, p=passage)),), key, reply, {"wrong": missing})


def grade_extraction(key: Key, text: str) -> Grade:
    """Exact set: 1. Otherwise half of F1 over the named members; members not in the text are hallucinations.

    A copy of the passage names everything and picks nothing out: 0.2.
    """
    named = claimed(text, SLOT_POOLS[EXTRACTED[key["what"]][0]])
    right = set(named) & set(key["members"])
    if right == set(key["members"]) and len(named) == len(right):
        is_copy = num_copied(text, key["passage"]) > 1
        return Grade(0.2 if is_copy else concision(text, len(named) + 5), 1.0, 1.0)
    f1 = 2 * len(right) / (len(named) + len(key["members"]))
    invented = len(named) - len(right)
    honest = 1.0 - invented / len(named) if named else 0.6
    return Grade(0.5 * f1, honest, 1.0, hallucinated=invented > 0)
