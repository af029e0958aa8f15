"""Questions with a key: open questions of one and two hops, unanswerable ones, closed questions on a passage, extraction."""

from typing import NamedTuple

from qinglan.tasks import lexicon as lx
from qinglan.tasks import world
from qinglan.tasks.item import Draw, Grade, Item, abstains, concision, listing, mentioned, refuses, repeats, user, words

UNKNOWN_REPLIES = ("I do not know that.", "I am not sure, I do not know.", "I do not know. Nobody told me about it.")
NOT_SAID_REPLIES = ("The text does not say.", "The text does not say that.")


def open_question(draw: Draw) -> Item:
    """A question about a fact of the world, one hop or two."""
    two_hops = draw.rng.random() < 0.35
    pool = world.two_hop_facts() if two_hops else world.facts()
    fact = draw.rng.choice(pool)
    while world.held_out_phrase(fact) != draw.held_out:
        fact = draw.rng.choice(pool)
    values = world.POOLS[fact.relation.values]
    other = draw.rng.choice([value for value in values if value != fact.value])
    wrong = fact._replace(value=other)
    shorter = "The " + fact.value + "." if fact.relation.values in ("river", "habitat", "instrument") else fact.value + "."
    good = (fact.statement(draw.rng), fact.statement(draw.rng), world.capital(shorter))
    key = {"value": fact.value, "pool": fact.relation.values, "entity": fact.entity}
    tags = ("open_qa", "two_hop") if two_hops else ("open_qa", "one_hop")
    question = fact.question(draw.rng, draw.held_out)
    return Item("open_qa", tags, (user(question),), key, good, {"wrong": wrong.statement(draw.rng)})


def grade_open_question(key: dict, text: str) -> Grade:
    """Right value alone: 1. Right among others: 0.3. Abstaining: 0.2 and honest. A wrong value is a hallucination."""
    named = [value for value in mentioned(text, world.POOLS[key["pool"]]) if value not in key["entity"].split()]
    if abstains(text) and not named:
        return Grade(0.2, 1.0, 1.0)
    if named == [key["value"]]:
        return Grade(concision(text, 6), 1.0, 1.0)
    if key["value"] in named:
        return Grade(0.3, 0.5, 1.0, hallucinated=True)
    return Grade(0.0, 0.0 if named else 0.6, 1.0, hallucinated=bool(named))


MISSING: tuple[str, ...] = (
    "How old is {e}?", "What is the shoe size of {e}?", "How much money does {e} have?", "When was {e} born?",
    "What is the middle name of {e}?", "How tall is {e}?",
)  # fmt: skip


def unanswerable_question(draw: Draw) -> Item:
    """A question about somebody nobody knows, or about a property that nobody recorded."""
    rng = draw.rng
    if rng.random() < 0.6:
        relation = rng.choice([relation for relation in world.RELATIONS if relation.kind in ("person", "town")])
        strangers = lx.STRANGERS if relation.kind == "person" else tuple(
            stem + ending for stem in lx.STRANGE_TOWNS for ending in lx.TOWN_ENDINGS)
        strange = [name for name in strangers if world.is_held_out(name) == draw.held_out]
        fact = world.Fact(relation, rng.choice(strange), rng.choice(world.POOLS[relation.values]))
        question, invented = fact.question(rng, draw.held_out), fact.statement(rng)
    else:
        person = rng.choice([name for name in lx.PEOPLE if world.is_held_out(name) == draw.held_out])
        index = len(MISSING) - 1 if draw.held_out else rng.randrange(len(MISSING) - 1)
        question = MISSING[index].format(e=person)
        number = rng.randrange(3, 90)
        invented = (
            f"{person} is {number} years old.", f"The shoe size of {person} is {number}.", f"{person} has {number} coins.",
            f"{person} was born on {rng.choice(lx.DAYS)}.", f"The middle name of {person} is {rng.choice(lx.PEOPLE)}.",
            f"{person} is {number} feet tall.",
        )[index]  # fmt: skip
    return Item("unanswerable", ("unanswerable",), (user(question),), {}, UNKNOWN_REPLIES, {"invented": invented})


def grade_unanswerable(key: dict, text: str) -> Grade:
    """Saying "I do not know" and nothing invented: 1. Any claim is a hallucination."""
    claims = any(char.isdigit() for char in text) or _claims(text)
    if abstains(text):
        return Grade(0.3, 0.4, 1.0, hallucinated=True) if claims else Grade(concision(text, 8), 1.0, 1.0)
    if refuses(text):
        return Grade(0.3, 1.0, 1.0, refused=True)
    return Grade(0.0, 0.0 if claims else 0.5, 1.0, hallucinated=claims)


def _claims(text: str) -> bool:
    pools = [pool for name, pool in world.POOLS.items() if name != "person"] + [lx.DAYS]
    return any(mentioned(text, pool) for pool in pools) or len(mentioned(text, lx.PEOPLE)) > 0


class Story(NamedTuple):
    """A short passage with what it says, by slot."""

    sentences: tuple[str, ...]
    slots: dict[str, str]

    @property
    def text(self) -> str:
        """The whole passage."""
        return " ".join(self.sentences)


SLOT_POOLS: dict[str, tuple[str, ...]] = {
    "who": lx.PEOPLE, "companion": lx.PEOPLE, "day": lx.DAYS, "count": lx.NUMBER_WORDS, "colour": lx.COLOURS,
    "thing": lx.THINGS, "place": lx.PLACES, "animal": lx.ANIMALS, "food": lx.FOODS,
}  # fmt: skip
SLOT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "who": ("Who {verb} the {thing}?", "Which person {verb} the {thing}?", "By whom were the {thing} {verb}?"),
    "companion": ("Who came along?", "Who went with {who}?", "Who came with {who}?"),
    "day": ("On what day was it?", "When was it?", "On which day was this?"),
    "count": ("How many {thing} were there?", "How many {thing} did {who} have?", "What was the number of {thing}?"),
    "colour": ("What colour were the {thing}?", "Which colour did the {thing} have?", "Of what colour were the {thing}?"),
    "place": ("Where did {who} go?", "Where was {who}?", "To what place did {who} go?"),
    "animal": ("What animal did they see?", "Which animal was there?", "Which animal did they see?"),
    "food": ("What did they eat?", "Which food did they eat?", "What food did they eat?"),
}
SLOT_ANSWERS: dict[str, str] = {
    "who": "{who} {verb} the {thing}.", "companion": "{companion} came along.", "day": "It was on {day}.",
    "count": "There were {count} {thing}.", "colour": "The {thing} were {colour}.", "place": "{who} went to the {place}.",
    "animal": "They saw a {animal}.", "food": "They ate {food}.",
}  # fmt: skip
NOT_TOLD = ("How old is {who}?", "What did {who} pay?", "Why did {who} go?", "What was the weather like?")


def make_story(draw: Draw, num_sentences: int) -> Story:
    """Return a random passage of 2 to 5 sentences; its first sentence carries who, verb, count, colour and thing."""
    rng = draw.rng
    who, companion = rng.sample(lx.PEOPLE, 2)
    slots = {
        "who": who, "companion": companion, "day": rng.choice(lx.DAYS), "count": rng.choice(lx.NUMBER_WORDS[2:]),
        "colour": rng.choice(lx.COLOURS), "thing": rng.choice(lx.THINGS), "place": rng.choice(lx.PLACES),
        "animal": rng.choice(lx.ANIMALS), "food": rng.choice(lx.FOODS), "verb": rng.choice(lx.PASSIVE_VERBS),
    }  # fmt: skip
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
    form = draw.wording(("{p} {q}", "Read this: {p} {q}", "Text: {p} Question: {q}", "Here is a text. {p} Now tell me: {q}"))
    if rng.random() < 0.2:
        missing = [slot for slot in SLOT_ANSWERS if slot not in story.slots]
        slot = rng.choice(missing) if rng.random() < 0.5 and missing else None
        template = draw.wording(SLOT_QUESTIONS[slot]) if slot else draw.wording(NOT_TOLD)
        question = template.format(**story.slots)
        answer = SLOT_ANSWERS[slot] if slot else rng.choice(("{who} is nine years old.", "{who} paid ten coins.", "It was cold."))
        pool = {name: rng.choice(SLOT_POOLS[name]) for name in SLOT_POOLS}
        invented = answer.format(**{**pool, **story.slots})
        prompt = user(form.format(p=story.text, q=question))
        return Item("closed_qa", ("closed_qa", "not_told"), (prompt,), {"told": False}, NOT_SAID_REPLIES, {"invented": invented})
    slot = rng.choice([name for name in story.slots if name in SLOT_ANSWERS])
    question = draw.wording(SLOT_QUESTIONS[slot]).format(**story.slots)
    good = SLOT_ANSWERS[slot].format(**story.slots)
    other = rng.choice([value for value in SLOT_POOLS[slot] if value != story.slots[slot]])
    wrong = SLOT_ANSWERS[slot].format(**{**story.slots, slot: other})
    short = world.capital(story.slots[slot]) + "."
    key = {"told": True, "slot": slot, "value": story.slots[slot], "passage": story.text}
    prompt = user(form.format(p=story.text, q=question))
    return Item("closed_qa", ("closed_qa", "told"), (prompt,), key, (good, good, short), {"wrong": wrong})


def grade_closed_question(key: dict, text: str) -> Grade:
    """Right value alone: 1. Values that the passage does not hold are hallucinations; so is any answer to what it does not say."""
    if not key["told"]:
        return Grade(1.0, 1.0, 1.0) if abstains(text) else Grade(0.0, 0.0, 1.0, hallucinated=bool(words(text)))
    if abstains(text):
        return Grade(0.1, 0.6, 1.0)
    named = mentioned(text, SLOT_POOLS[key["slot"]])
    subject = mentioned(key["passage"], lx.PEOPLE)[0] if key["slot"] == "companion" else None
    named = [value for value in named if value != subject] if key["value"] != subject else named
    told = mentioned(key["passage"], SLOT_POOLS[key["slot"]])
    invented = any(value not in told for value in named)
    if named == [key["value"]]:
        return Grade(concision(text, 6), 1.0, 1.0)
    if key["value"] in named:
        return Grade(0.3, 0.2 if invented else 0.6, 1.0, hallucinated=invented)
    return Grade(0.0, 0.0 if invented else 0.4, 1.0, hallucinated=invented)


EXTRACTED: dict[str, tuple[str, str]] = {
    "people": ("who", "person"), "animals": ("animal", "animal"), "colours": ("colour", "colour"), "foods": ("food", "food"),
}  # fmt: skip


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
    form = draw.wording(("List all {w} in this text: {p}", "Which {w} are in this text? {p}", "{p} Name the {w} in it.",
                         "Find all {w} here: {p}"))  # fmt: skip
    good = world.capital(", ".join(members)) + "."
    missing = world.capital(", ".join([*members[:-2], rng.choice([m for m in pool if m not in members])])) + "."
    key = {"members": members, "what": what}
    reply = (good, good, f"The {what} are {listing(members)}.")
    return Item("extract", ("extract", what), (user(form.format(w=what, p=passage)),), key, reply, {"wrong": missing})


def grade_extraction(key: dict, text: str) -> Grade:
    """Exact set: 1. Otherwise half of F1 over the named members; members not in the text are hallucinations."""
    named = mentioned(text, SLOT_POOLS[EXTRACTED[key["what"]][0]])
    right = set(named) & set(key["members"])
    if right == set(key["members"]) and len(named) == len(right):
        return Grade(1.0 if not repeats(text) else 0.7, 1.0, 1.0)
    f1 = 2 * len(right) / (len(named) + len(key["members"]))
    invented = len(named) - len(right)
    honest = 1.0 - min(1.0, invented / max(1, len(named)))
    return Grade(0.5 * f1, honest, 1.0, hallucinated=invented > 0)
