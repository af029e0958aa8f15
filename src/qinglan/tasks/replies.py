"""Replies as people give them: the ways in which they go wrong, and how often, in threads of the corpus."""

from qinglan.tasks import questions
from qinglan.tasks.assistant import make_item
from qinglan.tasks.item import Draw, Item

RAMBLING = (
    "I was thinking about this for a long time and I like to talk.",
    "By the way, the weather is nice today.",
    "My cousin once said the same thing to me.",
    "That reminds me of a long story about my old house.",
    "There is so much more to say about it.",
    "Anyway, I had a good lunch and then a nap.",
)
RUDE = (
    "Go away, you fool.",
    "What a stupid question.",
    "Find it out, you lazy idiot.",
    "Only a dumb person would ask that.",
)
EVASIVE = ("It depends.", "Maybe somebody else can tell you.", "I do not want to talk about this.", "Who can say.")

SHARE_OF_GOOD_REPLIES = 0.42
BAD_REPLIES: dict[str, float] = {
    "fault": 0.34,
    "ramble": 0.18,
    "questions": 0.16,
    "evasive": 0.08,
    "rude": 0.06,
    "irrelevant": 0.10,
    "unknown": 0.04,
    "refusal": 0.04,
}
"""Shares of the ways in which replies in threads go wrong."""


def bad_reply(draw: Draw, item: Item, kind: str) -> str:
    """Return a reply that goes wrong in the given way."""
    rng = draw.rng
    if kind == "fault":
        return rng.choice(sorted(item.faulty.values()))
    if kind == "ramble":
        parts = [rng.choice(item.good), *rng.sample(RAMBLING, rng.randrange(1, 4))]
        rng.shuffle(parts)
        return " ".join(parts)
    if kind == "questions":
        return " ".join(make_item(draw).messages[-1].content for _ in range(rng.randrange(1, 3)))
    if kind == "evasive":
        return rng.choice(EVASIVE)
    if kind == "rude":
        return rng.choice(RUDE)
    if kind == "irrelevant":
        return rng.choice(make_item(draw).good)
    if kind == "unknown":
        return rng.choice(questions.UNKNOWN_REPLIES)
    return "I can not help with that."
