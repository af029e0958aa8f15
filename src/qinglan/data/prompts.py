"""Hygiene of prompts and splits by prompt group (InstructGPT, section 3.2 and appendix A.2).

The paper drops prompts that share a long prefix with an earlier one, keeps about 200 prompts per user, filters
personal data out of the training split, drops prompts above 1k tokens, and splits by user. It does not print the
prefix length: ours counts words and is a choice. A user is the prompt group here, as in every split.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import Field

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.records import ComparisonGroup, Demonstrated, Prompt, Record, Split
from qinglan.core.rng import stream_seed
from qinglan.data.pii import find_pii

T = TypeVar("T", Prompt, Demonstrated, ComparisonGroup, Record)
WORD = re.compile(r"\w+")
MAX_SEED = 2**63


class PromptConfig(Config):
    """What is filtered out of a set of prompts."""

    prefix_words: int = Field(default=20, ge=0)
    """Prompts whose first so many words (case and punctuation put aside) equal an earlier prompt's are dropped, and
    shorter ones that equal one as a whole; 0 keeps all (words; the paper gives no length)."""
    max_per_group: int = Field(default=200, ge=1)
    """Prompts kept per prompt group, the first ones in order (prompts; "200 per user", section 3.2)."""
    pii: Literal["train", "all", "none"] = "train"
    """Splits whose prompts are dropped when they hold personal data ("train": the paper's choice, section 3.2)."""
    max_tokens: int = Field(default=1000, ge=1)
    """Longest prompt kept, where `num_tokens` is given (tokens; 1k, appendix B)."""


class Dropped(NamedTuple):
    """A prompt that was left out, and why."""

    prompt: Prompt
    reason: str
    """One of "shared prefix", "personal data", "too long", "over the cap of its group"."""
    detail: str
    """The earlier prompt's id, the kinds of personal data, the number of tokens, or the group."""


class Filtered(NamedTuple):
    """The prompts kept, in order; how many were dropped by reason; and which."""

    kept: list[Prompt]
    dropped: dict[str, int]
    which: list[Dropped]


def filter_prompts(
    prompts: Sequence[Prompt], config: PromptConfig, *, num_tokens: Callable[[Prompt], int] | None = None
) -> Filtered:
    """Return the prompts that pass all filters; the first reason met counts.

    `num_tokens` gives a prompt's length as the model will see it; without it no prompt is dropped for length. The cap
    comes last, so that prompts dropped for other reasons do not use it up.
    """
    kept: list[Prompt] = []
    which: list[Dropped] = []
    by_prefix: dict[tuple[str, ...], str] = {}
    per_group: Counter[str] = Counter()
    for prompt in prompts:
        reason = personal_data(prompt, config) or too_long(prompt, config, num_tokens)
        prefix = prefix_of(prompt, config.prefix_words)
        if reason is None and config.prefix_words and prefix in by_prefix:
            reason = "shared prefix", by_prefix[prefix]
        if reason is None and per_group[prompt.prompt_group_id] >= config.max_per_group:
            reason = "over the cap of its group", prompt.prompt_group_id
        if reason is not None:
            which.append(Dropped(prompt, *reason))
            continue
        by_prefix[prefix] = prompt.id
        per_group[prompt.prompt_group_id] += 1
        kept.append(prompt)
    return Filtered(kept, dict(Counter(one.reason for one in which)), which)


def prefix_of(prompt: Prompt, num_words: int) -> tuple[str, ...]:
    """Return what two prompts must share to count as the same: the whole system turn and the first words of the rest.

    A system turn, often one for a whole data set, says little about the prompt and so does not count among the words.
    """
    system = " ".join(message.content for message in prompt.messages if message.role == "system")
    words: list[str] = []
    for message in prompt.messages:
        if message.role != "system":
            words += WORD.findall(message.content.casefold())
        if len(words) >= num_words:
            break
    if not words:  # nothing but punctuation or symbols: only an equal text counts as the same
        words = [message.content for message in prompt.messages]
    return (system, *words[:num_words])


def personal_data(prompt: Prompt, config: PromptConfig) -> tuple[str, str] | None:
    """Return the reason to drop a prompt for personal data, if it holds any and stands on a filtered split."""
    if config.pii == "none" or (config.pii == "train" and prompt.split != "train"):
        return None
    kinds = sorted({found.kind for message in prompt.messages for found in find_pii(message.content)})
    return ("personal data", ", ".join(kinds)) if kinds else None


def too_long(
    prompt: Prompt, config: PromptConfig, num_tokens: Callable[[Prompt], int] | None
) -> tuple[str, str] | None:
    """Return the reason to drop a prompt for its length, if it is measured and above the limit."""
    if num_tokens is None:
        return None
    length = num_tokens(prompt)
    return ("too long", f"{length} tokens") if length > config.max_tokens else None


def group_of(record: Prompt | Demonstrated | ComparisonGroup | Record) -> str:
    """Return the prompt group of a record, or of the prompt inside a demonstrated prompt or a comparison group."""
    return record.prompt_group_id if isinstance(record, Record) else record.prompt.prompt_group_id


def split_by_group(records: Sequence[T], shares: Mapping[str, float], seed: int) -> dict[str, list[T]]:
    """Return the records of each named split, whole prompt groups together, in about the given shares.

    A group's side depends on its id, the seed and the shares only, so it stays where it is when data is added, and
    prompts, demonstrations and comparisons split apart agree. Names "train", "valid" and "test" are written into the
    records. Raises `InputError` unless the shares are non-negative and sum to 1.
    """
    total = sum(shares.values())
    if not shares or not math.isfinite(total) or min(shares.values()) < 0 or abs(total - 1.0) > 1e-6:
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items()) or "none"
        raise InputError(f"split shares: got {given}; expected shares of at least 0 that sum to 1")
    sides: dict[str, list[T]] = {name: [] for name in shares}
    for record in records:
        name = side_of(group_of(record), shares, seed)
        sides[name].append(with_split(record, name))
    return sides


def side_of(group: str, shares: Mapping[str, float], seed: int) -> str:
    """Return the split that a prompt group falls on: a number in [0, 1) from its hash, laid along the shares."""
    place = stream_seed(seed, "split", group) / MAX_SEED
    end = 0.0
    for name, share in shares.items():
        end += share
        if place < end:
            return name
    return [name for name, share in shares.items() if share > 0][-1]  # rounding left a sliver above the last end


def with_split(record: T, name: str) -> T:
    """Return a record, and all records inside it, with the split written in where it has a place there."""
    if name not in get_args(Split):
        return record
    change = {"split": name}
    placed: Any
    if isinstance(record, Record):
        placed = record.model_copy(update=change)
    elif isinstance(record, Demonstrated):
        placed = Demonstrated(record.prompt.model_copy(update=change), record.demonstration.model_copy(update=change))
    else:
        completions = tuple(completion.model_copy(update=change) for completion in record.completions)
        prompt, comparison = record.prompt.model_copy(update=change), record.comparison.model_copy(update=change)
        placed = ComparisonGroup(prompt, completions, comparison)
    return placed


def check_disjoint(splits: Mapping[str, Sequence[Prompt | Demonstrated | ComparisonGroup | Record]]) -> None:
    """Raise `InputError` with the group's name if a prompt group stands on two splits."""
    side: dict[str, str] = {}
    for name, records in splits.items():
        for record in records:
            group = group_of(record)
            if side.setdefault(group, name) != name:
                both = f"stands on both {side[group]} and {name}"
                raise InputError(f"prompt group {group}: {both}; expected one side; split again with split_by_group")
