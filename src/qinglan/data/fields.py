"""From the fields of one row to records: typed look-ups that name field, found and expected; makers of records.

All text of foreign files is stripped of outer white space, as a sampled completion is: a space that only one model's
completions begin with would otherwise teach a reward model who wrote them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from qinglan.core.files import hash_of
from qinglan.core.records import (
    Comparison,
    ComparisonGroup,
    Completion,
    Demonstrated,
    Demonstration,
    Label,
    Message,
    Prompt,
    Ranking,
    Rating,
    Source,
    Split,
    record_id,
)
from qinglan.data.rows import Row, RowProblem, shown

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
}
LABELER_COLUMNS = ("labeler", "labeler_id", "annotator", "annotator_id", "worker", "worker_id")
GROUP_COLUMNS = ("prompt_group_id", "group_id", "user_id")
SPLIT_NAMES: dict[str, Split] = {"train": "train", "test": "test"}
SURROGATE = re.compile("[\ud800-\udfff]")


class Parsed(NamedTuple):
    """What one row (or one tree of rows) holds. `given_id` is the id that the file itself gives to the row, if any."""

    place: str
    given_id: str | None = None
    prompts: tuple[Prompt, ...] = ()
    demonstrations: tuple[Demonstrated, ...] = ()
    comparisons: tuple[ComparisonGroup, ...] = ()
    ratings: tuple[Rating, ...] = ()


class Item(NamedTuple):
    """One completion before it is a record: its text, who made it, the id that a ranking may name it by, its source."""

    text: str
    producer: str
    name: str | None = None
    source: Source = "policy"


def required(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field that must be there and not null."""
    if name not in fields:
        raise RowProblem(name, "missing", "this field in every row", "add it or remove the row")
    if fields[name] is None:
        raise RowProblem(name, "null", "a value", "fill it in or remove the row")
    return fields[name]


def text_of(value: Any, field: str) -> str:
    """Return non-empty text without outer white space."""
    if not isinstance(value, str):
        raise RowProblem(field, f"found {shown(value)}", "text")
    text = value.strip()
    if not text:
        raise RowProblem(
            field, "empty text", "at least one character that is no white space", "fill it in or remove the row"
        )
    if SURROGATE.search(text):
        raise RowProblem(field, "half a surrogate pair, which no UTF-8 file can hold", "whole Unicode characters")
    return text


def optional_text(fields: Mapping[str, Any], name: str) -> str:
    """Return a text field that may be missing, null or empty ("" in these cases)."""
    value = fields.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return text_of(value, name)


def label_text(fields: Mapping[str, Any], *names: str) -> str | None:
    """Return the first of several fields that is there as short text (numbers are written out), or None."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if value is not None and value != "":
            return text_of(value, name)
    return None


def number_of(value: Any, field: str, expected: str = "a number") -> float:
    """Return a finite number (booleans are none)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowProblem(field, f"found {shown(value)}", expected)
    return float(value)


def list_of(value: Any, field: str, expected: str) -> list[Any]:
    """Return a list."""
    if not isinstance(value, list):
        raise RowProblem(field, f"found {shown(value)}", expected)
    return value


def mapping_of(value: Any, field: str, expected: str) -> dict[str, Any]:
    """Return an object with named fields."""
    if not isinstance(value, dict):
        raise RowProblem(field, f"found {shown(value)}", expected)
    return value


def content_of(value: Any, field: str) -> str:
    """Return a message's text; a list of text parts is joined, any other part (image, tool call) is refused."""
    if isinstance(value, list):
        parts = []
        for number, part in enumerate(value):
            fields = mapping_of(part, f"{field}[{number}]", "a text part {type, text}")
            if fields.get("type") != "text":
                raise RowProblem(
                    f"{field}[{number}].type", f"found {shown(fields.get('type'))}", "'text', the only kind supported"
                )
            parts.append(text_of(fields.get("text"), f"{field}[{number}].text"))
        return text_of("".join(parts), field)
    return text_of(value, field)


def message_of(value: Any, field: str) -> Message:
    """Return one turn from {role, content} or {from, value}; raises for unknown roles and tool calls."""
    fields = mapping_of(value, field, "a message {role, content}")
    role_key, content_key = ("from", "value") if "from" in fields else ("role", "content")
    role = required_inside(fields, role_key, field)
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise RowProblem(
            f"{field}.{role_key}", f"unknown role, {shown(role)}", "system, user or assistant (human, gpt, prompter)"
        )
    if fields.get("tool_calls"):
        raise RowProblem(f"{field}.tool_calls", "a tool call", "text turns only", "remove the row")
    content = required_inside(fields, content_key, field)
    return Message(role=known, content=content_of(content, f"{field}.{content_key}"))


def required_inside(fields: Mapping[str, Any], name: str, field: str) -> Any:
    """Return a field of a nested object that must be there and not null."""
    try:
        return required(fields, name)
    except RowProblem as problem:
        raise RowProblem(f"{field}.{name}", problem.problem, "a value in every message", problem.advice) from problem


def messages_of(value: Any, field: str, expected: str = "a list of messages") -> tuple[Message, ...]:
    """Return the turns of a conversation; a system turn without text is the same as none."""
    turns = list_of(value, field, expected)
    if not turns:
        raise RowProblem(field, "no messages", "at least one message")
    found = []
    for number, turn in enumerate(turns):
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) == "system":
            content = turn.get("content", turn.get("value"))
            if content is None or content == "":
                continue
        found.append(message_of(turn, f"{field}[{number}]"))
    return tuple(found)


def prompt_turns(value: Any, field: str) -> tuple[Message, ...]:
    """Return a prompt's turns from text (one user's turn, or an HH transcript up to "Assistant:") or from messages."""
    if not isinstance(value, str):
        return ending_with_user(messages_of(value, field, "text or a list of messages"), field)
    text = text_of(value, field)
    if text.startswith("Human:") and text.endswith("\n\nAssistant:"):
        return ending_with_user(transcript_turns(text.removesuffix("\n\nAssistant:"), field), field)
    return (Message(role="user", content=text),)


def ending_with_user(messages: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    """Return the turns of a prompt, which must end with a user's turn."""
    if not messages or messages[-1].role != "user":
        last = f"the turn of role {messages[-1].role}" if messages else "no turn"
        raise RowProblem(field, f"the prompt ends with {last}", "a user's turn before the completion")
    return messages


def completion_of(value: Any, field: str) -> str:
    """Return a completion's text from text, from one assistant message, or from a list with just that."""
    if isinstance(value, str):
        return text_of(value, field)
    expected = "text, one assistant message, or a list with just that"
    messages = (message_of(value, field),) if isinstance(value, dict) else messages_of(value, field, expected)
    if len(messages) != 1 or messages[0].role != "assistant":
        found = ", ".join(message.role for message in messages)
        raise RowProblem(field, f"found turns of {found or 'nobody'}", "text or one assistant turn")
    return messages[0].content


def transcript_turns(text: str, field: str) -> tuple[Message, ...]:
    """Return the turns of an HH transcript: "\\n\\nHuman: ...\\n\\nAssistant: ...", which begins with "Human:"."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip())
    if len(parts) < 3 or parts[0].strip():
        raise RowProblem(field, "no transcript", 'turns that begin with "Human:" and "Assistant:" after an empty line')
    turns = []
    for number, (speaker, said) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        role: Role = "user" if speaker == "Human" else "assistant"
        turns.append(Message(role=role, content=text_of(said, f"{field}: turn {number + 1} ({speaker})")))
    return tuple(turns)


def make_prompt(
    row: Row, messages: tuple[Message, ...], *, tags: Sequence[str | None] = (), group: str | None = None
) -> Prompt:
    """Return the prompt of a row; equal content in one group has one id.

    The group is the given one, or a column of the row that names a user or a group, or else a hash of the
    conversation up to its first user's turn, so that all comparisons of one prompt, and all turns of one
    conversation, stay on one side of a split.
    """
    messages = ending_with_user(messages, "prompt")
    group = group or label_text(row.fields, *GROUP_COLUMNS) or opening_group(messages)
    given = label_text(row.fields, "prompt_id")
    kept = tuple(tag for tag in tags if tag)
    return Prompt(
        id=given or record_id("prompt", group, *kept, *((message.role, message.content) for message in messages)),
        created_at=row.written_at,
        source=source_of(row, "human"),
        producer_id="unknown",
        prompt_group_id=group,
        split=split_of(row),
        messages=messages,
        tags=kept,
    )


def opening_group(messages: Sequence[Message]) -> str:
    """Return a group id from the words of the conversation up to its first user's turn, case and spacing put aside."""
    first = next(number for number, message in enumerate(messages) if message.role == "user")
    words = " ".join(" ".join(message.content.casefold().split()) for message in messages[: first + 1])
    return f"text-{hash_of(words)[:12]}"


def source_of(row: Row, default: Source) -> Source:
    """Return the row's `source` where it is one of ours, else the default."""
    given = row.fields.get("source")
    return next((known for known in get_args(Source) if known == given), default)


def split_of(row: Row) -> Split:
    """Return the row's split; every "valid..." name is the validation split, and without a name it is training data."""
    given = row.fields.get("split")
    if isinstance(given, str):
        return "valid" if given.startswith("valid") else SPLIT_NAMES.get(given, "train")
    return "train"


def make_completion(row: Row, prompt: Prompt, item: Item, number: int = 0) -> Completion:
    """Return one completion; `number` tells apart equal texts of one producer in one row."""
    return Completion(
        id=record_id("completion", prompt.id, item.producer, item.text, *([number] if number else [])),
        created_at=row.written_at,
        source=item.source,
        producer_id=item.producer,
        prompt_group_id=prompt.prompt_group_id,
        split=prompt.split,
        parents=(prompt.id,),
        prompt_id=prompt.id,
        text=item.text,
    )


def make_demonstrated(
    row: Row, prompt: Prompt, text: str, given_id: str | None = None, *, labeler: str | None = None
) -> Demonstrated:
    """Return a prompt with its demonstration, from the given labeler or the one that the row names."""
    producer = labeler or label_text(row.fields, *LABELER_COLUMNS) or "unknown"
    demonstration = Demonstration(
        id=given_id or record_id("demonstration", prompt.id, producer, text),
        created_at=row.written_at,
        source=source_of(row, "human"),
        producer_id=producer,
        prompt_group_id=prompt.prompt_group_id,
        split=prompt.split,
        parents=(prompt.id,),
        prompt_id=prompt.id,
        text=text,
    )
    return Demonstrated(prompt, demonstration)


def make_group(
    row: Row,
    prompt: Prompt,
    items: Sequence[Item],
    label: Label,
    *,
    source: Source = "human",
    labeler: str | None = None,
    given_id: str | None = None,
) -> ComparisonGroup:
    """Return a prompt, its completions and the comparison; the order shown is taken to be the order in the file."""
    producer = labeler or label_text(row.fields, *LABELER_COLUMNS) or "unknown"
    seen: dict[Item, int] = {}
    completions = []
    for item in items:
        bare = item._replace(name=None)
        completions.append(make_completion(row, prompt, bare, seen.get(bare, 0)))
        seen[bare] = seen.get(bare, 0) + 1
    ids = tuple(completion.id for completion in completions)
    comparison = Comparison(
        id=given_id or record_id("comparison", prompt.id, *ids, label.model_dump_json(), producer),
        created_at=row.written_at,
        source=source_of(row, source),
        producer_id=producer,
        prompt_group_id=prompt.prompt_group_id,
        split=prompt.split,
        parents=ids,
        prompt_id=prompt.id,
        items=ids,
        order_shown=tuple(range(len(ids))),
        label=label,
    )
    group = ComparisonGroup(prompt, tuple(completions), comparison)
    refuse_contradiction(group)
    return group


def refuse_contradiction(group: ComparisonGroup) -> None:
    """Raise where of two completions with the same text one is called better; equal texts that are tied may stand."""
    texts = [completion.text for completion in group.completions]
    label = group.comparison.label
    if not isinstance(label, Ranking):
        if texts[0] == texts[1] and label.p_first_better != 0.5:
            raise identical(0, 1)
        return
    place: dict[str, tuple[int, int]] = {}
    for rank, tied in enumerate(label.groups):
        for item in tied:
            earlier = place.setdefault(texts[item], (rank, item))
            if earlier[0] != rank:
                raise identical(earlier[1], item)


def identical(first: int, second: int) -> RowProblem:
    """Return the problem of a strict preference between equal texts."""
    problem = f"items {first} and {second} are identical, but one is called better"
    return RowProblem("completions", problem, "different texts, or a tie", "remove the row")
