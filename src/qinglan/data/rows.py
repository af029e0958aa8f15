"""Rows out of files: JSON lines, JSON arrays, Parquet and CSV (all but Parquet also as `.gz`), each with its place.

A row that cannot be read becomes a `RowError` and the next one is read; a file that is damaged as a whole (cut off,
not UTF-8, no Parquet) raises `InputError`, because what follows the damage is lost and no choice of the user brings
it back.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from pyarrow import parquet

from qinglan.core.errors import InputError

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
MAX_SHOWN_CHARACTERS = 60
WHITESPACE = re.compile(r"[ \t\r\n]*")
# CSV has text only: cells of these columns are read as JSON where they are JSON, all others stay text.
JSON_COLUMNS = frozenset(
    {"messages", "completions", "ranking", "ranks", "conversations", "info", "summaries", "instances", "choice", "rank"}
    | {"preference", "p_first_better", "p_chosen", "label", "deleted", "review_result", "replies"}
    | {"annotator1", "annotator2", "annotator3"}
)
MESSAGE_COLUMNS = frozenset({"prompt", "completion", "chosen", "rejected"})


class Row(NamedTuple):
    """One object of a file: its place ("file:line", or "file:row n" in Parquet), its fields, and the file's date."""

    place: str
    fields: dict[str, Any]
    written_at: datetime


class RowError(NamedTuple):
    """Why one row cannot be used: where, which field, what is there, what was expected, what to do."""

    place: str
    field: str
    problem: str
    expected: str
    advice: str

    def line(self) -> str:
        """Return the finding as one line."""
        return f"{self.place}: {self.field}: {self.problem}; expected {self.expected}; {self.advice}"


class RowProblem(ValueError):
    """Raised by parsers inside `data/`; the loader adds the place and makes it a `RowError`."""

    def __init__(self, field: str, problem: str, expected: str, advice: str = "repair or remove the row") -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem, self.expected, self.advice = field, problem, expected, advice

    def at(self, place: str) -> RowError:
        """Return the problem with its place."""
        return RowError(place, self.field, self.problem, self.expected, self.advice)


class FileList(NamedTuple):
    """Files to read, in order, and those of a folder that are left out because their suffix is none of ours."""

    files: tuple[Path, ...]
    ignored: tuple[Path, ...]


def list_files(path: Path | str | Sequence[Path | str]) -> FileList:
    """Return the data files named by a file, a folder (searched in depth, sorted) or a list of both.

    Raises `InputError` for a path that is not there, a file of unknown suffix and a folder without data files.
    """
    given = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    if not given:
        raise InputError("no file given; expected at least one data file or folder")
    files: list[Path] = []
    ignored: list[Path] = []
    for one in given:
        if one.is_dir():
            inside = [file for file in sorted(one.rglob("*")) if file.is_file() and not file.name.startswith(".")]
            found = [file for file in inside if suffix_of(file)]
            if not found:
                raise InputError(f"{one}: no data file in this folder; expected one of {', '.join(SUFFIXES)}")
            files += found
            ignored += [file for file in inside if not suffix_of(file)]
        elif not one.is_file():
            raise InputError(f"{one}: no such file or folder; check the path")
        elif not suffix_of(one):
            raise InputError(
                f"{one}: unknown kind of file; expected a name that ends with one of {', '.join(SUFFIXES)}"
            )
        else:
            files.append(one)
    twice = [file for file in files if files.count(file) > 1]
    if twice:
        raise InputError(f"{twice[0]}: named twice; name every file once")
    return FileList(tuple(files), tuple(ignored))


def suffix_of(file: Path) -> str:
    """Return the known suffix that a file's name ends with ("" if none), the longest where several fit."""
    name = file.name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def read_rows(file: Path) -> Iterator[Row | RowError]:
    """Yield every row of one file in order, or the reason why it cannot be read.

    Raises `InputError` where the file as a whole is damaged.
    """
    suffix = suffix_of(file).removesuffix(".gz")
    try:
        written_at = datetime.fromtimestamp(file.stat().st_mtime, UTC)
        if suffix == ".parquet":
            found = read_parquet(file)
        elif suffix in (".csv", ".tsv"):
            found = read_csv(file, "\t" if suffix == ".tsv" else ",")
        else:
            found = read_json_file(file, suffix)
        for place, value in found:
            if isinstance(value, RowError):
                yield value
            elif isinstance(value, dict):
                yield Row(place, value, written_at)
            else:
                yield RowError(
                    place, "row", f"{shown(value)}", "one object with named fields", "repair or remove the row"
                )
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file}: damaged gzip file ({error}); expected a whole file; copy it again") from error
    except pyarrow.ArrowException as error:
        raise InputError(f"{file}: not a readable Parquet file ({one_line(error)}); copy or write it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({one_line(error)}); save the file as UTF-8") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({one_line(error)})") from error


def read_json_file(file: Path, suffix: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of a JSON array, of one pretty-printed object, or of JSON lines; the content decides."""
    with open_bytes(file) as data:
        start = data.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[":
        yield from read_json_array(file)
        return
    if start == b"{" and suffix == ".json":
        with open_bytes(file) as data:
            whole = parse_json(data.read())
        if not isinstance(whole, RowProblem):
            yield f"{file}:1", whole
            return
    with open_bytes(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{file}:{number}"
                value = parse_json(line)
                yield place, value.at(place) if isinstance(value, RowProblem) else value


def read_json_array(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for each element of a JSON array, element by element so that each has its line."""
    with open_bytes(file) as data:
        text = data.read().decode("utf-8-sig")
    decoder = json.JSONDecoder()
    position = skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    first = True
    while text[position : position + 1] != "]":
        if not first:
            position = skip_space(text, position + 1) if text[position : position + 1] == "," else position
        line, counted = line + text.count("\n", counted, position), position
        place = f"{file}:{line}"
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{place}: not JSON ({json_reason(error)}); expected an array of objects; repair it here"
            ) from error
        yield place, value
        position, first = skip_space(text, end), False
        if text[position : position + 1] not in (",", "]"):
            line += text.count("\n", counted, position)
            raise InputError(f"{file}:{line}: not JSON (neither ',' nor ']' after an element); the file may be cut off")
    end = skip_space(text, position + 1)
    if end < len(text):
        line += text.count("\n", counted, end)
        raise InputError(
            f"{file}:{line}: text after the end of the JSON array; expected one array, or one object a line"
        )


def read_csv(file: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, fields) of a CSV file with a header; cells that hold JSON lists, objects or numbers are decoded."""
    compressed = file.suffix == ".gz"
    with (
        gzip.open(file, "rt", encoding="utf-8-sig", newline="")
        if compressed
        else file.open(encoding="utf-8-sig", newline="") as lines
    ):
        reader = csv.reader(lines, delimiter=delimiter)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise InputError(f"{file}:1: a column name stands twice in the header; rename one")
            end = reader.line_num
            for cells in reader:
                place, end = f"{file}:{end + 1}", reader.line_num
                if not cells:
                    continue
                if len(cells) != len(header):
                    problem = f"{len(cells)} cells under a header of {len(header)}"
                    yield (
                        place,
                        RowError(place, "row", problem, "one cell a column", "quote cells that hold the delimiter"),
                    )
                    continue
                yield place, {name: csv_value(name, cell) for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise InputError(
                f"{file}:{reader.line_num}: not CSV ({error}); write the file as JSON lines instead"
            ) from error


def csv_value(column: str, cell: str) -> Any:
    """Return a cell's value: None if empty, decoded JSON in the columns that need it, the text itself otherwise."""
    if cell == "":
        return None
    if column in JSON_COLUMNS or (column in MESSAGE_COLUMNS and cell.lstrip().startswith("[{")):
        value = parse_json(
            cell.lower().encode() if cell in ("True", "False") else cell.encode("utf-8", "surrogatepass")
        )
        return cell if isinstance(value, RowProblem) else value
    return cell


def read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, fields) of a Parquet file, a thousand rows in memory at a time."""
    with parquet.ParquetFile(file) as table:
        number = 0
        for batch in table.iter_batches(batch_size=1000):
            for fields in batch.to_pylist():
                number += 1
                yield f"{file}:row {number}", fields


def open_bytes(file: Path) -> gzip.GzipFile | BufferedReader:
    """Open a file for reading bytes, unpacking `.gz` on the way."""
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def parse_json(line: bytes) -> Any:
    """Return the JSON value in UTF-8 bytes, or the `RowProblem` that says why there is none."""
    try:
        return json.loads(line.decode("utf-8-sig").rstrip())  # an error at a line's end has its column, not the next's
    except UnicodeDecodeError as error:
        return RowProblem("row", f"not UTF-8 text (byte {error.start})", "UTF-8", "save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return RowProblem("row", f"not JSON ({json_reason(error)})", "one JSON object a line")


def json_reason(error: ValueError | RecursionError) -> str:
    """Return why JSON was refused, in one short phrase."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else one_line(error)


def skip_space(text: str, position: int) -> int:
    """Return the position of the next character that is not JSON white space."""
    match = WHITESPACE.match(text, position)
    return match.end() if match else position


def one_line(error: object) -> str:
    """Return a foreign error's message on one line, cut to a readable length."""
    return " ".join(str(error).split())[:200]


def shown(value: object) -> str:
    """Return a value as an error message names it: its kind, and its text where that is short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, str):
        return "an empty text" if not value.strip() else f"the text {cut(repr(value))}"
    if isinstance(value, bool):
        return f"{str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {cut(repr(value))}"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a value of type {type(value).__name__}"


def cut(text: str) -> str:
    """Return text cut to `MAX_SHOWN_CHARACTERS`."""
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."
