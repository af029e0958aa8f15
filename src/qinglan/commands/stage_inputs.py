"""What the commands of single stages begin with: records that fit into the context, a text corpus, a run folder.

Whatever is wrong with the input is found here, before the run folder is made, so that a mistake leaves nothing behind.
Rows that are too long for the model are named or, with `on_bad` "skip", left out and counted.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from qinglan.cli import Options
from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.files import open_text
from qinglan.core.records import ComparisonGroup, Demonstrated, Prompt
from qinglan.core.rng import permutation
from qinglan.core.run import Measure, Run
from qinglan.data.load import Loaded, OnBad
from qinglan.data.prompts import split_by_group
from qinglan.learn.encode import encode_completion
from qinglan.learn.sft import PretrainSource
from qinglan.models.language_model import LanguageModel, max_context

T = TypeVar("T", Prompt, Demonstrated, ComparisonGroup)
Load = Callable[..., Loaded[T]]
"""One of the loaders of `data/load.py`: (path, on_bad=...) -> records."""


class Sides(NamedTuple, Generic[T]):
    """The records of one file for training and for measuring, and how many of which."""

    train: list[T]
    held_out: list[T]
    counts: dict[str, Measure]
    """Sizes of both sides, and how many rows were broken or too long."""


class Limit(NamedTuple):
    """The longest rows that may be used, in tokens, and what happens to longer ones."""

    max_tokens: int
    on_long: OnBad
    why: str
    """What sets the limit, for the message."""


def sides_from_file(
    load: Load[T], path: Path, length: Callable[[T], int], limit: Limit, *, on_bad: OnBad, held_out: float, seed: int
) -> Sides[T]:
    """Return the records of a file on two sides, whole prompt groups together, about a share `held_out` of them apart.

    Raises `InputError` for broken rows and rows over the limit, unless they are to be skipped, and where nothing is
    left for training.
    """
    loaded = load(path, on_bad=on_bad)
    fitting, first_long = [], ""
    for record in loaded.records:
        num_tokens = length(record)
        if num_tokens <= limit.max_tokens:
            fitting.append(record)
        elif not first_long:
            first_long = (
                f"{name_of(record)} has {num_tokens} tokens, over the limit of {limit.max_tokens} ({limit.why})"
            )
    num_long = len(loaded.records) - len(fitting)
    if num_long and (limit.on_long == "stop" or not fitting):
        advice = "shorten them" if not fitting else "shorten them, or leave them out with --on-bad skip"
        raise InputError(f"{path}: {first_long}; {num_long} of {len(loaded.records)} rows do; {advice}")
    sides = split_by_group(fitting, {"train": 1.0 - held_out, "valid": held_out}, seed)
    if not sides["train"]:
        raise InputError(
            f"{path}: none of {len(fitting)} rows is left for training, {len(sides['valid'])} are held out; give rows "
            "of more prompt groups, or hold out a smaller share"
        )
    counts = {
        "rows/training": len(sides["train"]),
        "rows/held_out": len(sides["valid"]),
        "rows/too_long": num_long,
        "rows/broken": len(loaded.skipped),
    }
    return Sides(sides["train"], sides["valid"], {name: count(number) for name, number in counts.items()})


def name_of(record: Prompt | Demonstrated | ComparisonGroup) -> str:
    """Return a record's kind and id, as an error message names it."""
    if isinstance(record, Prompt):
        return f"prompt {record.id}"
    if isinstance(record, Demonstrated):
        return f"demonstration {record.demonstration.id}"
    return f"comparison {record.comparison.id}"


def count(number: int) -> Measure:
    """Return a count as a measure."""
    return Measure(number, None, None, number, "rows")


def demonstration_length(lm: LanguageModel) -> Callable[[Demonstrated], int]:
    """Return the function that counts the tokens of a demonstration, its prompt included."""
    return lambda one: len(encode_completion(lm.chat, one.prompt, one.demonstration).token_ids)


def comparison_length(lm: LanguageModel) -> Callable[[ComparisonGroup], int]:
    """Return the function that counts the tokens of a comparison's longest completion, its prompt included."""
    return lambda group: max(len(encode_completion(lm.chat, group.prompt, one).token_ids) for one in group.completions)


def training_limit(lm: LanguageModel, max_length: int | None, on_bad: OnBad) -> Limit:
    """Return the limit of training rows: `max_length`, beyond which the user wants them left out, or the context."""
    context = max_context(lm.model)
    if max_length is not None and max_length <= context:
        return Limit(max_length, "skip", "training.max_length")
    return Limit(context, on_bad, "the model's context")


def text_corpus(path: Path, lm: LanguageModel, seed: int) -> PretrainSource:
    """Return the documents of a text file as pretraining sequences, in a new order each pass, cut to the context.

    An empty line ends a document; `.gz` is unpacked. Raises `InputError` for a file that is not there, is not UTF-8 or
    holds no text.
    """
    try:
        with open_text(path) as lines:
            text = lines.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read as UTF-8 text ({error}); expected documents between empty lines"
        ) from error
    documents = [document.strip() for document in re.split(r"\n\s*\n", text) if document.strip()]
    if not documents:
        raise InputError(f"{path}: holds no text; expected documents between empty lines")
    tokenizer = lm.tokenizer
    end_id = lm.chat.end_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    first_id = end_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    @lru_cache(maxsize=2)
    def order(number: int) -> list[int]:
        return permutation(len(documents), seed, "pretraining text", number)

    def sequence(position: int) -> list[int]:
        number, place = divmod(position, len(documents))
        # Control tokens that stand in the text are text: it could otherwise forge the end of a turn.
        ids = tokenizer.encode(documents[order(number)[place]], add_special_tokens=False, split_special_tokens=True)
        return [first_id, *ids, end_id][: max_context(lm.model)]

    return lambda start, number: [sequence(position) for position in range(start, start + number)]


def pretraining_source(
    path: Path | None, weight: float, name: str, lm: LanguageModel, seed: int
) -> PretrainSource | None:
    """Return the corpus that training mixes in, or None where the setting `name` is 0.

    Raises `InputError` where a corpus is wanted but not given, or given but not wanted.
    """
    if (path is None) == (weight == 0):
        return None if path is None else text_corpus(path, lm, seed)
    if path is None:
        raise InputError(
            f"{name} is {weight}, but there is no pretraining text; give a file as --pretraining, or set it to 0"
        )
    raise InputError(f"--pretraining {path}: is not mixed in while {name} is 0; set it above 0, or leave the file out")


def open_run(config: Config, options: Options, command: str, inputs: Mapping[str, Path | None]) -> Run:
    """Open the command's run folder, by default runs/COMMAND, and note the inputs with their hashes."""
    run = Run.open(
        options.out or Path("runs") / command, config, seed=options.seed, recipe=command, resume=options.resume
    )
    for name, path in inputs.items():
        if path is not None:
            run.add_input(name, path)
    return run
