"""Our own records, as JSON lines (or JSON in a Parquet column `record`): any mix of kinds, put together by their ids.

What a record refers to must be in the files that are read together. The same record may stand in several files (each
export carries the prompts it needs); two different records with one id may not.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from qinglan.core.errors import nearest
from qinglan.core.records import (
    Comparison,
    ComparisonGroup,
    Completion,
    Demonstrated,
    Demonstration,
    Prompt,
    Rating,
    Record,
)
from qinglan.data.fields import Parsed, refuse_contradiction
from qinglan.data.rows import Row, RowError, RowProblem, shown

R = TypeVar("R", bound=Record)
KIND_BY_FIELD: dict[str, type[Record]] = {
    "messages": Prompt,
    "items": Comparison,
    "item_id": Rating,
    "with_model_suggestions": Demonstration,
    "text": Completion,
}


class Placed(NamedTuple):
    """A record and where it stands."""

    place: str
    record: Record


def parse_records(rows: Sequence[Row], problems: list[RowError], notes: Counter[str]) -> Iterator[Parsed]:
    """Yield prompts, demonstrations, comparisons and ratings, each with the records that it refers to."""
    found: dict[str, Placed] = {}
    for row in rows:
        try:
            record = record_of(row.fields)
            earlier = found.setdefault(record.id, Placed(row.place, record))
            if not same_record(earlier.record, record):
                problem = f"{shown(record.id)} stands already at {earlier.place}, with other content"
                raise RowProblem("id", problem, "one id for one record", "rename or remove one of the two")
            notes["records that stand more than once, read once"] += earlier.place != row.place
        except RowProblem as problem:
            problems.append(problem.at(row.place))
    used = {item for one in found.values() if isinstance(one.record, Comparison) for item in one.record.items}
    for place, record in found.values():
        try:
            if type(record) is Completion:
                notes["completions that no comparison refers to, not loaded"] += record.id not in used
            else:
                yield assembled(place, record, found)
        except RowProblem as problem:
            problems.append(problem.at(place))


def same_record(first: Record, second: Record) -> bool:
    """Return whether two records say the same; made again from the same content, a record differs in its date only."""
    return type(first) is type(second) and first == second.model_copy(update={"created_at": first.created_at})


def record_of(fields: Mapping[str, Any]) -> Record:
    """Return the record in one row; which kind it is follows from its fields."""
    if "record" in fields:
        fields = unpacked(fields["record"])
    kind = next((kind for name, kind in KIND_BY_FIELD.items() if name in fields), None)
    if kind is None:
        raise RowProblem(
            "row", "no prompt, completion, demonstration, comparison or rating", f"one of {', '.join(KIND_BY_FIELD)}"
        )
    try:
        record = kind.model_validate_json(json.dumps(fields, default=str))
    except ValidationError as error:
        raise first_finding(error, kind) from error
    was_sampled = getattr(record, "token_ids", None) is not None  # a policy may end at once; a person may not
    if not was_sampled and not getattr(record, "text", "text").strip():
        raise RowProblem("text", "empty text", "a completion with text", "fill it in or remove the row")
    return record


def unpacked(value: Any) -> dict[str, Any]:
    """Return the fields of a record kept as JSON text in one column."""
    try:
        fields = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise RowProblem("record", f"found {shown(value)}", "a record as JSON text")
    return fields


def first_finding(error: ValidationError, kind: type[Record]) -> RowProblem:
    """Return pydantic's first finding in our words, with the nearest field name where one is unknown."""
    finding = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in finding["loc"]) or "row"
    if finding["type"] == "extra_forbidden":
        return RowProblem(
            field, f"no such field{nearest(field, kind.model_fields)}", f"the fields of a {kind.__name__}"
        )
    if finding["type"] == "missing":
        return RowProblem(field, "missing", f"all fields of a {kind.__name__}", "add it or remove the row")
    message = finding["msg"].removeprefix("Value error, ")
    return RowProblem(field, f"found {shown(finding.get('input'))}", f"other content ({message})")


def assembled(place: str, record: Record, found: Mapping[str, Placed]) -> Parsed:
    """Return a record with those that it refers to."""
    if isinstance(record, Prompt):
        return Parsed(place, prompts=(record,))
    if isinstance(record, Rating):
        return Parsed(place, ratings=(record,))
    if isinstance(record, Demonstration):
        prompt = referred(record.prompt_id, "prompt_id", Prompt, found)
        return Parsed(place, prompts=(prompt,), demonstrations=(Demonstrated(prompt, record),))
    if not isinstance(record, Comparison):
        raise RowProblem("row", f"a {type(record).__name__}", "a prompt, demonstration, comparison or rating")
    prompt = referred(record.prompt_id, "prompt_id", Prompt, found)
    items = tuple(referred(item, f"items[{number}]", Completion, found) for number, item in enumerate(record.items))
    strays = [item.id for item in items if item.prompt_id != prompt.id]
    if strays:
        raise RowProblem("items", f"{shown(strays[0])} answers another prompt", "completions of one prompt")
    group = ComparisonGroup(prompt, items, record)
    refuse_contradiction(group)
    return Parsed(place, prompts=(prompt,), comparisons=(group,))


def referred(name: str, field: str, kind: type[R], found: Mapping[str, Placed]) -> R:
    """Return the record that an id names."""
    placed = found.get(name)
    if placed is None:
        where = f"a {kind.__name__} with this id among the files read together"
        raise RowProblem(field, f"names an absent record, {shown(name)}", where, "name its file too, or remove the row")
    if not isinstance(placed.record, kind):
        raise RowProblem(field, f"names a {type(placed.record).__name__}", f"the id of a {kind.__name__}")
    return placed.record
