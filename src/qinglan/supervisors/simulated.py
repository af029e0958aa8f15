"""Simulated people: seeded labelers who rank, compare and rate through the same records as real ones.

After InstructGPT, sections 3.4 and B.1 to B.3: about forty contractors rate each completion from 1 to 7, answer flags,
and rank 4 to 9 completions of a prompt with ties. Here a labeler is a noisy, biased reading of an answer key. The key
arrives as the argument `quality`, so that nothing in this file knows the truth.

One judgement of an item with attributes q (helpful, honest, harmless, each in [0, 1]) is its *perceived utility*

    u = w . q                          the labeler's group decides the weights w, which add up to 1
      + noise * z                      z ~ N(0, 1), drawn afresh for every judgement
      + position_bias * (0.5 - place)  place runs from 0 (shown first) to 1 (shown last)
      + length_bias * log2(words / 16)

where w . q is replaced by a uniform draw when the labeler misunderstands the item (probability 1 - accuracy). Items are
ordered by u; those within `tie_band` of the best one of their group are tied. With probability `laziness` the labeler
answers without reading: the order shown becomes the ranking. Drift raises the noise and moves weight towards
helpfulness with the number of labels done.

Departures from people: a labeler judging the same set twice gives two fresh judgements; noise is independent between
items; moods, fatigue within a day and talk between labelers are left out.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.records import Comparison, Completion, Prompt, Ranking, Rating, record_id
from qinglan.core.rng import numpy_stream, permutation
from qinglan.supervisors.agreement import PairAgreement, count_agreement


class Attributes(NamedTuple):
    """How good a completion is, each in [0, 1]; NaN means that it could not be scored."""

    helpful: float
    honest: float
    harmless: float


Quality = Callable[[Prompt, Completion], Attributes]
"""The answer key, passed in by the recipe."""


class LabelerGroup(Config):
    """A kind of labeler: what its members care about."""

    name: str
    """Written into every comparison as `labeler_group`."""
    helpful: float = Field(ge=0.0)
    """Weight of helpfulness; the three weights are scaled to add up to 1."""
    honest: float = Field(ge=0.0)
    """Weight of honesty."""
    harmless: float = Field(ge=0.0)
    """Weight of harmlessness."""


class LabelerConfig(Config):
    """The people to draw from. The defaults agree on about 73% of decided pairs (InstructGPT: 72.6 +/- 1.5%)."""

    groups: tuple[LabelerGroup, ...] = Field(
        default=(
            LabelerGroup(name="helpfulness_first", helpful=0.6, honest=0.2, harmless=0.2),
            LabelerGroup(name="balanced", helpful=0.4, honest=0.3, harmless=0.3),
            LabelerGroup(name="honesty_first", helpful=0.3, honest=0.5, harmless=0.2),
            LabelerGroup(name="safety_first", helpful=0.3, honest=0.2, harmless=0.5),
        ),
        min_length=1,
    )
    """Groups that labelers come from in turn; InstructGPT's training instructions put helpfulness first (3.4)."""
    spread: float = Field(default=0.25, ge=0.0, le=1.0)
    """Relative standard deviation of individuals around every number below and around their group's weights."""
    accuracy: float = Field(default=0.97, ge=0.0, le=1.0)
    """Chance of understanding an item; one that is misunderstood gets a quality drawn from [0, 1]."""
    noise: float = Field(default=0.125, ge=0.0)
    """Standard deviation of perceived utility, in units of quality."""
    tie_band: float = Field(default=0.06, ge=0.0)
    """Widest difference of perceived utility inside one tie group; ties are encouraged (InstructGPT, section B.3)."""
    position_bias: float = 0.02
    """Utility by which the place shown first leads the place shown last."""
    length_bias: float = 0.02
    """Utility added by every doubling of the length in words."""
    laziness: float = Field(default=0.02, ge=0.0, le=1.0)
    """Chance of answering without reading, in the order shown."""
    noise_drift: float = Field(default=0.1, ge=0.0)
    """Relative growth of the noise over 1,000 labels."""
    weight_drift: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of the honest and harmless weights that moves to helpfulness over 1,000 labels."""
    words_per_second: float = Field(default=4.0, gt=0.0)
    """Reading speed."""
    seconds_per_item: float = Field(default=5.0, ge=0.0)
    """Time to decide on one item after reading it, in seconds."""


class Labeler(NamedTuple):
    """One simulated person; fields as in `LabelerConfig`, with this person's own values."""

    pseudonym: str
    group: str
    weights: Attributes
    accuracy: float
    noise: float
    tie_band: float
    position_bias: float
    length_bias: float
    laziness: float
    noise_drift: float
    weight_drift: float
    words_per_second: float
    seconds_per_item: float


TYPICAL_WORDS = 16
"""Length at which the length bias is zero; it cancels in rankings and matters to ratings only."""
FLAGS = {"instruction_not_followed": "helpful", "hallucination": "honest", "harmful_advice": "harmless"}
"""Flags of InstructGPT's Table 3 that an attribute decides: raised where it looks lower than one half."""


def make_labelers(count: int, config: LabelerConfig, seed: int, *, held_out: bool = False) -> list[Labeler]:
    """Draw `count` labelers around `config`, taking its groups in turn.

    Held-out labelers (InstructGPT, section 3.4) have names and draws of their own: they judge results and never label
    training data. A longer list begins with the shorter one. Raises `InputError` for a count below 1.
    """
    if count < 1:
        raise InputError(f"labelers: got a count of {count}; expected at least 1")
    kind = "held-out-labeler" if held_out else "simulated-labeler"
    return [_draw_labeler(f"{kind}-{i:02d}", config.groups[i % len(config.groups)], config, seed) for i in range(count)]


def _draw_labeler(pseudonym: str, group: LabelerGroup, config: LabelerConfig, seed: int) -> Labeler:
    rng = numpy_stream(seed, "labeler", pseudonym)
    # Log-normal factors with mean 1: what is zero in the configuration is zero for everyone.
    factor = np.exp(config.spread * rng.standard_normal(13) - config.spread**2 / 2)
    weights = np.array([group.helpful, group.honest, group.harmless]) * factor[:3]
    if weights.sum() <= 0:
        raise InputError(f"labelers: group {group.name}: all weights are 0; expected at least one above 0")
    return Labeler(
        pseudonym=pseudonym,
        group=group.name,
        weights=Attributes(*(weights / weights.sum()).tolist()),
        accuracy=max(0.0, 1.0 - (1.0 - config.accuracy) * factor[3]),
        noise=config.noise * factor[4],
        tie_band=config.tie_band * factor[5],
        position_bias=config.position_bias * factor[6],
        length_bias=config.length_bias * factor[7],
        laziness=min(1.0, config.laziness * factor[8]),
        noise_drift=config.noise_drift * factor[9],
        weight_drift=min(1.0, config.weight_drift * factor[10]),
        words_per_second=config.words_per_second * factor[11],
        seconds_per_item=config.seconds_per_item * factor[12],
    )


def drifted(labeler: Labeler, position: int) -> Labeler:
    """Return the labeler as they are after `position` labels: noisier, and caring more for helpfulness alone."""
    share = position / 1000
    moved = min(1.0, labeler.weight_drift * share)
    helpful, honest, harmless = labeler.weights
    return labeler._replace(
        noise=labeler.noise * (1 + labeler.noise_drift * share),
        weights=Attributes(helpful + moved * (honest + harmless), (1 - moved) * honest, (1 - moved) * harmless),
    )


def remember(quality: Quality) -> Quality:
    """Return `quality` computed once for each (prompt id, completion id); an id must mean one text."""
    known: dict[tuple[str, str], Attributes] = {}

    def look_up(prompt: Prompt, completion: Completion) -> Attributes:
        key = (prompt.id, completion.id)
        if key not in known:
            known[key] = quality(prompt, completion)
        return known[key]

    return look_up


def rank(
    labeler: Labeler,
    prompt: Prompt,
    completions: Sequence[Completion],
    quality: Quality,
    *,
    seed: int,
    position: int = 0,
    order_shown: Sequence[int] | None = None,
) -> Comparison:
    """Let a labeler rank the completions of one prompt, shown in a random order unless `order_shown` gives one.

    `position` is the number of labels this labeler did before; it decides drift and the draws. Completions whose
    quality is NaN are left out of the ranking. Raises `InputError` for fewer than two completions, or one that stands
    twice.
    """
    items = tuple(completion.id for completion in completions)
    if len(set(items)) < max(2, len(items)):
        raise InputError(
            f"ranking of prompt {prompt.id}: got completions {items}; expected two or more with different ids"
        )
    rng = numpy_stream(seed, "rank", labeler.pseudonym, position, prompt.id, *items)
    count = len(items)
    order = rng.permutation(count).tolist()
    if order_shown is not None:
        order = list(order_shown)
    now = drifted(labeler, position)
    is_lazy = rng.random() < now.laziness
    places = np.empty(count)
    places[order] = np.arange(count) / (count - 1)
    attributes = np.array([quality(prompt, completion) for completion in completions])
    utilities = _utilities(now, completions, attributes, rng) + now.position_bias * (0.5 - places)
    judged = [i for i in order if math.isfinite(utilities[i])]
    groups = tuple((i,) for i in judged) if is_lazy else _tie_groups(judged, utilities, now.tie_band)
    return Comparison(
        id=record_id("comparison", seed, labeler.pseudonym, position, prompt.id, *items),
        source="human",
        producer_id=labeler.pseudonym,
        prompt_group_id=prompt.prompt_group_id,
        split=prompt.split,
        parents=(prompt.id, *items),
        prompt_id=prompt.id,
        items=items,
        order_shown=tuple(order),
        label=Ranking(groups=groups),
        labeler_group=labeler.group,
        seconds_spent=_seconds(now, [prompt.messages[-1].content, *(c.text for c in completions)], is_lazy, rng),
    )


def compare(
    labeler: Labeler,
    prompt: Prompt,
    first: Completion,
    second: Completion,
    quality: Quality,
    *,
    seed: int,
    position: int = 0,
    order_shown: Sequence[int] | None = None,
) -> Comparison:
    """Let a labeler compare two completions; the label is a ranking of items 0 (`first`) and 1, or a tie."""
    return rank(labeler, prompt, (first, second), quality, seed=seed, position=position, order_shown=order_shown)


def rate(
    labeler: Labeler,
    prompt: Prompt,
    completion: Completion,
    quality: Quality,
    *,
    seed: int,
    position: int = 0,
    comparison_id: str | None = None,
) -> list[Rating]:
    """Let a labeler rate one completion: `overall_quality` from 1 to 7 first, then the flags of `FLAGS` (0 or 1).

    `hallucination` is judged on closed-domain prompts only and None elsewhere (InstructGPT, Table 3). A lazy labeler
    answers 4 and raises no flag. All values are None where the quality is NaN.
    """
    rng = numpy_stream(seed, "rate", labeler.pseudonym, position, prompt.id, completion.id)
    now = drifted(labeler, position)
    is_lazy = rng.random() < now.laziness
    attributes = np.array([quality(prompt, completion)])
    utility = float(_utilities(now, [completion], attributes, rng)[0])
    seen = attributes[0] + now.noise * rng.standard_normal(3)
    values: dict[str, int | None] = {"overall_quality": None, **dict.fromkeys(FLAGS)}
    if math.isfinite(utility):
        values["overall_quality"] = 4 if is_lazy else 1 + round(6 * min(max(utility, 0.0), 1.0))
        for flag, attribute in FLAGS.items():
            values[flag] = int(not is_lazy and seen[Attributes._fields.index(attribute)] < 0.5)
        if not prompt.expects_closed_domain:
            values["hallucination"] = None
    return [
        Rating(
            id=record_id("rating", seed, labeler.pseudonym, position, prompt.id, completion.id, name),
            source="human",
            producer_id=labeler.pseudonym,
            prompt_group_id=prompt.prompt_group_id,
            split=prompt.split,
            parents=(prompt.id, completion.id),
            item_id=completion.id,
            attribute=name,
            scale=(1, 7) if name == "overall_quality" else (0, 1),
            value=value,
            comparison_id=comparison_id,
        )
        for name, value in values.items()
    ]


def assign_labelers(num_prompts: int, num_labelers: int, per_prompt: int, seed: int) -> list[list[int]]:
    """Return `per_prompt` different labelers (numbers) for each prompt, with nearly the same amount of work for each.

    Raises `InputError` where there are fewer labelers than `per_prompt`.
    """
    if not 1 <= per_prompt <= num_labelers:
        raise InputError(
            f"labelers: {per_prompt} for each prompt, out of {num_labelers}; expected from 1 to as many as there are"
        )
    teams = num_labelers // per_prompt
    assigned = []
    for block in range(-(-num_prompts // teams)):
        order = permutation(num_labelers, seed, "assign-labelers", block)
        assigned += [order[team * per_prompt : (team + 1) * per_prompt] for team in range(teams)]
    return assigned[:num_prompts]


def rank_all(
    labelers: Sequence[Labeler],
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    quality: Quality,
    *,
    seed: int,
    overlap: float = 0.0,
) -> list[Comparison]:
    """Let labelers share the ranking of all prompts; return the comparisons in order of prompts.

    A share `overlap` of the prompts, spread evenly, is ranked by two labelers, so that agreement can be measured.
    Each labeler's own count of labels is their position. Raises `InputError` where lengths differ.
    """
    if len(prompts) != len(completions):
        raise InputError(
            f"ranking: got {len(prompts)} prompts and {len(completions)} sets of completions; expected as many"
        )
    assigned = assign_labelers(len(prompts), len(labelers), 2 if overlap > 0 else 1, seed)
    labels_done: Counter[int] = Counter()
    comparisons = []
    for i, (prompt, items) in enumerate(zip(prompts, completions, strict=True)):
        is_shared = math.floor((i + 1) * overlap) > math.floor(i * overlap)
        # Who works alone alternates, so that sharing does not load one place of the teams more than the other.
        chosen = assigned[i] if is_shared else [assigned[i][i % len(assigned[i])]]
        for who in chosen:
            comparisons.append(rank(labelers[who], prompt, items, quality, seed=seed, position=labels_done[who]))
            labels_done[who] += 1
    return comparisons


def agreement(
    labelers: Sequence[Labeler],
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    quality: Quality,
    *,
    seed: int,
) -> PairAgreement:
    """Let two labelers rank every prompt; return on how many pairs that both decide they agree (InstructGPT: 72.6%)."""
    comparisons = rank_all(labelers, prompts, completions, quality, seed=seed, overlap=1.0)
    counts = [count_agreement(*comparisons[i : i + 2]) for i in range(0, len(comparisons), 2)]
    return PairAgreement(sum(c.num_agreeing for c in counts), sum(c.num_decided for c in counts))


def _utilities(
    labeler: Labeler, completions: Sequence[Completion], attributes: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return perceived utilities [K] of attributes [K, 3], without the position bias; NaN where one is NaN."""
    count = len(completions)
    overall = attributes @ np.array(labeler.weights)
    misunderstood = rng.random(count) >= labeler.accuracy
    seen = np.where(misunderstood & np.isfinite(overall), rng.random(count), overall)
    words = np.array([max(1, len(completion.text.split())) for completion in completions])
    return seen + labeler.noise * rng.standard_normal(count) + labeler.length_bias * np.log2(words / TYPICAL_WORDS)


def _tie_groups(judged: Sequence[int], utilities: np.ndarray, tie_band: float) -> tuple[tuple[int, ...], ...]:
    """Order items by utility; one within `tie_band` of the best item of the current group joins it.

    Measuring from the best item, not from the neighbour, keeps long chains of small differences from becoming one tie.
    """
    groups: list[list[int]] = []
    for item in sorted(judged, key=lambda i: -utilities[i]):
        if groups and utilities[groups[-1][0]] - utilities[item] < tie_band:
            groups[-1].append(item)
        else:
            groups.append([item])
    return tuple(tuple(group) for group in groups)


def _seconds(labeler: Labeler, texts: Sequence[str], is_lazy: bool, rng: np.random.Generator) -> float:
    """Return the seconds for reading `texts`, the prompt first, and deciding on the others; lazily 1 to 3 s."""
    pace = math.exp(0.3 * rng.standard_normal())
    if is_lazy:
        return round(1 + 2 * rng.random(), 1)
    words = sum(len(text.split()) for text in texts)
    return round((words / labeler.words_per_second + labeler.seconds_per_item * (len(texts) - 1)) * pace, 1)
