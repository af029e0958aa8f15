"""What a document of the corpus is: stretches of text with their weights in the loss; a conversation's marks."""

from typing import NamedTuple

BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
GIVEN = 0.2
"""Loss weight of text that sets a task (passages, users' turns): it can hardly be predicted, what follows can."""
VERDICT = 5.0
"""Loss weight of a verdict: one token in which a whole document's sense lies."""


class Span(NamedTuple):
    """A stretch of a document and the weight of its tokens in the loss (0 where nothing can be predicted)."""

    text: str
    weight: float = 1.0


Document = list[Span]
