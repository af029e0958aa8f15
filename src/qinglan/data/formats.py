"""The table of formats: by which columns each is known, what it holds, and the function that parses it.

A file's format is the one that most of its first rows fit; the first fitting line of the table wins, so that the more
specific formats stand above the more general. To add a format, write its parser and one line here.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from qinglan.core.errors import InputError, nearest
from qinglan.data import comparison_formats as comparisons
from qinglan.data import demonstration_formats as demonstrations
from qinglan.data.fields import Parsed
from qinglan.data.own_records import parse_records
from qinglan.data.rows import Row, RowError, RowProblem, one_line
from qinglan.data.trees import parse_trees

Kind = Literal["prompts", "demonstrations", "comparisons"]
MAX_LOOKED_AT = 100
LABELS = ("ranking", "ranks", "p_first_better")


class Format(NamedTuple):
    """One format: its name, its columns in words, what it holds, whether a row fits it, and its parser."""

    name: str
    columns: str
    kinds: tuple[Kind, ...]
    fits: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Sequence[Row], list[RowError], Counter[str]], Iterator[Parsed]]
    row_by_row: bool = True


def each(
    parse_row: Callable[[Row], Parsed],
) -> Callable[[Sequence[Row], list[RowError], Counter[str]], Iterator[Parsed]]:
    """Return a parser of many rows from a parser of one."""

    def parse(rows: Sequence[Row], problems: list[RowError], notes: Counter[str]) -> Iterator[Parsed]:
        for row in rows:
            try:
                yield parse_row(row)
            except RowProblem as problem:
                problems.append(problem.at(row.place))
            except ValidationError as error:
                finding = error.errors(include_url=False)[0]
                field = ".".join(str(part) for part in finding["loc"]) or "row"
                problems.append(
                    RowProblem(field, one_line(finding["msg"]), "content that a record can hold").at(row.place)
                )

    return parse


def has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return a test for rows with all these columns."""
    return lambda fields: all(name in fields for name in names)


def is_text(fields: Mapping[str, Any], name: str) -> bool:
    """Return whether a column is there and holds text."""
    return isinstance(fields.get(name), str)


def is_unpaired(fields: Mapping[str, Any]) -> bool:
    """Return whether a row has thumbs, labelled steps or samples that nobody ranked."""
    thumbs = "label" in fields and ("messages" in fields or ("prompt" in fields and "completion" in fields))
    return thumbs or ("prompt" in fields and "completions" in fields)


def is_own_record(fields: Mapping[str, Any]) -> bool:
    """Return whether a row is one of our records, or carries one as JSON text."""
    return has("id", "source", "producer_id", "prompt_group_id")(fields) or has("kind", "record")(fields)


def is_tree(fields: Mapping[str, Any]) -> bool:
    """Return whether a row is an OpenAssistant tree or one message of one."""
    return isinstance(fields.get("prompt"), dict) or has("message_id", "role", "text")(fields)


C: tuple[Kind, ...] = ("prompts", "comparisons")
D: tuple[Kind, ...] = ("prompts", "demonstrations")
ALL: tuple[Kind, ...] = ("prompts", "demonstrations", "comparisons")
FORMATS = (
    Format(
        "qinglan_records",
        "id, source, producer_id, prompt_group_id, ...",
        ALL,
        is_own_record,
        parse_records,
        row_by_row=False,
    ),
    Format("oasst_trees", "message_id, parent_id, role, text, rank", ALL, is_tree, parse_trees, row_by_row=False),
    Format(
        "summarize_feedback",
        "info, summaries, choice",
        C,
        has("info", "summaries", "choice"),
        each(comparisons.parse_summarize_feedback),
    ),
    Format(
        "alpaca_eval",
        "instruction, output_1, output_2, preference",
        C,
        has("instruction", "output_1", "output_2"),
        each(comparisons.parse_alpaca_eval),
    ),
    Format(
        "pandalm",
        "instruction, response1, response2, annotator1, ...",
        C,
        has("instruction", "response1", "response2", "annotator1"),
        each(comparisons.parse_pandalm),
    ),
    Format(
        "auto_j",
        "prompt, response 1, response 2, label",
        C,
        has("prompt", "response 1", "response 2"),
        each(comparisons.parse_auto_j),
    ),
    Format(
        "k_wise_rankings",
        "prompt, completions, ranking | ranks | p_first_better",
        C,
        lambda fields: has("prompt", "completions")(fields) and any(name in fields for name in LABELS),
        each(comparisons.parse_k_wise),
    ),
    Format(
        "sharegpt_preference",
        "conversations, chosen, rejected",
        C,
        has("conversations", "chosen", "rejected"),
        each(comparisons.parse_sharegpt_preference),
    ),
    Format(
        "trl_preference",
        "prompt, chosen, rejected",
        C,
        has("prompt", "chosen", "rejected"),
        each(comparisons.parse_trl_preference),
    ),
    Format(
        "hh_transcripts",
        "chosen, rejected (texts)",
        C,
        lambda fields: is_text(fields, "chosen") and is_text(fields, "rejected"),
        each(comparisons.parse_hh),
    ),
    Format(
        "trl_implicit_preference",
        "chosen, rejected (messages)",
        C,
        has("chosen", "rejected"),
        each(comparisons.parse_implicit_preference),
    ),
    Format(
        "unpaired",
        "prompt | messages with label, or prompt with unranked completions",
        ("prompts",),
        is_unpaired,
        each(demonstrations.parse_unpaired),
    ),
    Format("trl_messages", "messages", D, has("messages"), each(demonstrations.parse_conversation)),
    Format("sharegpt", "conversations", D, has("conversations"), each(demonstrations.parse_conversation)),
    Format(
        "trl_prompt_completion",
        "prompt, completion",
        D,
        has("prompt", "completion"),
        each(demonstrations.parse_prompt_completion),
    ),
    Format(
        "prompt_response",
        "prompt, response",
        D,
        has("prompt", "response"),
        each(demonstrations.parse_prompt_completion),
    ),
    Format(
        "self_instruct",
        "instruction, instances",
        D,
        has("instruction", "instances"),
        each(demonstrations.parse_instances),
    ),
    Format(
        "alpaca", "instruction, input, output", D, has("instruction", "output"), each(demonstrations.parse_instruction)
    ),
    Format(
        "dolly",
        "instruction, context, response, category",
        D,
        has("instruction", "response"),
        each(demonstrations.parse_instruction),
    ),
    Format(
        "question_answer", "question, answer", D, has("question", "answer"), each(demonstrations.parse_question_answer)
    ),
    Format(
        "prompts",
        "prompt | instruction | question",
        ("prompts",),
        lambda fields: any(name in fields for name in ("prompt", "instruction", "question")),
        each(demonstrations.parse_prompt),
    ),
)


def format_named(name: str) -> Format:
    """Return the format of this name. Raises `InputError` with the nearest valid one."""
    for one in FORMATS:
        if one.name == name:
            return one
    names = [one.name for one in FORMATS]
    raise InputError(f"format {name}: no such format{nearest(name, names)}; expected one of {', '.join(names)}")


def detect(rows: Sequence[Row], where: str) -> Format:
    """Return the format that most of the first `MAX_LOOKED_AT` rows fit. Raises `InputError` where none fits."""
    votes: Counter[str] = Counter()
    for row in rows[:MAX_LOOKED_AT]:
        fitting = next((one for one in FORMATS if one.fits(row.fields)), None)
        if fitting is not None:
            votes[fitting.name] += 1
    if votes:
        return format_named(votes.most_common(1)[0][0])
    columns = ", ".join(sorted(str(name) for name in rows[0].fields)) or "none"
    known = "; ".join(f"{one.name} ({one.columns})" for one in FORMATS)
    raise InputError(f"{where}: no known format has the columns {columns}; rename columns to fit one of: {known}")
