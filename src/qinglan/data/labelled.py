"""Texts with one of two labels, out of files: JSONL, CSV, Parquet, or "label text" lines; and their sides.

Sides are made of whole groups (entity, passage, document), each balanced by leaving out items of the larger class, so
that chance is one half everywhere (Burns et al. 2023, appendix A). Lines are split at line feeds only: other characters
that `str.splitlines` breaks at occur inside texts.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.records import Case, record_id
from qinglan.core.rng import permutation
from qinglan.data.load import OnBad, findings
from qinglan.data.rows import Row, RowError, RowProblem, list_files, read_rows, shown, suffix_of

NUMBERS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
"""Labels that need no explanation, in lower case."""


class LabelledFileConfig(Config):
    """A file of texts with labels of two classes, and how to read it."""

    file: Path | None = None
    """JSONL, CSV, TSV or Parquet with named columns; any other name: lines of a label, a space and a text."""
    text: str = "{text}"
    """How a text is put together from the row's columns, such as "{passage} Question: {question}? Answer:"."""
    label: str = "label"
    """Column with the label: 0 or 1, true or false, or one of `classes`."""
    classes: tuple[str, ...] = ()
    """The two label values that stand for class 0 and class 1, where they are words."""
    verdicts: tuple[str, ...] = ()
    """The words that say class 0 and class 1 right after a text, for zero-shot judging; none: it is left out."""
    group: str | None = None
    """Column whose equal values stay on one side (passage, user); default: every text is a group of its own."""
    where: tuple[str, ...] = ()
    """Only rows with these values, each as "column=value"."""
    encoding: str = "utf-8"
    """Encoding of "label text" lines."""
    on_bad: OnBad = "stop"
    """Broken rows: stop and name them, or skip and count them."""


class LabelledCase(NamedTuple):
    """A case with its true class (of a pair: 1 if the first text is better), and the row that it came from."""

    case: Case
    label: int
    fields: Mapping[str, Any] = {}


def load_labelled(config: LabelledFileConfig) -> list[LabelledCase]:
    """Return the texts of a file with their labels; repeated texts are merged.

    Raises `InputError` for a file that cannot be read, for rows without text or with a label outside the two classes
    (with `on_bad` "skip": only if nothing is left), and for a text that has both labels.
    """
    if config.file is None:
        raise InputError("labelled texts: no file given; expected --data.file")
    _check_config(config)
    found: dict[str, LabelledCase] = {}
    broken: list[RowError] = []
    number = 0
    for row in _rows(config):
        number += 1
        if isinstance(row, RowError):
            broken.append(row)
            continue
        try:
            one = _labelled(row, config)
        except RowProblem as problem:
            broken.append(problem.at(row.place))
            continue
        if one is None:
            continue
        before = found.setdefault(one.case.texts[0], one)
        if before.label != one.label:
            contradiction = "the same text stands here with the other label"
            broken.append(RowProblem("label", contradiction, "one label for a text").at(row.place))
    if broken and (config.on_bad == "stop" or not found):
        raise findings(broken, number)
    if not found:
        raise InputError(f"{config.file}: none of {number} rows is left; check --data.where and --data.text")
    return list(found.values())


def _check_config(config: LabelledFileConfig) -> None:
    for name, words in (("classes", config.classes), ("verdicts", config.verdicts)):
        if len(words) not in (0, 2):
            raise InputError(f"data.{name}: {len(words)} values; expected two, for class 0 and class 1, or none")
    for condition in config.where:
        if "=" not in condition:
            raise InputError(f"data.where: {condition!r}; expected column=value")


def _rows(config: LabelledFileConfig) -> Iterator[Row | RowError]:
    assert config.file is not None
    if config.file.is_file() and not suffix_of(config.file):
        yield from _lines(config.file, config.encoding)
        return
    for file in list_files(config.file).files:
        yield from read_rows(file)


def _lines(file: Path, encoding: str) -> Iterator[Row | RowError]:
    """Yield "label text" lines as rows with the columns label and text."""
    try:
        text = file.read_bytes().decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise InputError(
            f"{file}: cannot be read as {encoding} text ({error}); name another --data.encoding, such as latin-1"
        ) from error
    written_at = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    for number, line in enumerate(text.split("\n"), start=1):
        label, _, rest = line.strip("\r").partition(" ")
        if line.strip():
            yield Row(f"{file}:{number}", {"label": label, "text": rest.strip()}, written_at)


def _labelled(row: Row, config: LabelledFileConfig) -> LabelledCase | None:
    """Return the row's case, or None where a condition excludes it."""
    for condition in config.where:
        column, _, value = condition.partition("=")
        if column not in row.fields:
            raise RowProblem(column, "no such column", f"one of {', '.join(row.fields)}", "correct --data.where")
        if str(row.fields[column]) != value:
            return None
    try:
        text = config.text.format(**row.fields).strip()
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        wanted = f"columns of the row ({', '.join(row.fields)})"
        raise RowProblem("text", f"{config.text!r} wants {error}", wanted, "correct --data.text") from error
    if not text:
        raise RowProblem("text", "an empty text", "some text")
    label = _class_of(row, config)
    group = text if config.group is None else str(row.fields.get(config.group))
    if config.group is not None and config.group not in row.fields:
        raise RowProblem(config.group, "no such column", f"one of {', '.join(row.fields)}", "correct --data.group")
    words = (config.verdicts[0], config.verdicts[1]) if config.verdicts else None
    return LabelledCase(Case(record_id("case", text), group, (text,), verdicts=words), label, row.fields)


def _class_of(row: Row, config: LabelledFileConfig) -> int:
    if config.label not in row.fields:
        raise RowProblem(config.label, "no such column", f"one of {', '.join(row.fields)}", "correct --data.label")
    value = row.fields[config.label]
    if config.classes:
        if str(value) not in config.classes:
            raise RowProblem(config.label, shown(value), " or ".join(map(repr, config.classes)))
        return config.classes.index(str(value))
    found = NUMBERS.get(str(value).strip().lower())
    if found is None:
        raise RowProblem(config.label, shown(value), "0 or 1, or words named by --data.classes")
    return found


# ---------------------------------------------------------------------------------------------------------- sides


class Sizes(NamedTuple):
    """How many cases each side should have."""

    half: int
    """Of each training half: A for the supervisor, B for student and ceiling."""
    valid: int
    test: int


class Sides(NamedTuple):
    """Balanced cases on four sides; no group stands on two of them."""

    half_a: list[LabelledCase]
    half_b: list[LabelledCase]
    valid: list[LabelledCase]
    test: list[LabelledCase]


def split_sides(
    items: Sequence[LabelledCase],
    sizes: Sizes,
    *,
    seed: int,
    test_seed: int,
    where: str,
    balance_training: bool = True,
) -> Sides:
    """Return the four sides; the test side depends on `test_seed` alone, the others on `seed` too.

    Without `balance_training` all sides but the test keep the classes as they come, as the released code does.
    Where there are fewer items than wanted, all sides shrink alike. Raises `InputError` for one class only, for a
    side that would have fewer than 8 cases of each class, and for a group that is on two sides.
    """
    classes = {item.label for item in items}
    if len(classes) < 2:
        only = f"class {classes.pop()}" if classes else "missing"
        raise InputError(f"{where}: all {len(items)} labels are {only}; expected both classes")
    wanted = {"test": sizes.test, "half_a": sizes.half, "half_b": sizes.half, "valid": sizes.valid}
    share = min(1.0, 0.9 * len(items) / sum(wanted.values()))  # balancing takes some
    wanted = {name: int(share * count) for name, count in wanted.items()}
    groups: dict[str, list[LabelledCase]] = {}
    for item in items:
        groups.setdefault(item.case.prompt_group_id, []).append(item)
    names = sorted(groups)
    order = [names[i] for i in permutation(len(names), test_seed, "test side")]
    filled: dict[str, list[LabelledCase]] = {name: [] for name in wanted}
    while order and balanced_size(filled["test"]) < wanted["test"]:
        filled["test"] += groups[order.pop()]
    rest = sorted(order)
    for place in permutation(len(rest), seed, "halves"):
        # To the side that lacks the largest share of what it wants.
        needy = min(("half_a", "half_b", "valid"), key=lambda name: len(filled[name]) / max(1, wanted[name]))
        filled[needy] += groups[rest[place]]
    seeds = {"test": test_seed}
    sides = {
        name: balanced(found, seeds.get(name, seed), wanted[name])
        if balance_training or name == "test"
        else [found[i] for i in permutation(len(found), seed, "as they come")][: wanted[name]]
        for name, found in filled.items()
    }
    for name, found in sides.items():
        if len(found) < 16 and wanted[name] > 0:
            raise InputError(
                f"{where}: {len(items)} cases in {len(groups)} groups leave {len(found)} for {name}; "
                "expected at least 16, too few for an interval; give more cases or more groups"
            )
    made = Sides(**sides)
    check_sides(made, where)
    return made


def balanced_size(items: Sequence[LabelledCase]) -> int:
    """Return how many items are left when the larger class is cut to the smaller."""
    num_ones = sum(item.label for item in items)
    return 2 * min(num_ones, len(items) - num_ones)


def balanced(items: Sequence[LabelledCase], seed: int, at_most: int) -> list[LabelledCase]:
    """Return equally many items of both classes, `at_most` in all, drawn at random, in a random order."""
    by_class: dict[int, list[LabelledCase]] = {0: [], 1: []}
    for place in permutation(len(items), seed, "balance"):
        by_class[items[place].label].append(items[place])
    count = min(len(by_class[0]), len(by_class[1]), at_most // 2)
    kept = [item for found in by_class.values() for item in found[:count]]
    return [kept[i] for i in permutation(len(kept), seed, "balanced order")]


def check_sides(sides: Sides, where: str) -> None:
    """Raise `InputError` if a group, or a text, stands on two sides: what was trained on would be measured."""
    seen: dict[str, str] = {}
    for name, items in sides._asdict().items():
        for item in items:
            for key in (f"group {item.case.prompt_group_id!r}", f"text {item.case.texts!r} {item.case.messages!r}"):
                other = seen.setdefault(key, name)
                if other != name:
                    raise InputError(
                        f"{where}: {key[:80]} stands on the sides {other} and {name}; expected every group on one "
                        "side; merge the groups or leave one out"
                    )
