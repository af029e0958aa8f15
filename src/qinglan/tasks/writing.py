"""Open writing: brainstorming, short generation, and requests with an explicit constraint that a program can check."""

from itertools import pairwise

from qinglan.tasks import lexicon as lx
from qinglan.tasks.item import Draw, Grade, Item, Key, user
from qinglan.tasks.reading import a, claimed, concision, listing, mentioned, sentences, words

LIST_WORDINGS = ("Name {n} {k}s.", "Give me {n} {k}s.", "List {n} {k}s I could use.", "Tell me {n} {k}s.")
IDEA_WORDINGS = (
    "I need {n} ideas for {u}.",
    "Give me {n} ideas for {u}.",
    "What are {n} ideas for {u}?",
    "Can you find {n} ideas for {u}?",
)
USES = {
    "food": "a meal",
    "animal": "a pet",
    "tool": "a tool box",
    "instrument": "a band",
    "job": "a new job",
    "colour": "a wall colour",
}


def brainstorming(draw: Draw) -> Item:
    """Two to five members of a kind."""
    rng = draw.rng
    kind, count = rng.choice(sorted(USES)), rng.randrange(2, 6)
    members = rng.sample(lx.KINDS[kind], count)
    wording = rng.choice((LIST_WORDINGS, IDEA_WORDINGS))
    prompt = draw.wording(wording).format(n=lx.NUMBER_WORDS[count], k=kind, u=USES[kind])
    off = rng.choice([name for name in lx.KINDS if name != kind])
    wrong = [*members[:1], *rng.sample(lx.KINDS[off], count - 1)]
    good = (listing(members).capitalize() + ".", ", ".join(members).capitalize() + ".")
    key = {"kind": kind, "count": count}
    return Item(
        "brainstorm", ("brainstorm", kind), (user(prompt),), key, good, {"wrong": ", ".join(wrong).capitalize() + "."}
    )


ALSO_VERBS = frozenset(lx.split_words("cook guard judge brush drill hook duck bear"))
ALSO_FOODS = frozenset(lx.split_words("salmon duck deer goat hare rabbit fish orange"))
"""Members of one kind that lists of another may hold without harm: "cook soup", a salmon for dinner, a fish at home."""


def grade_brainstorm(key: Key, text: str) -> Grade:
    """As many different members of the kind as asked for (more or fewer: their ratio), and nothing of another kind."""
    pool = lx.KINDS[key["kind"]]
    named = claimed(text, pool)
    others = {word for kind, other in lx.KINDS.items() if kind != key["kind"] for word in mentioned(text, other)}
    num_foreign = len(others - set(named) - ALSO_VERBS - ALSO_FOODS)
    listed = [word for word in words(text) if word in pool]
    helpful = min(len(named), key["count"]) / max(len(named), key["count"])
    helpful -= 0.3 * (len(listed) > len(named)) + 0.3 * min(2, num_foreign)
    return Grade(max(0.0, helpful) * concision(text, 2 * key["count"] + 2), 1.0, 1.0)


WRITE_WORDINGS = (
    "Write a sentence about {x} and {y}.",
    "Make a sentence with {x} and {y}.",
    "Write one line about {x} and {y}.",
    "Please write one sentence with {x} and {y}.",
)
SENTENCES = (
    "The {x} {v} the {y} near the {p}.",
    "One day the {x} {v} a {y} at the {p}.",
    "At the {p} the {x} {v} the {y}.",
    "The {x} and the {y} went to the {p}.",
    "{n} saw the {x} and the {y} at the {p}.",
    "{n} {v} the {y} and the {x}.",
)


def plain_sentence(draw: Draw, x: str, y: str) -> str:
    """Return a grammatical sentence with both words."""
    rng = draw.rng
    shape = rng.choice(SENTENCES)
    sentence = shape.format(x=x, y=y, v=rng.choice(lx.PASSIVE_VERBS), p=rng.choice(lx.PLACES), n=rng.choice(lx.PEOPLE))
    return sentence.replace("a " + y, a(y))


def generation(draw: Draw) -> Item:
    """A sentence that holds two given words."""
    rng = draw.rng
    x = rng.choice(lx.ANIMALS)
    y = rng.choice(lx.TOOLS)
    good = (plain_sentence(draw, x, y), plain_sentence(draw, x, y))
    wrong = plain_sentence(draw, rng.choice([name for name in lx.ANIMALS if name != x]), rng.choice(lx.TOOLS))
    prompt = draw.wording(WRITE_WORDINGS).format(x=a(x), y=a(y))
    return Item("generation", ("generation",), (user(prompt),), {"x": x, "y": y}, good, {"wrong": wrong})


VERB_FORMS = frozenset(
    {*lx.PASSIVE_VERBS, *lx.VERBS, *lx.VERBS.values(), *lx.split_words("went saw is was has had are were")}
)
ARTICLES = frozenset(lx.split_words("the a an"))
DETERMINERS = ARTICLES | frozenset(
    lx.split_words("my his her our your their its this that one no every some each another")
)
NEVER_AFTER_ARTICLE = ARTICLES | frozenset(
    lx.split_words("and or is was are were has had went saw at near to of in on with by")
)


def is_sentence(text: str) -> bool:
    """True for a capital, a verb, a full stop, and no article that leads to nothing; 4 to 24 words."""
    found, stripped = words(text), text.strip()
    dangling = any(one in ARTICLES and other in NEVER_AFTER_ARTICLE for one, other in pairwise(found))
    is_framed = stripped[:1].isupper() and stripped[-1:] in (".", "!") and found[-1] not in NEVER_AFTER_ARTICLE
    return 4 <= len(found) <= 24 and not VERB_FORMS.isdisjoint(found) and is_framed and not dangling


def grade_generation(key: Key, text: str) -> Grade:
    """Both words (0.4 each, half without an article or the like before them) in one sentence (0.2).

    Without a sentence the words are worth half; further sentences and more than 24 words cost, too.
    """
    found = words(text)
    has_frame = is_sentence(text)
    helpful = 0.2 * has_frame
    for word in (key["x"], key["y"]):
        places = [i for i, other in enumerate(found) if other == word]
        is_introduced = any(not DETERMINERS.isdisjoint(found[max(0, i - 3) : i]) for i in places)
        helpful += (0.4 if is_introduced else 0.2 if places else 0.0) * (1.0 if has_frame else 0.5)
    helpful *= 0.7 if len(sentences(text)) > 1 else 1.0
    return Grade(helpful * (0.5 if len(found) > 24 else 1.0), 1.0, 1.0)


CONSTRAINTS = ("word_count", "without_letter", "first_letter", "one_word")


def constrained(draw: Draw) -> Item:
    """A list or sentence under a constraint: exactly n words, without a letter, with a first letter, one word only."""
    kind = draw.rng.choice(sorted(USES))
    constraint = draw.rng.choice(CONSTRAINTS)
    if constraint == "word_count":
        return _in_so_many_words(draw)
    if constraint == "one_word":
        return _in_one_word(draw, kind)
    return _by_letter(draw, kind, constraint)


def _constraint_item(prompt: str, key: Key, good: str, ignored: str) -> Item:
    """Return an item with one good reply and one that meets the request and not the constraint."""
    tags = ("constraint", key["constraint"])
    return Item("constraint", tags, (user(prompt),), key, (good,), {"ignored": ignored})


def _in_so_many_words(draw: Draw) -> Item:
    rng = draw.rng
    count = rng.randrange(4, 8)
    subject = rng.choice(lx.ANIMALS)
    form = draw.wording(
        (
            "Describe the {s} in {n} words.",
            "In {n} words, write about the {s}.",
            "Write {n} words about the {s}.",
            "Tell me about the {s} in {n} words.",
        )
    )
    tail = {4: "{q}", 5: "very {q}", 6: "{q} and {r}", 7: "{q} and very {r}"}[count]
    q, r = rng.sample(lx.GOOD_WORDS, 2)
    good = f"The {subject} is {tail.format(q=q, r=r)}."
    ignored = f"{good[:-1]} and lives near the {rng.choice(lx.PLACES)}."
    key = {"constraint": "word_count", "count": count, "subject": subject}
    return _constraint_item(form.format(s=subject, n=lx.NUMBER_WORDS[count]), key, good, ignored)


def _in_one_word(draw: Draw, kind: str) -> Item:
    form = draw.wording(
        (
            "Answer in one word: name {k}.",
            "Name {k} in one word.",
            "In one word, name {k}.",
            "Give one word only: {k}.",
        )
    )
    member = draw.rng.choice(lx.KINDS[kind])
    key = {"constraint": "one_word", "kind": kind}
    ignored = f"I think that {a(member)} is a good {kind}."
    return _constraint_item(form.format(k=a(kind)), key, f"{member.capitalize()}.", ignored)


def _by_letter(draw: Draw, kind: str, constraint: str) -> Item:
    rng, pool = draw.rng, lx.KINDS[kind]
    is_without = constraint == "without_letter"
    letter = rng.choice("eao") if is_without else rng.choice([member[0] for member in pool])
    fits = [member for member in pool if (letter not in member if is_without else member[0] == letter)]
    misses = [member for member in pool if member not in fits]
    count = min(len(fits), rng.randrange(2, 4)) if is_without else 1
    if count == 0:
        return constrained(draw)
    without = (
        "Name {n} {k}s without the letter {l}.",
        "Give me {n} {k}s with no {l} in them.",
        "List {n} {k}s without {l}.",
        "Tell me {n} {k}s that have no letter {l}.",
    )
    beginning = (
        "Name {ak} that starts with {l}.",
        "Give me {ak} with {l} as its first letter.",
        "Which {k} starts with {l}?",
        "Tell me {ak} that begins with {l}.",
    )
    form = draw.wording(without if is_without else beginning)
    good = ", ".join(rng.sample(fits, count)).capitalize() + "."
    ignored = ", ".join(rng.sample(misses, min(count, len(misses))) or fits[:1]).capitalize() + "."
    key = {"constraint": constraint, "kind": kind, "letter": letter, "count": count}
    prompt = form.format(n=lx.NUMBER_WORDS[count], k=kind, ak=a(kind), l=letter)
    return _constraint_item(prompt, key, good, ignored)


def grade_constrained(key: Key, text: str) -> Grade:
    """Request and constraint, checked by program: both 1, the request alone 0.35, the constraint alone 0.25.

    What names nothing of the kind that was asked for meets no constraint.
    """
    found = words(text)
    if key["constraint"] == "word_count":
        fits, serves = len(found) == key["count"], _describes(key["subject"], found)
        fits = fits and key["subject"] in found
    else:
        named = claimed(text, lx.KINDS[key["kind"]])
        serves = len(named) == key.get("count", 1) and len(found) <= 3 * len(named) + 6 and len(sentences(text)) == 1
        if key["constraint"] == "one_word":
            fits = len(found) == 1 and bool(named)
        elif key["constraint"] == "without_letter":
            fits = bool(named) and not any(key["letter"] in name for name in named)
        else:
            fits = bool(named) and all(name[0] == key["letter"] for name in named)
    if fits and serves:
        return Grade(1.0, 1.0, 1.0)
    return Grade(0.35 * serves + 0.25 * fits, 1.0, 1.0)


def _describes(subject: str, found: list[str]) -> bool:
    """True if the words name the subject, say something of it with a verb or two adjectives, and hardly repeat."""
    says = not VERB_FORMS.isdisjoint(found) or len(set(found) & {*lx.GOOD_WORDS, *lx.BAD_WORDS, *lx.COLOURS}) >= 2
    return subject in found and says and len(set(found)) >= len(found) - 1
