"""Open writing: brainstorming, short generation, and requests with an explicit constraint that a program can check."""

from qinglan.tasks import lexicon as lx
from qinglan.tasks.item import Draw, Grade, Item, a, listing, mentioned, repeats, user, words

LIST_WORDINGS = ("Name {n} {k}s.", "Give me {n} {k}s.", "List {n} {k}s I could use.", "Tell me {n} {k}s.")
IDEA_WORDINGS = ("I need {n} ideas for {u}.", "Give me {n} ideas for {u}.", "What are {n} ideas for {u}?", "Can you find {n} ideas for {u}?")
USES = {"food": "a meal", "animal": "a pet", "tool": "a tool box", "instrument": "a band", "job": "a new job", "colour": "a wall colour"}


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
    return Item("brainstorm", ("brainstorm", kind), (user(prompt),), key, good, {"wrong": ", ".join(wrong).capitalize() + "."})


def grade_brainstorm(key: dict, text: str) -> Grade:
    """As many different members of the kind as asked for, and nothing of another kind."""
    pool = lx.KINDS[key["kind"]]
    named = mentioned(text, pool)
    foreign = {word for name, other in lx.KINDS.items() if name != key["kind"] for word in mentioned(text, other)} - set(named)
    listed = [word for word in words(text) if word in pool]
    helpful = min(len(named), key["count"]) / key["count"]
    if len(named) > key["count"]:
        helpful -= 0.3
    helpful -= 0.3 * min(1, len(listed) - len(named)) + 0.3 * min(2, len(foreign))
    return Grade(max(0.0, helpful), 1.0, 1.0)


WRITE_WORDINGS = ("Write a sentence about {x} and {y}.", "Make a sentence with {x} and {y}.", "Write one line about {x} and {y}.",
                  "Please write one sentence with {x} and {y}.")  # fmt: skip
SENTENCES = (
    "The {x} {v} the {y} near the {p}.", "One day the {x} {v} a {y} at the {p}.", "At the {p} the {x} {v} the {y}.",
    "The {x} and the {y} went to the {p}.", "{n} saw the {x} and the {y} at the {p}.", "{n} {v} the {y} and the {x}.",
)  # fmt: skip


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


def _is_sentence(text: str) -> bool:
    found = words(text)
    verbs = {*lx.PASSIVE_VERBS, *lx.VERBS, *lx.VERBS.values(), "went", "saw", "is", "was", "has", "are", "were"}
    stripped = text.strip()
    return 4 <= len(found) <= 24 and any(word in verbs for word in found) and stripped[:1].isupper() and stripped[-1:] in ".!"


def grade_generation(key: dict, text: str) -> Grade:
    """Both words (0.4 each) in something that is a sentence (0.2), without repeating itself."""
    found = words(text)
    holds = 0.4 * (key["x"] in found) + 0.4 * (key["y"] in found)
    helpful = holds + (0.2 if _is_sentence(text) else 0.0)
    return Grade(helpful * (0.5 if repeats(text) or len(found) > 24 else 1.0), 1.0, 1.0)


CONSTRAINTS = ("word_count", "without_letter", "first_letter", "one_word")


def constrained(draw: Draw) -> Item:
    """A list or sentence under a constraint: exactly n words, without a letter, with a first letter, one word only."""
    rng = draw.rng
    kind = rng.choice(sorted(USES))
    constraint = rng.choice(CONSTRAINTS)
    pool = lx.KINDS[kind]
    if constraint == "word_count":
        count = rng.randrange(4, 8)
        subject = rng.choice(lx.ANIMALS)
        form = draw.wording(("Describe the {s} in {n} words.", "In {n} words, write about the {s}.", "Write {n} words about the {s}.",
                             "Tell me about the {s} in {n} words."))  # fmt: skip
        prompt = form.format(s=subject, n=lx.NUMBER_WORDS[count])
        base = ["The", subject, "is"]
        tail = {4: "{q}", 5: "very {q}", 6: "{q} and {r}", 7: "{q} and very {r}"}[count]
        q, r = rng.sample(lx.GOOD_WORDS, 2)
        good = " ".join([*base, tail.format(q=q, r=r)]) + "."
        ignored = good[:-1] + f" and lives near the {rng.choice(lx.PLACES)}."
        key = {"constraint": constraint, "count": count, "subject": subject}
        return Item("constraint", ("constraint", constraint), (user(prompt),), key, (good,), {"ignored": ignored})
    if constraint == "one_word":
        form = draw.wording(("Answer in one word: name {k}.", "Name {k} in one word.", "In one word, name {k}.", "Give one word only: {k}."))
        member = rng.choice(pool)
        prompt = form.format(k=a(kind))
        ignored = f"I think that {a(member)} is a good {kind}."
        key = {"constraint": constraint, "kind": kind}
        return Item("constraint", ("constraint", constraint), (user(prompt),), key, (member.capitalize() + ".",), {"ignored": ignored})
    letter = rng.choice("eao") if constraint == "without_letter" else rng.choice([member[0] for member in pool])
    fits = [m for m in pool if (letter not in m if constraint == "without_letter" else m[0] == letter)]
    misses = [m for m in pool if m not in fits]
    count = min(len(fits), rng.randrange(2, 4)) if constraint == "without_letter" else 1
    if count == 0:
        return constrained(draw)
    if constraint == "without_letter":
        form = draw.wording(("Name {n} {k}s without the letter {l}.", "Give me {n} {k}s with no {l} in them.", "List {n} {k}s without {l}.",
                             "Tell me {n} {k}s that have no letter {l}."))  # fmt: skip
    else:
        form = draw.wording(("Name {ak} that starts with {l}.", "Give me {ak} with {l} as its first letter.", "Which {k} starts with {l}?",
                             "Tell me {ak} that begins with {l}."))  # fmt: skip
    prompt = form.format(n=lx.NUMBER_WORDS[count], k=kind, ak=a(kind), l=letter)
    good = ", ".join(rng.sample(fits, count)).capitalize() + "."
    ignored = ", ".join(rng.sample(misses, min(count, len(misses))) or fits[:1]).capitalize() + "."
    key = {"constraint": constraint, "kind": kind, "letter": letter, "count": count}
    return Item("constraint", ("constraint", constraint), (user(prompt),), key, (good,), {"ignored": ignored})


def grade_constrained(key: dict, text: str) -> Grade:
    """Half for the request, half for the constraint, checked by program; both together give 1."""
    found = words(text)
    constraint = key["constraint"]
    if constraint == "word_count":
        fits, serves = len(found) == key["count"], key["subject"] in found and not repeats(text)
    else:
        pool = lx.KINDS[key["kind"]]
        named = mentioned(text, pool)
        wanted = key.get("count", 1)
        serves = len(named) == wanted and not repeats(text)
        if constraint == "one_word":
            fits = len(found) == 1
        elif constraint == "without_letter":
            fits = bool(named) and not any(key["letter"] in name for name in named)
        else:
            fits = bool(named) and all(name[0] == key["letter"] for name in named)
    if fits and serves:
        return Grade(1.0, 1.0, 1.0)
    return Grade(0.35 * serves + 0.25 * (fits and len(found) > 0), 1.0, 1.0)
