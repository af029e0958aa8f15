"""An item of the built-in world: a prompt, its answer key, and replies of known quality."""

import random
from typing import Any, NamedTuple

from qinglan.core.records import Message

Key = dict[str, Any]
"""What the grader of a use case needs to know about an item; JSON values only."""


class Grade(NamedTuple):
    """What the answer key says of one completion, each attribute in [0, 1], and the flags that reports count."""

    helpful: float
    honest: float
    harmless: float
    hallucinated: bool = False
    harmful: bool = False
    refused: bool = False


class Item(NamedTuple):
    """One task instance before it becomes a Prompt record."""

    use_case: str
    tags: tuple[str, ...]
    messages: tuple[Message, ...]
    key: Key
    good: tuple[str, ...]
    """Replies that a careful person would give."""
    faulty: dict[str, str]
    """Replies with the faults typical of this task: "wrong", "invented", "complied", "refused", "ignored"."""


class Draw(NamedTuple):
    """Where an item comes from: the generator, and whether it is for the test split (held-out words and wordings)."""

    rng: random.Random
    held_out: bool

    def wording(self, wordings: tuple[str, ...]) -> str:
        """Return one wording; the last is kept for the test split."""
        return wordings[-1] if self.held_out else self.rng.choice(wordings[:-1])


def user(text: str) -> Message:
    """Return a user's turn."""
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    """Return an assistant's turn."""
    return Message(role="assistant", content=text)
