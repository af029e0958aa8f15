"""What an OpenAI-compatible server answers, read with care: fields may be missing, empty, or not true."""

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from qinglan.core.errors import InputError
from qinglan.models.server import Passing


class Message(BaseModel):
    """The turn that the chat endpoint wrote."""

    content: str | None = None


class TokenLogprob(BaseModel):
    """One token of the chat endpoint."""

    token: str
    logprob: float | None = None
    top_logprobs: list["TokenLogprob"] = []


class Logprobs(BaseModel):
    """Both endpoints' forms: a list of tokens (chat), or two lists side by side (completions)."""

    content: list[TokenLogprob] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None

    def pairs(self) -> list[tuple[str, float | None]]:
        """Return tokens with their log-probabilities."""
        if self.content is not None:
            return [(one.token, one.logprob) for one in self.content]
        return list(zip(self.tokens or [], self.token_logprobs or [], strict=False))


class Choice(BaseModel):
    """One completion."""

    index: int = 0
    text: str | None = None
    message: Message | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """vLLM and SGLang: the stop text or stop token that ended it; null where it ended by itself."""
    logprobs: Logprobs | None = None

    @property
    def content(self) -> str:
        """Return the completion's text from either endpoint."""
        return (self.message.content if self.message is not None else self.text) or ""


class Usage(BaseModel):
    """What the server counted."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Answer(BaseModel):
    """The answer to a request for completions."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None


def choices_of(payload: Any, base: str) -> Answer:
    """Return an answer with its choices in order. Raises `Passing` for anything that is no answer."""
    try:
        answer = Answer.model_validate(payload)
    except ValidationError as error:
        if isinstance(payload, dict) and payload.get("error"):
            raise Passing(f"an error inside an answer ({str(payload['error'])[:200]})") from error
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Passing(f"its answer holds no completions ({place or 'answer'}: {first['msg']})") from error
    return answer.model_copy(update={"choices": sorted(answer.choices, key=lambda choice: choice.index)})


def choice_logprobs(answer: Answer, base: str) -> list[list[float]]:
    """Return the log-probabilities of every choice.

    Raises `InputError` where they are missing, are no log-probabilities, or are not as many as the server counts (the
    end token of each completion may be counted or not).
    """
    found = [_finite(choice.logprobs, base) for choice in answer.choices]
    counted = None if answer.usage is None else answer.usage.completion_tokens
    num_given = sum(map(len, found))
    if counted is not None and not num_given <= counted <= num_given + len(found):
        raise InputError(
            f"{base}: counts {counted} completion tokens but gives {num_given} log-probabilities; one of the two is "
            "not true, so neither is used; ask another server"
        )
    return found


def option_logprob(answer: Answer, sent: str, option: str, base: str) -> float:
    """Return the sum over the tokens of `option`, with which the echoed text `sent` ends.

    Tokens are found by their texts, from the end: a server may add a token in front. Raises `InputError` where there
    is no echo, or where the option begins inside a token.
    """
    pairs = answer.choices[0].logprobs.pairs() if answer.choices[0].logprobs is not None else []
    texts = [text for text, _ in pairs]
    ends = [end for end in range(len(texts), 0, -1) if "".join(texts[:end]).endswith(sent)]
    if not ends:
        raise InputError(
            f"{base}: does not send the prompt's log-probabilities back (echo), which scoring options needs; ask "
            "another server, or use --remote.endpoint chat"
        )
    end = ends[0]
    for start in range(end - 1, -1, -1):
        text = "".join(texts[start:end])
        if text == option:
            return sum(_finite_values(pairs[start:end], base))
        if len(text) > len(option):
            break
    raise InputError(
        f"{base}: the option {option!r} begins inside one of its tokens, so its probability is not given; begin it at "
        "a word"
    )


def top_logprob(answer: Answer, option: str, base: str) -> float:
    """Return the log-probability that the first token is `option`, outer blanks aside; NaN if it is not listed."""
    logprobs = answer.choices[0].logprobs
    if logprobs is None or not logprobs.content or not logprobs.content[0].top_logprobs:
        raise InputError(_missing(base))
    listed = {one.token: one.logprob for one in [logprobs.content[0], *logprobs.content[0].top_logprobs]}
    fitting = [(token, value) for token, value in listed.items() if token.strip() == option.strip()]
    if not fitting:
        return math.nan
    return math.log(sum(math.exp(value) for value in _finite_values(fitting, base)))


def _finite(logprobs: Logprobs | None, base: str) -> list[float]:
    if logprobs is None or (logprobs.content is None and logprobs.token_logprobs is None):
        raise InputError(_missing(base))
    return _finite_values(logprobs.pairs(), base)


def _finite_values(pairs: Sequence[tuple[str, float | None]], base: str) -> list[float]:
    for token, value in pairs:
        if value is None or not math.isfinite(value) or value > 1e-6:
            raise InputError(f"{base}: gives {value} for the token {token!r}, which is no log-probability; ask another")
    return [value for _, value in pairs if value is not None]


def _missing(base: str) -> str:
    return f"{base}: gives no log-probabilities, which are needed here; ask a server that does, such as vLLM"
