"""Head to head: two policies' completions of the same prompts, judged pairwise, raw and at equal lengths.

After InstructGPT, section 4.2: the share of prompts on which one policy's completion beats the other's, judged by
held-out labelers. Judges are labelers (simulated ones here; people write the same records) or scorers. A labeler sees
every pair in both orders, so that position bias cancels; a tie counts half. A prompt's preference is the mean over its
judges and orders; what no judge could compare is counted as unscored and left out.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from qinglan.core.errors import InputError
from qinglan.core.records import Comparison, Completion, Prompt, Scorer, pairs_of
from qinglan.core.run import Measure
from qinglan.evals.length_control import length_controlled_win_rate, length_matched_win_rate
from qinglan.evals.metrics import mean_with_interval, win_rate
from qinglan.supervisors.simulated import Labeler, Quality, assign_labelers, compare, remember


class Judgements(NamedTuple):
    """What J judges for each of P prompts said of completions a and b."""

    preferences: np.ndarray
    """[P, J] in [0, 1]: 1 where a won in both orders, 0.5 a tie; NaN where that judge could not compare."""
    comparisons: tuple[Comparison, ...]
    """The labelers' records, for provenance; none from scorers."""


class HeadToHead(NamedTuple):
    """The result of a over b. Rates are of a winning, ties half, intervals over prompt groups."""

    win_rate: Measure
    length_controlled: Measure
    length_matched: Measure
    by_tag: dict[str, Measure]
    """Win rate for every tag of the prompts."""
    judge_agreement: Measure
    """How often two judges of one prompt prefer the same side, where both prefer one."""
    tie_rate: Measure
    """Share of prompts with preference 0.5."""
    unscored: int
    preferences: tuple[float, ...]
    """For each prompt; NaN where it was not scored."""
    lengths_a: tuple[int, ...]
    lengths_b: tuple[int, ...]
    """In tokens where every completion carries them, in words otherwise."""
    comparisons: tuple[Comparison, ...]


def head_to_head(
    prompts: Sequence[Prompt],
    completions_a: Sequence[Completion],
    completions_b: Sequence[Completion],
    labelers: Sequence[Labeler],
    quality: Quality,
    seed: int,
    *,
    judges_per_prompt: int = 3,
) -> HeadToHead:
    """Let (held-out) labelers judge a against b on every prompt. Raises `InputError` where lengths differ."""
    judges = min(judges_per_prompt, len(labelers))
    judged = judge_by_labelers(
        prompts, completions_a, completions_b, labelers, quality, seed=seed, judges_per_prompt=judges
    )
    return summarise(prompts, completions_a, completions_b, judged, seed=seed)


def judge_by_labelers(
    prompts: Sequence[Prompt],
    completions_a: Sequence[Completion],
    completions_b: Sequence[Completion],
    labelers: Sequence[Labeler],
    quality: Quality,
    *,
    seed: int,
    judges_per_prompt: int,
) -> Judgements:
    """Let `judges_per_prompt` different labelers compare each pair in both orders; everyone does about as many."""
    _check_lengths(prompts, completions_a, completions_b)
    known = remember(quality)
    assigned = assign_labelers(len(prompts), len(labelers), judges_per_prompt, seed)
    preferences = np.full((len(prompts), judges_per_prompt), math.nan)
    comparisons: list[Comparison] = []
    labels_done: Counter[int] = Counter()
    for p, (prompt, a, b) in enumerate(zip(prompts, completions_a, completions_b, strict=True)):
        if a.id == b.id:
            # Both policies gave one and the same record: a tie that nobody has to look at.
            preferences[p] = 0.5
            continue
        for j, who in enumerate(assigned[p]):
            both_orders = []
            for order in ((0, 1), (1, 0)):
                seen = compare(
                    labelers[who], prompt, a, b, known, seed=seed, position=labels_done[who], order_shown=order
                )
                labels_done[who] += 1
                comparisons.append(seen)
                both_orders.append(_preference(seen))
            preferences[p, j] = sum(both_orders) / 2
    return Judgements(preferences, tuple(comparisons))


def judge_by_scorers(
    prompts: Sequence[Prompt],
    completions_a: Sequence[Completion],
    completions_b: Sequence[Completion],
    scorers: Sequence[Scorer],
) -> Judgements:
    """Let each scorer prefer the completion with the higher score; equal scores tie, NaN is unscored."""
    _check_lengths(prompts, completions_a, completions_b)
    gaps = [np.subtract(scorer(prompts, completions_a), scorer(prompts, completions_b)) for scorer in scorers]
    return Judgements((np.sign(np.stack(gaps, axis=1)) + 1) / 2, ())


def summarise(
    prompts: Sequence[Prompt],
    completions_a: Sequence[Completion],
    completions_b: Sequence[Completion],
    judged: Judgements,
    *,
    seed: int,
) -> HeadToHead:
    """Return the measures of `judged`."""
    _check_lengths(prompts, completions_a, completions_b)
    preferences = np.array([_mean_of_scored(row) for row in judged.preferences])
    groups = [prompt.prompt_group_id for prompt in prompts]
    lengths_a, lengths_b = completion_lengths(completions_a, completions_b)
    by_tag = {}
    for tag in sorted({tag for prompt in prompts for tag in prompt.tags}):
        chosen = [i for i, prompt in enumerate(prompts) if tag in prompt.tags]
        by_tag[tag] = win_rate(preferences[chosen], [groups[i] for i in chosen], seed=seed)
    ties = np.where(np.isnan(preferences), math.nan, preferences == 0.5)
    return HeadToHead(
        win_rate=win_rate(preferences, groups, seed=seed),
        length_controlled=length_controlled_win_rate(preferences, lengths_a, lengths_b, groups, seed=seed),
        length_matched=length_matched_win_rate(preferences, lengths_a, lengths_b, groups, seed=seed),
        by_tag=by_tag,
        judge_agreement=_judge_agreement(judged.preferences, groups, seed),
        tie_rate=mean_with_interval(ties, groups, seed=seed, unit="rate"),
        unscored=int(np.isnan(preferences).sum()),
        preferences=tuple(preferences.tolist()),
        lengths_a=lengths_a,
        lengths_b=lengths_b,
        comparisons=judged.comparisons,
    )


def completion_lengths(
    completions_a: Sequence[Completion], completions_b: Sequence[Completion]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the lengths of both sides in one unit: tokens if every completion carries them, words otherwise."""
    has_tokens = all(completion.token_ids is not None for completion in (*completions_a, *completions_b))

    def length(completion: Completion) -> int:
        return len(completion.token_ids or ()) if has_tokens else len(completion.text.split())

    return tuple(map(length, completions_a)), tuple(map(length, completions_b))


def _preference(comparison: Comparison) -> float:
    """Return 1, 0.5 or 0 for item 0 of a comparison of two; NaN where an item was left out."""
    pairs = pairs_of(comparison.label, ties="half")
    if not pairs:
        return math.nan
    pair = pairs[0]
    return pair.p_first_better if pair.first == 0 else 1.0 - pair.p_first_better


def _mean_of_scored(row: np.ndarray) -> float:
    scored = row[~np.isnan(row)]
    return float(scored.mean()) if len(scored) else math.nan


def _judge_agreement(preferences: np.ndarray, groups: Sequence[str], seed: int) -> Measure:
    outcomes: list[float] = []
    pair_groups: list[str] = []
    for row, group in zip(np.sign(preferences - 0.5), groups, strict=True):
        for first, second in combinations(row[np.abs(row) == 1], 2):
            outcomes.append(float(first == second))
            pair_groups.append(group)
    return mean_with_interval(outcomes, pair_groups, seed=seed, unit="agreement")


def _check_lengths(*columns: Sequence[object]) -> None:
    if len({len(column) for column in columns}) != 1:
        sizes = [len(column) for column in columns]
        raise InputError(
            f"head to head: got {sizes} prompts and completions of a and b; expected one of each per prompt"
        )
