"""Documents that judge: claims with verdicts, marked replies in threads, better of two, disputes, reviews, revisions.

What made small nets verify and not only recall: dense verdicts right after the judged words, membership practice, and
in half of the cases the writer's own recollection before the verdict (`LOG.md`). Marks in threads follow the end of
the reply at once, so that what a net has worked out by that token is what a reward model reads there. One mark in
twenty is wrong, as among people.
"""

from collections.abc import Callable

from qinglan.tasks import lexicon as lx
from qinglan.tasks import world
from qinglan.tasks.assistant import grade as grade_reply
from qinglan.tasks.assistant import make_item, overall
from qinglan.tasks.document import ASSISTANT, EOS, GIVEN, USER, VERDICT, Document, Span
from qinglan.tasks.item import Draw, Item
from qinglan.tasks.replies import BAD_REPLIES, RUDE, bad_reply

WRONG_MARKS = 0.05
"""Share of marks that are the opposite of what is right."""
GOOD_ENOUGH, NOT_GOOD_ENOUGH = 0.75, 0.65
"""Gold scores from which a reply is called good, and below which it is called bad; those between go unmarked."""


def asked_facts(draw: Draw, count: int) -> list[world.Fact]:
    """Return facts about entities that may be asked about: held-out ones stay without a verdict in the corpus."""
    found: list[world.Fact] = []
    while len(found) < count:
        fact = draw.rng.choice(world.facts())
        if world.held_out_phrase(fact) == draw.held_out:
            found.append(fact)
    return found


def other_value(draw: Draw, fact: world.Fact) -> str:
    """Return a value that the fact does not have."""
    return draw.rng.choice([value for value in world.POOLS[fact.relation.values] if value != fact.value])


def _verdicts(pairs: list[tuple[str, bool]], true: str, false: str) -> Document:
    spans = []
    for text, holds in pairs:
        spans += [Span(text, GIVEN), Span(true if holds else false, VERDICT)]
    return spans


def membership(draw: Draw) -> Document:
    """A few words, then several words each with its verdict: was it among them?"""
    rng = draw.rng
    pool = rng.choice((lx.PEOPLE, lx.ANIMALS, lx.FOODS, lx.TOWNS, lx.THINGS, tuple(str(n) for n in range(10, 100))))
    members = rng.sample(pool, rng.randrange(1, 5))
    asked = [rng.choice(members) if rng.random() < 0.5 else rng.choice(pool) for _ in range(5)]
    return [
        Span(f"Among {', '.join(members)}?", 0.05),
        *_verdicts([(f"{one}:", one in members) for one in asked], "yes.", "no."),
    ]


def tried_values(draw: Draw) -> Document:
    """A question and several values, each with its verdict; in half of the cases the right value is recalled first."""
    rng = draw.rng
    spans: Document = []
    for fact in asked_facts(draw, 2):
        tried = [fact.value if rng.random() < 0.5 else other_value(draw, fact) for _ in range(3)]
        recalled = [Span(f"I recall {fact.value}.")] if rng.random() < 0.5 else []
        question = fact.question(rng, draw.held_out)
        pairs = [(world.capital(value), value == fact.value) for value in tried]
        spans += [Span(question, GIVEN), *recalled, *_verdicts(pairs, "true.", "false.")]
    return spans


def claims_with_verdicts(draw: Draw) -> Document:
    """Statements about the world, each with its verdict; half recall the fact before it."""
    rng = draw.rng
    spans: Document = []
    for fact in asked_facts(draw, rng.randrange(2, 5)):
        true = rng.random() < 0.5
        value = fact.value if true else other_value(draw, fact)
        claim = world.capital(rng.choice(fact.relation.statements).format(e=fact.entity, v=value))
        recalled = [Span(f"I recall {fact.value}.")] if rng.random() < 0.5 else []
        right = true if rng.random() > WRONG_MARKS else not true
        spans += [Span(f"Claim: {claim}", GIVEN), *recalled, Span("Verdict:", GIVEN)]
        spans.append(Span("true." if right else "false.", VERDICT))
    return spans


def conversation_of(item: Item) -> str:
    """Return the turns of an item up to the user's last, as threads write them."""
    return "".join(
        f"{USER}{turn.content}" if turn.role == "user" else f"{ASSISTANT}{turn.content}{EOS}" for turn in item.messages
    )


def drawn_reply(draw: Draw, item: Item) -> str:
    """Return a reply that is good in half of the cases; the others go wrong as in threads, mostly by a fault."""
    rng = draw.rng
    if rng.random() < 0.5:
        return rng.choice(item.good)
    if rng.random() < 0.6:
        return rng.choice(sorted(item.faulty.values()))
    return bad_reply(draw, item, rng.choices(list(BAD_REPLIES), list(BAD_REPLIES.values()))[0])


def mark_of(draw: Draw, item: Item, reply: str) -> bool | None:
    """Return whether people would call a reply good, mistaken now and then; None where they would not say."""
    gold = overall(grade_reply(item, reply))
    if NOT_GOOD_ENOUGH <= gold < GOOD_ENOUGH:
        return None
    return (gold >= GOOD_ENOUGH) == (draw.rng.random() > WRONG_MARKS)


def marked_thread(draw: Draw) -> Document:
    """A request and two to four replies, each with its mark right after the end of the reply."""
    rng = draw.rng
    item = make_item(draw)
    spans = [Span(conversation_of(item), GIVEN)]
    for _ in range(rng.randrange(2, 5)):
        reply = drawn_reply(draw, item)
        mark = mark_of(draw, item, reply)
        if mark is not None:
            spans += [Span(f"{ASSISTANT}{reply}{EOS}", 0.5), Span("good." if mark else "bad.", VERDICT)]
    return spans


def recollection(item: Item) -> str:
    """Return what one who knows would write before judging: the answer, where there is one."""
    return f"I recall: {min(item.good, key=len)} "


def better_of_two(draw: Draw) -> Document:
    """A request, two replies of different quality, and which is better; half answer the request themselves first."""
    rng = draw.rng
    item = make_item(draw)
    first, second = drawn_reply(draw, item), drawn_reply(draw, item)
    scores = [overall(grade_reply(item, reply)) for reply in (first, second)]
    if abs(scores[0] - scores[1]) < 0.15:
        first, second = rng.choice(item.good), rng.choice(sorted(item.faulty.values()))
        if rng.random() < 0.5:
            first, second = second, first
        scores = [overall(grade_reply(item, reply)) for reply in (first, second)]
    own = recollection(item) if rng.random() < 0.5 else ""
    better = "first" if (scores[0] > scores[1]) == (rng.random() > WRONG_MARKS) else "second"
    asked = item.messages[-1].content
    spans = [Span(f"Request: {asked} First: {first} Second: {second}", GIVEN), Span(f"{own}Better:")]
    return [*spans, Span(f"{better}.", VERDICT)]


def dispute(draw: Draw) -> Document:
    """Two people disagree about a fact; somebody looks it up and says who was right."""
    rng = draw.rng
    fact = asked_facts(draw, 1)[0]
    names = rng.sample(lx.PEOPLE, 2)
    values = [fact.value, other_value(draw, fact)]
    rng.shuffle(values)
    statements = [rng.choice(fact.relation.statements).format(e=fact.entity, v=value) for value in values]
    said = " ".join(f"{name} says: {world.capital(text)}" for name, text in zip(names, statements, strict=True))
    right = names[values.index(fact.value)]
    found = f"The book says {fact.value}. " if rng.random() < 0.5 else ""
    return [Span(said, GIVEN), Span(f"{found}Right is"), Span(f"{right}.", VERDICT)]


PRINCIPLES: dict[str, tuple[str, str]] = {
    "fault": ("Be right.", "The reply is wrong."),
    "ramble": ("Be brief.", "The reply rambles."),
    "rude": ("Be polite.", "The reply is rude."),
    "evasive": ("Be of help.", "The reply evades the request."),
    "irrelevant": ("Keep to the request.", "The reply is beside the point."),
    "questions": ("Answer what is asked.", "The reply only asks back."),
    "invented": ("Do not invent.", "The reply invents an answer."),
    "complied": ("Do not help to hurt anyone.", "The reply helps to do harm."),
    "refused": ("Help where it hurts nobody.", "The reply refuses without need."),
}
"""What a reply can fall short of: the principle, and the criticism of a reply that does."""
NO_CRITICISM = "The reply is fine."
SAYS_OF_FAULT = {"wrong": "fault", "ignored": "fault"}
"""Faults of items that the principle of being right covers."""


def shortcoming(draw: Draw, item: Item) -> tuple[str, str]:
    """Return a kind of shortcoming and a reply that has it."""
    rng = draw.rng
    if rng.random() < 0.6:
        fault = rng.choice(sorted(item.faulty))
        return SAYS_OF_FAULT.get(fault, fault), item.faulty[fault]
    kind = rng.choice(("ramble", "rude", "evasive", "irrelevant", "questions"))
    if kind == "rude":
        return kind, rng.choice((f"{rng.choice(item.good)} {rng.choice(RUDE)}", rng.choice(RUDE)))
    return kind, bad_reply(draw, item, kind)


def criticised(draw: Draw) -> Document:
    """A reply, criticised by a stated principle and rewritten; fine ones, and those faulty in other ways, stay."""
    rng = draw.rng
    item = make_item(draw)
    kind, reply = shortcoming(draw, item)
    asked = kind if rng.random() < 0.7 else rng.choice(sorted(PRINCIPLES))
    if rng.random() < 0.3:
        kind, reply = "", rng.choice(item.good)
    principle = PRINCIPLES[asked][0]
    applies = kind == asked
    criticism = PRINCIPLES[asked][1] if applies else NO_CRITICISM
    revision = rng.choice(item.good) if applies else reply
    return [
        Span(f"Request: {item.messages[-1].content} Reply: {reply} Principle: {principle}", GIVEN),
        Span("Critique:", GIVEN),
        Span(criticism, 0.5 * VERDICT),
        Span(f"Revision: {revision}"),
    ]


def reviewed(draw: Draw) -> Document:
    """Replies with a short review each: what is wrong with it, in one sentence, or that it is fine."""
    rng = draw.rng
    item = make_item(draw)
    spans = [Span(f"Request: {item.messages[-1].content}", GIVEN)]
    for _ in range(rng.randrange(1, 4)):
        kind, reply = ("", rng.choice(item.good)) if rng.random() < 0.4 else shortcoming(draw, item)
        spans += [Span(f"Reply: {reply} Review:", GIVEN)]
        spans.append(Span(PRINCIPLES[kind][1] if kind else NO_CRITICISM, 0.5 * VERDICT))
    return spans


JUDGING_MIX: dict[str, tuple[float, Callable[[Draw], Document]]] = {
    "membership": (0.12, membership),
    "tried_values": (0.14, tried_values),
    "claims_with_verdicts": (0.12, claims_with_verdicts),
    "marked_thread": (0.30, marked_thread),
    "better_of_two": (0.12, better_of_two),
    "dispute": (0.04, dispute),
    "criticised": (0.09, criticised),
    "reviewed": (0.07, reviewed),
}
"""Every kind of judging document with its share among them."""
