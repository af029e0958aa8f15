"""`qinglan data check | import | export`: what a file holds, and from any known format to records or other columns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from qinglan.cli import CommandResult, Options
from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.records import Record
from qinglan.data.check import check_file
from qinglan.data.load import OnBad, distinct_prompts, read_contents
from qinglan.data.write import (
    Written,
    records_of,
    write_comparisons,
    write_demonstrations,
    write_prompts,
    write_records,
)

Kind = Literal["prompts", "demonstrations", "comparisons"]
Style = Literal["records", "trl", "messages", "k_wise"]
STYLES: dict[Kind, tuple[Style, ...]] = {
    "prompts": ("records", "trl"),
    "demonstrations": ("records", "trl", "messages"),
    "comparisons": ("records", "trl", "k_wise"),
}


class CheckCommand(Config):
    """A data file to look at."""

    file: Path
    """File or folder: JSON lines, JSON, Parquet or CSV, also as .gz."""
    format: str | None = None
    """Name of the format, where detection by columns goes wrong."""


def check(config: CheckCommand, options: Options) -> CommandResult:
    """Print what a file holds; the exit code is 2 where a row cannot be used."""
    found = check_file(config.file, format=config.format)
    return CommandResult(found.as_text(), found.as_dict(), 2 if found.broken else 0)


class ImportCommand(Config):
    """A data file to turn into records."""

    file: Path
    """File or folder in any known format."""
    to: Path
    """File to write: .jsonl or .parquet."""
    on_bad: OnBad = "stop"
    """Broken rows: stop and name them, or skip and count them."""
    format: str | None = None
    """Name of the format, where detection by columns goes wrong."""


def import_data(config: ImportCommand, options: Options) -> CommandResult:
    """Write everything that a file holds as Qinglan's records, each once."""
    refuse_same_file(config.file, config.to)
    contents = read_contents(config.file, None, config.on_bad, config.format)
    records: list[Record] = []
    for parsed in contents.parsed:
        records += [*parsed.prompts, *(record for one in parsed.demonstrations for record in one)]
        records += [*records_of(parsed.comparisons), *parsed.ratings]
    return told(write_records(config.to, records), config.to, "records", len(contents.broken))


class ExportCommand(Config):
    """A data file to turn into other tools' columns."""

    file: Path
    """File or folder in any known format, our own records among them."""
    to: Path
    """File to write: .jsonl or .parquet."""
    style: Style = "trl"
    """Columns: our records; TRL's prompt, completion, chosen, rejected; TRL's messages; or K-wise rankings."""
    what: Kind | None = None
    """What to write; default: comparisons if the file holds any, else demonstrations, else prompts."""
    on_bad: OnBad = "stop"
    """Broken rows: stop and name them, or skip and count them."""
    format: str | None = None
    """Name of the format, where detection by columns goes wrong."""


def export_data(config: ExportCommand, options: Options) -> CommandResult:
    """Write one kind of what a file holds; pairs that a style has no place for (ties, in TRL's) are counted."""
    refuse_same_file(config.file, config.to)
    contents = read_contents(config.file, config.what, config.on_bad, config.format)
    comparisons = [one for parsed in contents.parsed for one in parsed.comparisons]
    demonstrations = [one for parsed in contents.parsed for one in parsed.demonstrations]
    held: Kind = "comparisons" if comparisons else "demonstrations" if demonstrations else "prompts"
    what = config.what or held
    if config.style not in STYLES[what]:
        raise InputError(f"--style {config.style}: {what} have no such form; expected one of {', '.join(STYLES[what])}")
    writers: dict[Kind, tuple[Any, Sequence[Any]]] = {
        "prompts": (write_prompts, distinct_prompts(contents)),
        "demonstrations": (write_demonstrations, demonstrations),
        "comparisons": (write_comparisons, comparisons),
    }
    write, records = writers[what]
    return told(write(config.to, records, config.style), config.to, f"rows of {what}", len(contents.broken))


def refuse_same_file(source: Path, target: Path) -> None:
    """Raise `InputError` where a file would be written over what it is made from."""
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"--to {target}: is the file that is read; name another one")


def told(written: Written, path: Path, what: str, num_skipped: int) -> CommandResult:
    """Return what was written as a command's result."""
    parts = [f"{written.num_rows} {what}"]
    parts += [f"{written.num_left_out} tied or unranked pairs left out"] if written.num_left_out else []
    parts += [f"{num_skipped} broken rows skipped"] if num_skipped else []
    data = {"to": str(path), **written._asdict(), "num_skipped": num_skipped}
    return CommandResult(f"{', '.join(parts)}\n{path}", data)
