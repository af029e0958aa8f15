"""Files that are whole or absent: atomic writes, hashes, JSON lines with errors that name file and line."""

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qinglan.core.errors import InputError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it over `path`.

    A crash or a full disk leaves the earlier file as it was; the temporary file is removed.
    Raises `InputError` where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write here ({error.strerror}); free some space or choose another --out"
        ) from error
    part = Path(name)
    try:
        write(part)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o644)
        part.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write here ({error.strerror}); free some space or choose another --out"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, in UTF-8."""

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON; NaN and infinity are refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raises `InputError` that names file, line and column."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line to `path`, atomically. Rows with `model_dump` (records) are dumped first."""

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as out:
            for row in rows:
                value = row.model_dump(mode="json") if hasattr(row, "model_dump") else row
                out.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")

    write_atomic(Path(path), write)


def open_text(path: Path) -> Any:
    """Open a text file for reading, unpacking `.gz` on the way. Raises `InputError` if it is not there."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of a `.jsonl` or `.jsonl.gz` file; blank lines are passed over.

    Raises `InputError` that names file and line at the first line that is not JSON or not UTF-8.
    """
    number = 0
    try:
        with open_text(path) as lines:  # bytes, since decoded text is read ahead and its errors have no line
            for number, line in enumerate(lines.buffer, start=1):
                if line.strip():
                    yield number, json.loads(line.decode("utf-8").rstrip())
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); expected one JSON object a line"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 text") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path}: damaged gzip file ({error})") from error


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes, or of a folder's file names and bytes in sorted order."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                digest.update(f"{file.relative_to(path)}\0{sha256_of(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(value: Any) -> str:
    """Return a 16-digit hexadecimal hash of a JSON-like value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
