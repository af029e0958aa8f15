"""Weak supervisors that are no models: word lists, keywords, one annotator's column.

What people use before they have a model: an opinion lexicon (Hu and Liu 2004), the valences of VADER (Hutto and Gilbert
2014; the lexicon alone, without VADER's rules for negation and emphasis), keywords, or a single annotator.
"""

import csv
import io
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from qinglan.core.errors import InputError
from qinglan.core.records import Case
from qinglan.supervisors.weak import Rule

WORD = re.compile(r"[a-z][a-z'-]*")
KINDS = ("lexicon", "vader", "keywords", "column")


def is_rule(name: str) -> bool:
    """Return whether a supervisor's name is that of a rule ("lexicon:FILE", "column:NAME", ...) and not of a model."""
    return name.partition(":")[0] in KINDS and ":" in name


def load_rule(name: str, classes: Sequence[str] = ()) -> Rule:
    """Return the rule of a name.

    "lexicon:FILE" takes a zip with positive-words.txt and negative-words.txt, "vader:FILE" a lexicon (or a zip of it)
    with lines of word, tab, valence, "keywords:FILE" a text file with one word or phrase a line that means class 1,
    "column:NAME" a number from 0 to 1 in a column of the row, or one of the two words `classes` for class 0 and class 1
    (any other word decides nothing). Raises `InputError` for files that are not so.
    """
    kind, _, rest = name.partition(":")
    if kind == "column":
        return column_rule(rest, classes)
    path = Path(rest)
    if not path.is_file():
        raise InputError(f"{name}: {path}: no such file")
    if kind == "lexicon":
        files = _zip_texts(path)
        good, bad = _words(files, "positive", path), _words(files, "negative", path)
        return valence_rule(dict.fromkeys(good, 1.0) | dict.fromkeys(bad, -1.0))
    if kind == "vader":
        text = "\n".join(_zip_texts(path).values()) if path.suffix == ".zip" else path.read_text(encoding="utf-8")
        return valence_rule(_valences(text, path))
    words = [line.strip().lower() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return keyword_rule(words)


def valence_rule(valences: Mapping[str, float]) -> Rule:
    """Return the rule P(class 1) = sigmoid(sum of the words' valences); a text without any known word gets 0.5."""

    def rule(case: Case, _: Mapping[str, object]) -> float:
        total = sum(valences.get(word, 0.0) for word in WORD.findall(_text(case).lower()))
        return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, total))))

    return rule


def keyword_rule(keywords: list[str]) -> Rule:
    """Return the rule that says class 1 where one of the keywords stands in the text."""
    if not keywords:
        raise InputError("keywords: the file holds none; expected one a line")
    pattern = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in keywords))
    return lambda case, _: float(pattern.search(_text(case).lower()) is not None)


def column_rule(column: str, classes: Sequence[str] = ()) -> Rule:
    """Return the rule that reads a label out of a column of the row, such as a single annotator's."""

    def rule(case: Case, row: Mapping[str, object]) -> float:
        if column not in row:
            raise InputError(f"column:{column}: no such column; expected one of {', '.join(row)}")
        if classes:
            found = str(row[column])
            return float(classes.index(found)) if found in classes else 0.5
        value = str(row[column]).strip().lower()
        try:
            number = {"true": 1.0, "false": 0.0}.get(value)
            return float(value) if number is None else number
        except ValueError as error:
            raise InputError(f"column:{column}: {value!r}; expected a number from 0 to 1, true or false") from error

    return rule


def _text(case: Case) -> str:
    return " ".join((*(message.content for message in case.messages), *case.texts))


def _zip_texts(path: Path) -> dict[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".txt")]
            return {name: archive.read(name).decode("latin-1") for name in names}
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: no zip file ({error}); expected the word lists as they are published") from error


def _words(files: Mapping[str, str], kind: str, path: Path) -> list[str]:
    text = next((text for name, text in files.items() if kind in name.rpartition("/")[2]), None)
    if text is None:
        raise InputError(f"{path}: holds no file of {kind} words; expected {kind}-words.txt inside")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(";")]


def _valences(text: str, path: Path) -> dict[str, float]:
    rows = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        return {row[0]: float(row[1]) for row in rows if row}
    except (IndexError, ValueError) as error:
        raise InputError(f"{path}: no lexicon ({error}); expected lines of word, tab, valence") from error
