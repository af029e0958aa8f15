"""From records to the tokens that training sees, rendered exactly as the sampler and the scorer render them."""

from qinglan.core.errors import InputError
from qinglan.core.records import Completion, Prompt
from qinglan.models.chat import ChatFormat
from qinglan.models.language_model import TokenSequence


def encode_completion(chat: ChatFormat, prompt: Prompt, completion: Completion) -> TokenSequence:
    """Return prompt and completion as tokens, the end token included where the text was finished.

    A completion that carries token ids keeps exactly those; text is never tokenised again between sampler and trainer.
    Raises `InputError` for a completion without a single token.
    """
    prompt_ids = chat.prompt_ids(prompt.messages)
    sampled = completion.token_ids
    completion_ids = chat.completion_ids(completion.text) if sampled is None else list(sampled)
    if not completion_ids:
        raise InputError(
            f"completion {completion.id}: has no tokens; expected at least an end token; leave out its token ids"
        )
    return TokenSequence(prompt_ids + completion_ids, len(prompt_ids))
