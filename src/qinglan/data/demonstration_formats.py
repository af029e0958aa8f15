"""Formats that hold demonstrations or bare prompts: one function from a row to what it holds.

TRL's columns are those of its `dataset_formats` page; Alpaca, Dolly and Self-Instruct are named after the data sets
that made their columns common. A demonstration is the last assistant turn; the turns before it are its prompt.
"""

from qinglan.core.records import Message
from qinglan.data.fields import (
    Parsed,
    completion_of,
    ending_with_user,
    label_text,
    list_of,
    make_demonstrated,
    make_prompt,
    mapping_of,
    messages_of,
    optional_text,
    prompt_turns,
    required,
    required_inside,
    text_of,
)
from qinglan.data.rows import Row


def instruction_turns(instruction: str, further: str) -> tuple[Message, ...]:
    """Return one user's turn: the instruction and, after an empty line, its input."""
    return (Message(role="user", content=f"{instruction}\n\n{further}" if further else instruction),)


def parse_conversation(row: Row) -> Parsed:
    """TRL `messages`, ShareGPT `conversations`: the last assistant turn is the demonstration; without it, a prompt."""
    field = "messages" if "messages" in row.fields else "conversations"
    turns = messages_of(required(row.fields, field), field)
    given_id = label_text(row.fields, "id")
    if not turns or turns[-1].role != "assistant":
        prompt = make_prompt(row, ending_with_user(turns, field))
        return Parsed(row.place, given_id, prompts=(prompt,))
    prompt = make_prompt(row, ending_with_user(turns[:-1], field))
    shown = make_demonstrated(row, prompt, turns[-1].content, given_id)
    return Parsed(row.place, given_id, (prompt,), (shown,))


def parse_prompt_completion(row: Row) -> Parsed:
    """TRL `prompt` + `completion` (or `response`): text or messages."""
    field = "completion" if "completion" in row.fields or "response" not in row.fields else "response"
    prompt = make_prompt(row, prompt_turns(required(row.fields, "prompt"), "prompt"))
    given_id = label_text(row.fields, "id")
    shown = make_demonstrated(row, prompt, completion_of(required(row.fields, field), field), given_id)
    return Parsed(row.place, given_id, (prompt,), (shown,))


def parse_instruction(row: Row) -> Parsed:
    """Alpaca (instruction, input?, output) and Dolly (instruction, context?, response, category?)."""
    field = "output" if "output" in row.fields or "response" not in row.fields else "response"
    instruction = text_of(required(row.fields, "instruction"), "instruction")
    further = optional_text(row.fields, "context" if field == "response" else "input")
    turns = instruction_turns(instruction, further)
    prompt = make_prompt(row, turns, tags=(label_text(row.fields, "category"),))
    text = completion_of(required(row.fields, field), field)
    return Parsed(row.place, None, (prompt,), (make_demonstrated(row, prompt, text),))


def parse_instances(row: Row) -> Parsed:
    """Self-Instruct: an instruction with instances [{input, output}], one demonstration each."""
    instruction = text_of(required(row.fields, "instruction"), "instruction")
    found = []
    for number, value in enumerate(
        list_of(required(row.fields, "instances"), "instances", "a list of {input, output}")
    ):
        field = f"instances[{number}]"
        instance = mapping_of(value, field, "an object {input, output}")
        prompt = make_prompt(row, instruction_turns(instruction, optional_text(instance, "input")))
        found.append(
            make_demonstrated(row, prompt, text_of(required_inside(instance, "output", field), f"{field}.output"))
        )
    return Parsed(row.place, None, tuple(shown.prompt for shown in found), tuple(found))


def parse_question_answer(row: Row) -> Parsed:
    """`question` + `answer`, as in GSM8K."""
    prompt = make_prompt(row, instruction_turns(text_of(required(row.fields, "question"), "question"), ""))
    answer = text_of(required(row.fields, "answer"), "answer")
    return Parsed(row.place, None, (prompt,), (make_demonstrated(row, prompt, answer),))


def parse_unpaired(row: Row) -> Parsed:
    """Thumbs (`prompt`/`messages` + `label`), unranked samples: the prompt only; a disliked text is not to imitate."""
    if "prompt" in row.fields:
        return Parsed(row.place, None, (make_prompt(row, prompt_turns(required(row.fields, "prompt"), "prompt")),))
    turns = messages_of(required(row.fields, "messages"), "messages")
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    return Parsed(row.place, None, (make_prompt(row, ending_with_user(turns, "messages")),))


def parse_prompt(row: Row) -> Parsed:
    """A bare `prompt` (text or messages), `instruction` (with `input`) or `question`."""
    given_id = label_text(row.fields, "id")
    for field in ("instruction", "question"):
        if field in row.fields and "prompt" not in row.fields:
            turns = instruction_turns(text_of(required(row.fields, field), field), optional_text(row.fields, "input"))
            break
    else:
        turns = prompt_turns(required(row.fields, "prompt"), "prompt")
    return Parsed(row.place, given_id, (make_prompt(row, turns, tags=(label_text(row.fields, "category"),)),))
