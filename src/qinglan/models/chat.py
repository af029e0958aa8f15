"""Conversations to token ids and back: the only module that touches a chat template.

A completion begins where the template's generation prompt ends, and it ends with the token that closes the assistant's
turn. That token is found in the template's own rendering, because it is often not the tokenizer's end-of-text token
(`<|im_end|>` against `<|endoftext|>`). Training, sampling and scoring all call the same two functions, so that prompt
ids followed by completion ids are what the template makes of the whole conversation (`check_round_trip`).

Departures from what templates do by themselves: control tokens inside a message are encoded as ordinary text, so that
nobody can forge a turn; hybrid reasoning models are rendered with thinking off; a template that prints today's date
gets a fixed one, as a run must not depend on the day it was started.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import Environment
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from qinglan.core.errors import InputError
from qinglan.core.files import hash_of
from qinglan.core.records import Message

TemplateName = Literal["own", "plain"]

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'User: ' ~ (message.content | trim) ~ '\\n\\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant: ' ~ (message.content | trim) ~ eos_token }}"
    "{{ '' if loop.last else '\\n\\n' }}"
    "{% else %}{{ (message.content | trim) ~ '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For models without a template: "User: ...", a blank line, "Assistant:", the completion, the end-of-text token."""

_FIXED_DATE = "{%- macro strftime_now(format) -%}01 January 2026{%- endmacro -%}"
_PROBE = Message(role="user", content="Which colour is the sky?")
_PROBE_COMPLETION = "Blue, by day."


class ChatFormat(NamedTuple):
    """How one tokenizer writes conversations."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    """Jinja source, as it is saved with a model."""
    probe_ids: tuple[int, ...]
    """Ids of a short prompt; a completion's ids are read off behind it."""
    end_id: int
    """Token that closes the assistant's turn; every completion that is taught ends with it."""
    end_ids: frozenset[int]
    """Tokens at which a sampler stops: `end_id` and the tokenizer's end-of-text token."""
    pad_id: int
    render_hash: str
    """Changes whenever template or tokenizer would render a conversation differently."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation up to exactly where the completion begins.

        Raises `InputError` where the template refuses the roles or their order.
        """
        return _render(self.tokenizer, self.template, messages, add_generation_prompt=True)

    def completion_ids(self, text: str) -> list[int]:
        """Return the ids of a completion as the template writes it, end token included; outer whitespace is dropped."""
        reply = Message(role="assistant", content=text.strip())
        ids = _render(self.tokenizer, self.template, (_PROBE, reply), add_generation_prompt=False)
        start = len(self.probe_ids)
        if tuple(ids[:start]) != self.probe_ids:
            # The text's first characters merged with the prompt's last ones. A sampler cannot write such a token, as
            # the prompt stands already, so the text is encoded by itself.
            alone = self.tokenizer.encode(reply.content, add_special_tokens=False, split_special_tokens=True)
            return [*alone, self.end_id]
        if self.end_id not in ids[start:]:
            return [*ids[start:], self.end_id]
        # Whatever follows the end token (a line break, in most templates) belongs to the next turn.
        last = len(ids) - 1 - ids[::-1].index(self.end_id)
        return ids[start : last + 1]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion's ids without end and other special tokens, outer whitespace dropped."""
        kept = [token for token in token_ids if token not in self.end_ids]
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text.strip()


def make_chat_format(tokenizer: PreTrainedTokenizerBase, template: TemplateName = "own") -> ChatFormat:
    """Return the chat format of a tokenizer, with its own chat template or the plain one.

    Raises:
        InputError: there is no template of its own; the template drops the completion, or closes the turn with no token
            while the tokenizer has no end-of-text token; a conversation does not begin with its own prompt.
    """
    # Nothing is cut, and lengths are checked where the model's context is known. Without this, transformers warns of
    # the first text that is longer than the tokenizer's own limit, through a call that takes no `verbose`.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    source = _plain_template(tokenizer) if template == "plain" else _own_template(tokenizer)
    probe_ids = _render(tokenizer, source, (_PROBE,), add_generation_prompt=True)
    end_id = _end_id(tokenizer, source, probe_ids)
    eos_id = tokenizer.eos_token_id
    chat = ChatFormat(
        tokenizer=tokenizer,
        template=source,
        probe_ids=tuple(probe_ids),
        end_id=end_id,
        end_ids=frozenset({end_id} if eos_id is None else {end_id, eos_id}),
        pad_id=end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        render_hash="",
    )
    seen = [source, probe_ids, chat.completion_ids(_PROBE_COMPLETION), sorted(chat.end_ids)]
    return chat._replace(render_hash=hash_of(seen))


def plain_prompt(messages: Sequence[Message]) -> str:
    """Return a conversation as plain text up to where the completion begins, for servers that are sent text."""
    template = Environment().from_string(PLAIN_TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=True, eos_token="")


def check_round_trip(chat: ChatFormat) -> None:
    """Check before a run that prompt ids and completion ids together are the template's own rendering.

    Raises `InputError` where they differ, where the completion's text is lost, or where its end token is missing.
    """
    reply = Message(role="assistant", content=_PROBE_COMPLETION)
    more = Message(role="user", content="And at night? 1 + 1 = 2, naïve <b>café</b>.")
    for messages in ((_PROBE,), (_PROBE, reply, more)):
        prompt = chat.prompt_ids(messages)
        completion = chat.completion_ids(_PROBE_COMPLETION)
        whole = _render(chat.tokenizer, chat.template, (*messages, reply), add_generation_prompt=False)
        taught = [*whole, chat.end_id] if chat.end_id not in whole[len(prompt) :] else whole
        if taught[: len(prompt) + len(completion)] != prompt + completion:
            raise InputError(
                "chat template: prompt and completion, rendered one after the other, are not the rendering of the "
                "whole conversation, so the model would be trained on other tokens than it sees later; "
                "add --template plain"
            )
        if chat.text_of(completion) != _PROBE_COMPLETION or completion[-1] != chat.end_id:
            raise InputError(
                f"chat template: the completion {_PROBE_COMPLETION!r} came back as {chat.text_of(completion)!r}; "
                "expected it unchanged and followed by the end token; add --template plain"
            )


def tokenizer_to_save(chat: ChatFormat) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the template that was in use, so that every tool renders as in training."""
    if chat.tokenizer.chat_template == chat.template:
        return chat.tokenizer
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = chat.template
    return tokenizer


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    source = _FIXED_DATE + template if "strftime_now" in template else template
    try:
        ids: Any = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
            sanitize_control_tokens=True,
            enable_thinking=False,
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message.role for message in messages)
        raise InputError(
            f"chat template: cannot render the turns {roles} ({error}); change the conversation or add --template plain"
        ) from error
    return list(ids)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path or 'tokenizer'}: has no chat template; expected one in chat_template.jinja or "
            "tokenizer_config.json; add --template plain to write conversations as plain text"
        )
    return tokenizer.get_chat_template()


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    name = tokenizer.name_or_path or "tokenizer"
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{name}: has no end-of-text token (eos_token), which --template plain needs to end a completion"
        )
    if tokenizer.encode(tokenizer.eos_token, add_special_tokens=False) != [tokenizer.eos_token_id]:
        raise InputError(
            f"{name}: does not encode its end-of-text token {tokenizer.eos_token!r} as one token; repair it"
        )
    with_special = tokenizer.encode("x", add_special_tokens=True)
    adds_bos = tokenizer.bos_token_id is not None and with_special[0] == tokenizer.bos_token_id
    return "{{ bos_token }}" + PLAIN_TEMPLATE if adds_bos else PLAIN_TEMPLATE


def _end_id(tokenizer: PreTrainedTokenizerBase, template: str, probe_ids: Sequence[int]) -> int:
    """Return the first control token behind the completion's text in the template's rendering, else end-of-text."""
    reply = Message(role="assistant", content=_PROBE_COMPLETION)
    whole = _render(tokenizer, template, (_PROBE, reply), add_generation_prompt=False)
    if _PROBE_COMPLETION not in str(tokenizer.decode(whole)):
        raise InputError(
            "chat template: drops the assistant's last message, so nothing could be taught; use a template that writes "
            "it, or add --template plain"
        )
    if whole[: len(probe_ids)] != list(probe_ids):
        raise InputError(
            "chat template: the rendering of a conversation does not begin with that of its prompt (some reasoning "
            "models' templates do this); use another template, or add --template plain"
        )
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    # Read from the right, up to the text's last token: a token before the text may be a control token as well.
    end_id: int | None = None
    for token in reversed(whole[len(probe_ids) :]):
        if token in control:
            end_id = token
        elif str(tokenizer.decode([token])).strip():
            break
    if end_id is None:
        end_id = tokenizer.eos_token_id
    if end_id is None:
        raise InputError(
            f"{tokenizer.name_or_path or 'tokenizer'}: neither the chat template nor the tokenizer has a token that "
            "ends a completion; set eos_token in the tokenizer"
        )
    return end_id
