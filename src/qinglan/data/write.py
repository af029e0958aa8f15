"""Files out: our records, TRL's columns and K-wise rankings, as JSON lines or Parquet by the name's ending.

Our own records keep everything. The exchange formats keep what their columns can say, beside `id`, `prompt_group_id`,
`split`, `source` and `labeler`, so that an export reads back as the same judgements. TRL knows pairs only: a ranking
becomes one row for each pair that it decides, and tied or unranked pairs are left out and counted.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow
from pyarrow import parquet

from qinglan.core.errors import InputError
from qinglan.core.files import write_atomic, write_jsonl
from qinglan.core.records import (
    ComparisonGroup,
    Demonstrated,
    Message,
    PreferenceProbability,
    Prompt,
    Record,
    pairs_of,
)
from qinglan.data.own_records import same_record

DemonstrationStyle = Literal["records", "trl", "messages"]
ComparisonStyle = Literal["records", "k_wise", "trl"]
Columns = dict[str, Any]


class Written(NamedTuple):
    """How many rows were written, and how many pairs the format has no place for."""

    num_rows: int
    num_left_out: int = 0


def write_prompts(path: Path | str, prompts: Sequence[Prompt], style: Literal["records", "trl"] = "records") -> Written:
    """Write prompts as our records, or with TRL's column `prompt` (messages). Raises `InputError`."""
    if style == "records":
        return write_records(path, prompts)
    return write_rows(path, [{**shared(one), "id": one.id, "prompt": chat(one.messages)} for one in prompts])


def write_demonstrations(
    path: Path | str, demonstrations: Sequence[Demonstrated], style: DemonstrationStyle = "records"
) -> Written:
    """Write demonstrations as our records, as TRL's `prompt` + `completion`, or as `messages`. Raises `InputError`."""
    if style == "records":
        return write_records(path, (record for one in demonstrations for record in one))
    rows = []
    for prompt, demonstration in demonstrations:
        answer = [{"role": "assistant", "content": demonstration.text}]
        turns = chat(prompt.messages)
        said: Columns = {"messages": turns + answer} if style == "messages" else {"prompt": turns, "completion": answer}
        labeler = demonstration.producer_id
        rows.append({**shared(demonstration), "id": demonstration.id, "labeler": labeler, **said})
    return write_rows(path, rows)


def write_comparisons(
    path: Path | str, groups: Sequence[ComparisonGroup], style: ComparisonStyle = "records"
) -> Written:
    """Write comparisons as our records, as K-wise rankings, or as TRL's `prompt` + `chosen` + `rejected`.

    Raises `InputError`, also for a style that leaves no row to write.
    """
    if style == "records":
        return write_records(path, records_of(groups))
    if style == "k_wise":
        return write_rows(path, [k_wise_row(group) for group in groups])
    rows, left_out = [], 0
    for group in groups:
        decided = list(trl_rows(group))
        count = len(group.completions)
        left_out += count * (count - 1) // 2 - len(decided)
        rows += decided
    return write_rows(path, rows)._replace(num_left_out=left_out)


def records_of(groups: Iterable[ComparisonGroup]) -> Iterator[Record]:
    """Yield the prompt, the completions and the comparison of each group."""
    for group in groups:
        yield group.prompt
        yield from group.completions
        yield group.comparison


def write_records(path: Path | str, records: Iterable[Record]) -> Written:
    """Write our records, each once; in Parquet as a JSON column `record` beside columns to filter by."""
    path = Path(path)
    distinct: dict[str, Record] = {}
    for record in records:
        if not same_record(distinct.setdefault(record.id, record), record):
            raise InputError(f"{path}: two different records have the id {record.id}; give each its own id")
    if path.suffix == ".parquet":
        return write_rows(path, [packed(record) for record in distinct.values()])
    check_name(path)
    write_jsonl(path, distinct.values())
    return Written(len(distinct))


def packed(record: Record) -> Columns:
    """Return a record as one Parquet row."""
    kind = type(record).__name__.lower()
    return {"kind": kind, **shared(record), "record": json.dumps(record.model_dump(mode="json"), ensure_ascii=False)}


def shared(record: Record) -> Columns:
    """Return the columns that every exchange row carries."""
    return {"prompt_group_id": record.prompt_group_id, "split": record.split, "source": record.source}


def chat(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return turns as lists of {role, content}."""
    return [{"role": message.role, "content": message.content} for message in messages]


def judged_columns(group: ComparisonGroup) -> Columns:
    """Return the columns that say who compared which prompt."""
    comparison = group.comparison
    return {**shared(comparison), "labeler": comparison.producer_id, "prompt": chat(group.prompt.messages)}


def k_wise_row(group: ComparisonGroup) -> Columns:
    """Return `prompt`, `completions`, and `ranking` (lists of tied items, best first) or `p_first_better`."""
    label = group.comparison.label
    return {
        "id": group.comparison.id,
        **judged_columns(group),
        "completions": [{"text": one.text, "model": one.producer_id} for one in group.completions],
        "ranking": None if isinstance(label, PreferenceProbability) else [list(tied) for tied in label.groups],
        "p_first_better": label.p_first_better if isinstance(label, PreferenceProbability) else None,
    }


def trl_rows(group: ComparisonGroup) -> Iterator[Columns]:
    """Yield a row for each decided pair; `p_chosen` keeps a soft label, and is null for a hard one."""
    label = group.comparison.label
    pairs = pairs_of(label)
    for number, (first, second, p_first_better) in enumerate(pairs):
        if p_first_better == 0.5:
            continue
        better, worse = (first, second) if p_first_better > 0.5 else (second, first)
        chosen, rejected = group.completions[better], group.completions[worse]
        yield {
            "id": group.comparison.id if len(pairs) == 1 else f"{group.comparison.id}-pair-{number + 1}",
            **judged_columns(group),
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
            "chosen_model": chosen.producer_id,
            "rejected_model": rejected.producer_id,
            "p_chosen": max(p_first_better, 1.0 - p_first_better) if isinstance(label, PreferenceProbability) else None,
        }


def write_rows(path: Path | str, rows: Sequence[Columns]) -> Written:
    """Write rows as JSON lines or Parquet, whole or not at all."""
    path = Path(path)
    check_name(path)
    if not rows:
        raise InputError(f"{path}: nothing to write; expected at least one row; choose another format or other records")
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(list(rows))
        write_atomic(path, lambda part: parquet.write_table(table, part))
    else:
        write_jsonl(path, rows)
    return Written(len(rows))


def check_name(path: Path) -> None:
    """Raise `InputError` for a file name that says no format we write."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{path}: unknown kind of file; expected a name that ends with .jsonl or .parquet")
