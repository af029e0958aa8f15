"""Files in: prompts, demonstrations and comparisons from the formats that people have, each bad row named.

`load_prompts`, `load_demonstrations` and `load_comparisons` take a file, a folder or a list, find each file's format
by its columns (`data/formats.py`) and return records. With `on_bad="stop"` one `InputError` names up to 20 findings,
one a line; with `on_bad="skip"` the rows are left out and returned as `skipped`. What is merged or left out by rule
is counted in `notes`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

from qinglan.core.errors import InputError
from qinglan.core.records import ComparisonGroup, Demonstrated, Prompt, Rating
from qinglan.data.fields import Parsed
from qinglan.data.formats import Format, Kind, detect, format_named
from qinglan.data.rows import Row, RowError, list_files, read_rows, shown

MAX_FINDINGS = 20
OnBad = Literal["stop", "skip"]
Paths = Path | str | Sequence[Path | str]
T = TypeVar("T")


class Loaded(NamedTuple, Generic[T]):
    """What was loaded: the records, the rows skipped and why, the format(s) found, and counts worth knowing."""

    records: list[T]
    skipped: list[RowError]
    format: str
    notes: dict[str, int]


class Contents(NamedTuple):
    """All that some files hold, before anyone asks for one kind."""

    parsed: list[Parsed]
    broken: list[RowError]
    formats: tuple[Format, ...]
    files: tuple[Path, ...]
    num_rows: int
    notes: Counter[str]


def load_prompts(path: Paths, *, on_bad: OnBad = "stop", format: str | None = None) -> Loaded[Prompt]:
    """Return every distinct prompt in the files, those of demonstrations and comparisons included.

    `format` names the format where detection by columns would go wrong. Raises `InputError`.
    """
    contents = read_contents(path, "prompts", on_bad, format)
    return loaded(contents, distinct_prompts(contents))


def load_demonstrations(path: Paths, *, on_bad: OnBad = "stop", format: str | None = None) -> Loaded[Demonstrated]:
    """Return every demonstration with its prompt; repeated ones are kept and counted. Raises `InputError`."""
    contents = read_contents(path, "demonstrations", on_bad, format)
    return loaded(contents, [one for parsed in contents.parsed for one in parsed.demonstrations])


def load_comparisons(path: Paths, *, on_bad: OnBad = "stop", format: str | None = None) -> Loaded[ComparisonGroup]:
    """Return every comparison with prompt and completions; repeated ones are kept, counted. Raises `InputError`."""
    contents = read_contents(path, "comparisons", on_bad, format)
    return loaded(contents, [one for parsed in contents.parsed for one in parsed.comparisons])


def load_ratings(path: Paths, *, on_bad: OnBad = "stop") -> Loaded[Rating]:
    """Return every rating in files of our own records. Raises `InputError`."""
    contents = read_contents(path, None, on_bad, "qinglan_records")
    return loaded(contents, [one for parsed in contents.parsed for one in parsed.ratings])


def loaded(contents: Contents, records: list[T]) -> Loaded[T]:
    """Return the result of a load."""
    notes = {note: count for note, count in contents.notes.items() if count}
    return Loaded(records, contents.broken, " + ".join(one.name for one in contents.formats), notes)


def distinct_prompts(contents: Contents) -> list[Prompt]:
    """Return each prompt once, in order of first appearance; counts the merged ones."""
    prompts: dict[str, Prompt] = {}
    for parsed in contents.parsed:
        for prompt in parsed.prompts:
            contents.notes["repeated prompts, merged"] += prompt.id in prompts
            prompts.setdefault(prompt.id, prompt)
    return list(prompts.values())


def read_contents(path: Paths, wanted: Kind | None, on_bad: OnBad, format: str | None = None) -> Contents:
    """Read and parse files; refuse a file without the wanted kind, and bad rows unless they are to be skipped."""
    contents = parse_files(path, format)
    for one in contents.formats:
        if wanted is not None and wanted not in one.kinds:
            held = " and ".join(one.kinds)
            raise InputError(
                f"{name_of(path)}: holds {held} only (format {one.name}); expected {wanted}; name another file"
            )
    if wanted is not None:
        contents.broken.extend(without_kind(contents, wanted))
    if on_bad == "stop" and contents.broken:
        raise findings(contents.broken, contents.num_rows)
    if wanted is not None and not any(getattr(parsed, wanted) for parsed in contents.parsed):
        first = f"; the first problem is {contents.broken[0].line()}" if contents.broken else ""
        raise InputError(f"{name_of(path)}: no {wanted} could be read from {contents.num_rows} rows{first}")
    return contents


def without_kind(contents: Contents, wanted: Kind) -> Iterator[RowError]:
    """Yield a finding for each sound row without the wanted kind, in formats where every row should have it."""
    if all(one.row_by_row for one in contents.formats):
        for parsed in contents.parsed:
            if not getattr(parsed, wanted):
                held = "a prompt without completion" if parsed.prompts else "nothing"
                yield RowError(
                    parsed.place, "row", f"holds {held}", f"{wanted} in every row", "complete or remove the row"
                )


def findings(broken: Sequence[RowError], num_rows: int) -> InputError:
    """Return one error with up to `MAX_FINDINGS` lines."""
    lines = [one.line() for one in broken[:MAX_FINDINGS]]
    more = len(broken) - len(lines)
    rest = f", {more} more not shown" if more else ""
    advice = "repair them, or leave them out with on-bad skip (--help has its flag)"
    lines.append(f"{len(broken)} of {num_rows} rows cannot be used{rest}; {advice}")
    return InputError("\n".join(lines))


def parse_files(path: Paths, format: str | None = None) -> Contents:
    """Read and parse all rows of all files, formats found by columns. Raises `InputError` for damaged files only."""
    listed = list_files(path)
    notes: Counter[str] = Counter({"files of the folder left out by their suffix": len(listed.ignored)})
    broken: list[RowError] = []
    rows_by_format: dict[Format, list[Row]] = {}
    num_rows = 0
    for file in listed.files:
        rows = []
        for row in read_rows(file):
            num_rows += 1
            if isinstance(row, Row):
                rows.append(row)
            else:
                broken.append(row)
        if rows:
            found = format_named(format) if format else detect(rows, str(file))
            rows_by_format.setdefault(found, []).extend(rows)
    if not num_rows:
        raise InputError(f"{name_of(path)}: no rows; expected at least one")
    parsed: list[Parsed] = []
    for one, rows in rows_by_format.items():
        parsed.extend(one.parse(rows, broken, notes))
    sound = list(with_unique_ids(parsed, broken, notes))
    order = {str(file): number for number, file in enumerate(listed.files)}
    broken.sort(key=lambda error: place_order(error.place, order))
    return Contents(sound, broken, tuple(rows_by_format), listed.files, num_rows, notes)


def place_order(place: str, files: dict[str, int]) -> tuple[int, int]:
    """Return a sort key for "file:line" and "file:row n": files as given, then lines."""
    file, _, line = place.rpartition(":")
    return files.get(file, len(files)), int(line.removeprefix("row "))


def with_unique_ids(parsed: Sequence[Parsed], broken: list[RowError], notes: Counter[str]) -> Iterator[Parsed]:
    """Yield what was parsed with ids that stand once: a file's own id may not repeat, and exact repeats are numbered.

    Two rows with equal content are kept (two labelers without names may agree); the second gets an id that ends with
    "-2".
    """
    places: dict[str, str] = {}
    prompts: dict[str, Prompt] = {}
    seen: Counter[str] = Counter()
    for one in parsed:
        if one.given_id is not None:
            earlier = places.setdefault(one.given_id, one.place)
            if earlier != one.place:
                problem = f"{shown(one.given_id)} stands already at {earlier}"
                broken.append(
                    RowError(one.place, "id", problem, "an id that stands once", "rename or remove one of the rows")
                )
                continue
        clash = next(
            (prompt for prompt in one.prompts if prompts.setdefault(prompt.id, prompt).messages != prompt.messages),
            None,
        )
        if clash is not None:
            problem = f"{shown(clash.id)} names another prompt in an earlier row"
            broken.append(RowError(one.place, "prompt_id", problem, "one id for one prompt", "rename one of the two"))
            continue
        demonstrations = []
        for shown_answer in one.demonstrations:
            record = shown_answer.demonstration
            number = occurrence(record.id, seen, notes, "demonstrations with equal content, kept")
            kept = record if number == 1 else record.model_copy(update={"id": f"{record.id}-{number}"})
            demonstrations.append(shown_answer._replace(demonstration=kept))
        comparisons = []
        for group in one.comparisons:
            judged = group.comparison
            number = occurrence(judged.id, seen, notes, "comparisons with equal content, kept")
            again = judged if number == 1 else judged.model_copy(update={"id": f"{judged.id}-{number}"})
            comparisons.append(group._replace(comparison=again))
        yield one._replace(demonstrations=tuple(demonstrations), comparisons=tuple(comparisons))


def occurrence(name: str, seen: Counter[str], notes: Counter[str], note: str) -> int:
    """Count one more record of this id and return how many there are."""
    seen[name] += 1
    notes[note] += seen[name] > 1
    return seen[name]


def name_of(path: Paths) -> str:
    """Return the path or paths as an error message names them."""
    return str(path) if isinstance(path, str | Path) else ", ".join(str(one) for one in path)
