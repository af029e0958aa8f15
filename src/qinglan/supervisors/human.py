"""People as supervisors: from what a person did on the screen, or put into a file, to the records of training.

A labeler sees completions in a random order and ranks *places on the screen*; the record keeps items by number and
the order shown beside them, so that a bias towards a place can be measured later (`Comparison.order_shown`). Records
are the same as those of every other supervisor (InstructGPT, appendix B: each completion is rated alone, then all are
ranked, ties allowed).
"""

from collections.abc import Collection, Mapping, Sequence

from qinglan.core.errors import InputError
from qinglan.core.records import (
    Comparison,
    ComparisonGroup,
    Completion,
    Demonstrated,
    Demonstration,
    Prompt,
    Ranking,
    Rating,
    record_id,
)
from qinglan.data.load import Loaded, OnBad, Paths, load_comparisons

HUMAN_SOURCES = frozenset({"human", "assisted_human"})


def comparison_from_ranks(
    prompt: Prompt,
    completions: Sequence[Completion],
    order_shown: Sequence[int],
    ranks: Sequence[int | None],
    *,
    labeler: str,
    labeler_group: str | None = None,
    seconds_spent: float | None = None,
) -> ComparisonGroup:
    """Return the comparison of a labeler who gave rank `ranks[k]` to what stood at place `k` of the screen.

    Rank 1 is the best, equal ranks are ties, None was not ranked; `order_shown[k]` is the item at place k.
    Raises `InputError` unless the order is one of all items and at least two of them are ranked.
    """
    count = len(completions)
    if sorted(order_shown) != list(range(count)) or len(ranks) != count:
        shown = f"order {list(order_shown)} and {len(ranks)} ranks for {count} completions"
        wanted = "each item once and a rank for each place"
        raise InputError(f"labeler {labeler}, prompt {prompt.id}: got {shown}; expected {wanted}")
    by_rank: dict[int, list[int]] = {}
    for item, rank in zip(order_shown, ranks, strict=True):
        if rank is not None:
            by_rank.setdefault(rank, []).append(item)
    if sum(len(tied) for tied in by_rank.values()) < 2:
        where = f"labeler {labeler}, prompt {prompt.id}"
        raise InputError(f"{where}: fewer than two items are ranked; rank at least two, or skip it")
    label = Ranking(groups=tuple(tuple(sorted(by_rank[rank])) for rank in sorted(by_rank)))
    items = tuple(completion.id for completion in completions)
    comparison = Comparison(
        id=record_id("comparison", prompt.id, *items, labeler, list(order_shown), label.model_dump_json()),
        source="human",
        producer_id=labeler,
        prompt_group_id=prompt.prompt_group_id,
        split=prompt.split,
        parents=items,
        prompt_id=prompt.id,
        items=items,
        order_shown=tuple(order_shown),
        label=label,
        labeler_group=labeler_group,
        seconds_spent=seconds_spent,
    )
    return ComparisonGroup(prompt, tuple(completions), comparison)


def demonstration_from_text(
    prompt: Prompt, text: str, *, labeler: str, with_model_suggestions: bool = False
) -> Demonstrated:
    """Return what a labeler wrote as a demonstration. Raises `InputError` for empty text."""
    written = text.strip()
    if not written:
        where = f"labeler {labeler}, prompt {prompt.id}"
        raise InputError(f"{where}: empty demonstration; write an answer, or skip the prompt")
    demonstration = Demonstration(
        id=record_id("demonstration", prompt.id, labeler, written),
        source="human",
        producer_id=labeler,
        prompt_group_id=prompt.prompt_group_id,
        split=prompt.split,
        parents=(prompt.id,),
        prompt_id=prompt.id,
        text=written,
        with_model_suggestions=with_model_suggestions,
    )
    return Demonstrated(prompt, demonstration)


def ratings_from_form(
    completion: Completion,
    values: Mapping[str, int | None],
    scales: Mapping[str, tuple[int, int]],
    *,
    labeler: str,
    comparison_id: str | None = None,
) -> list[Rating]:
    """Return one rating for each attribute of a form; None means that the labeler gave no value.

    `scales` has the lowest and highest value of each attribute; a flag is a scale from 0 to 1. Raises `InputError`
    for an attribute that the form does not have and a value outside its scale.
    """
    ratings = []
    for attribute, value in values.items():
        where = f"labeler {labeler}, completion {completion.id}: {attribute}"
        if attribute not in scales:
            raise InputError(f"{where}: no such attribute; expected one of {', '.join(scales)}")
        low, high = scales[attribute]
        if value is not None and not low <= value <= high:
            raise InputError(f"{where}: got {value}; expected {low} to {high}, or nothing")
        rating = Rating(
            id=record_id("rating", completion.id, labeler, attribute, comparison_id),
            source="human",
            producer_id=labeler,
            prompt_group_id=completion.prompt_group_id,
            split=completion.split,
            parents=(completion.id,),
            item_id=completion.id,
            attribute=attribute,
            scale=scales[attribute],
            value=value,
            comparison_id=comparison_id,
        )
        ratings.append(rating)
    return ratings


def load_human_comparisons(
    path: Paths, *, labelers: Collection[str] | None = None, without: Collection[str] = (), on_bad: OnBad = "stop"
) -> Loaded[ComparisonGroup]:
    """Return the comparisons that people made, of some labelers only or without held-out ones.

    What other sources or labelers made is left out and counted in `notes`. Raises `InputError` where nothing is left.
    """
    loaded = load_comparisons(path, on_bad=on_bad)
    people = [group for group in loaded.records if group.comparison.source in HUMAN_SOURCES]
    asked = [group for group in people if labelers is None or group.comparison.producer_id in labelers]
    chosen = [group for group in asked if group.comparison.producer_id not in without]
    if not chosen:
        found = f"no comparison by the people asked for, {len(people)} by people in all"
        raise InputError(f"{path}: {found}; expected at least one; name other labelers or another file")
    left_out = {
        "comparisons by models, left out": len(loaded.records) - len(people),
        "comparisons by other labelers, left out": len(people) - len(chosen),
    }
    notes = loaded.notes | {note: count for note, count in left_out.items() if count}
    return loaded._replace(records=chosen, notes=notes)
