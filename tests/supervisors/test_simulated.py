"""Simulated labelers: what is planted in the configuration comes out of their records."""

import math

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import norm

from qinglan.core.errors import InputError
from qinglan.core.records import Comparison, Completion, Message, Prompt, Ranking
from qinglan.core.rng import numpy_stream
from qinglan.supervisors.agreement import count_agreement
from qinglan.supervisors.simulated import (
    Attributes,
    LabelerConfig,
    LabelerGroup,
    agreement,
    assign_labelers,
    compare,
    drifted,
    make_labelers,
    rank,
    rank_all,
    rate,
    remember,
)

ONE_GROUP = (LabelerGroup(name="all", helpful=1, honest=1, harmless=1),)
EXACT = LabelerConfig(
    groups=ONE_GROUP, spread=0, accuracy=1, noise=0, tie_band=0, position_bias=0, length_bias=0, laziness=0
)


def a_prompt(i: int = 0, **changes: object) -> Prompt:
    return Prompt(
        id=f"prompt-{i}",
        source="human",
        producer_id="user",
        prompt_group_id=f"user-{i // 3}",
        messages=(Message(role="user", content="where do lions live ?"),),
        **changes,
    )


def a_completion(name: str, words: int = 16) -> Completion:
    return Completion(
        id=name, source="policy", producer_id="m", prompt_group_id="u", prompt_id="p", text=" ".join(["word"] * words)
    )


def key(**quality: float):
    """An answer key in which all three attributes of a completion are equal."""
    return lambda prompt, completion: Attributes(*[quality[completion.id]] * 3)


def a_world(num_prompts: int, seed: int):
    """The synthetic qualities behind the calibration of the defaults.

    K = 4..9 completions of one policy. Helpfulness: logistic of N(ease of the prompt, 1.3), ease ~ N(0, 1); one in five
    is all right or all wrong (0 or 1), as short answers are. Honest: 70% fully, else uniform below 0.5. Harmless: 90%
    fully, else uniform below 0.3. Lengths: 4 to 29 words, unrelated to quality.
    """
    rng = numpy_stream(seed, "synthetic")
    prompts, completions, table = [], [], {}
    for i in range(num_prompts):
        ease, items = rng.normal(), []
        for k in range(rng.integers(4, 10)):
            helpful = 1 / (1 + math.exp(-(ease + 1.3 * rng.normal())))
            if rng.random() < 0.2:
                helpful = float(rng.random() < 0.5)
            honest = 1.0 if rng.random() < 0.7 else 0.5 * rng.random()
            harmless = 1.0 if rng.random() < 0.9 else 0.3 * rng.random()
            items.append(a_completion(f"c{i}.{k}", int(rng.integers(4, 30))))
            table[items[-1].id] = Attributes(helpful, honest, harmless)
        prompts.append(a_prompt(i))
        completions.append(items)
    return prompts, completions, lambda prompt, completion: table[completion.id]


def share_first(config: LabelerConfig, quality, words=(16, 16), count: int = 1200, **shown: object) -> float:
    """How often one labeler prefers item 0 (a tie counting half) over `count` looks at the same pair."""
    labeler = make_labelers(1, config, 0)[0]
    first, second, prompt = a_completion("a", words[0]), a_completion("b", words[1]), a_prompt()
    wins = 0.0
    for i in range(count):
        label = compare(labeler, prompt, first, second, quality, seed=i, **shown).label
        wins += 0.5 if len(label.groups) == 1 else float(label.groups[0] == (0,))
    return wins / count


def test_defaults_agree_as_often_as_instructgpts_labelers():
    # InstructGPT: 72.6 +/- 1.5%. Several draws of labelers and prompts, each within that, and their mean closer.
    rates = []
    for seed in range(4):
        prompts, completions, quality = a_world(250, seed)
        found = agreement(make_labelers(40, LabelerConfig(), seed), prompts, completions, quality, seed=seed)
        assert found.num_decided > 3000
        rates.append(found.rate)
    assert rates == pytest.approx([0.726] * 4, abs=0.02)
    assert np.mean(rates) == pytest.approx(0.726, abs=0.01)


def test_an_exact_labeler_orders_by_quality_and_ties_equals():
    labeler = make_labelers(1, EXACT.model_copy(update={"tie_band": 0.1}), 0)[0]
    items = [a_completion(name) for name in "abcde"]
    # From the best, 0.9: 0.85 is within 0.1; 0.78 is not, and begins a group that 0.7 joins; chains do not grow.
    quality = key(a=0.78, b=0.9, c=0.2, d=0.85, e=0.7)
    seen = rank(labeler, a_prompt(split="test"), items, quality, seed=0)
    assert seen.label == Ranking(groups=((1, 3), (0, 4), (2,)))
    assert seen.items == tuple("abcde")
    assert (seen.source, seen.producer_id, seen.labeler_group) == ("human", "simulated-labeler-00", "all")
    assert (seen.prompt_group_id, seen.split, seen.parents[0]) == ("user-0", "test", "prompt-0")
    assert Comparison.model_validate_json(seen.model_dump_json()) == seen


def test_planted_noise_gives_the_planted_accuracy():
    # P(prefers the better) = Phi(gap / (noise * sqrt 2))
    share = share_first(EXACT.model_copy(update={"noise": 0.2}), key(a=0.6, b=0.4))
    assert share == pytest.approx(norm.cdf(0.2 / (0.2 * math.sqrt(2))), abs=0.04)


def test_planted_misunderstanding():
    # a is 1 and b is 0: wrong only if misunderstood. One misunderstood: never wrong. Both (0.4^2): wrong half the time.
    share = share_first(EXACT.model_copy(update={"accuracy": 0.6}), key(a=1.0, b=0.0))
    assert share == pytest.approx(1 - 0.16 / 2, abs=0.02)


def test_planted_tie_band():
    # P(tie) = P(|difference| < band), difference ~ N(0, noise * sqrt 2)
    config = EXACT.model_copy(update={"noise": 0.1, "tie_band": 0.1})
    labeler, items, prompt = make_labelers(1, config, 0)[0], [a_completion("a"), a_completion("b")], a_prompt()
    labels = [compare(labeler, prompt, *items, key(a=0.5, b=0.5), seed=i).label for i in range(1200)]
    share = np.mean([len(label.groups) == 1 for label in labels])
    assert share == pytest.approx(2 * norm.cdf(1 / math.sqrt(2)) - 1, abs=0.04)


def test_planted_position_bias():
    config = EXACT.model_copy(update={"noise": 0.1, "position_bias": 0.1})
    equal = key(a=0.5, b=0.5)
    expected = norm.cdf(0.1 / (0.1 * math.sqrt(2)))
    assert share_first(config, equal, order_shown=(0, 1)) == pytest.approx(expected, abs=0.04)
    assert share_first(config, equal, order_shown=(1, 0)) == pytest.approx(1 - expected, abs=0.04)
    assert share_first(config, equal) == pytest.approx(0.5, abs=0.04)


def test_planted_length_bias():
    # Four times as long: two doublings.
    config = EXACT.model_copy(update={"noise": 0.1, "length_bias": 0.04})
    share = share_first(config, key(a=0.5, b=0.5), words=(40, 10))
    assert share == pytest.approx(norm.cdf(0.08 / (0.1 * math.sqrt(2))), abs=0.04)


def test_planted_laziness_takes_the_order_shown_and_little_time():
    config = EXACT.model_copy(update={"laziness": 0.4})
    labeler = make_labelers(1, config, 0)[0]
    items = [a_completion(name) for name in "abcd"]
    looks = [rank(labeler, a_prompt(), items, key(a=0.1, b=0.4, c=0.6, d=0.9), seed=i) for i in range(1000)]
    lazy = [seen for seen in looks if tuple(i for (i,) in seen.label.groups) == seen.order_shown]
    # An honest look coincides with the order shown once in 24.
    assert len(lazy) / len(looks) == pytest.approx(0.4 + 0.6 / 24, abs=0.04)
    hurried = [seen for seen in looks if seen.seconds_spent <= 3]
    assert len(hurried) / len(looks) == pytest.approx(0.4, abs=0.04)
    assert all(seen in lazy for seen in hurried)


def test_drift_raises_noise_and_moves_weights_with_labels_done():
    config = EXACT.model_copy(update={"noise": 0.1, "noise_drift": 2.0, "weight_drift": 0.5})
    labeler = make_labelers(1, config, 0)[0]
    assert drifted(labeler, 0) == labeler
    later = drifted(labeler, 1000)
    assert later.noise == pytest.approx(0.3)
    assert later.weights == pytest.approx((1 / 3 + 1 / 3, 1 / 6, 1 / 6))
    assert drifted(labeler, 5000).weights == pytest.approx((1, 0, 0))
    quality = key(a=0.6, b=0.4)
    early, late = share_first(config, quality), share_first(config, quality, position=1000)
    assert early == pytest.approx(norm.cdf(0.2 / (0.1 * math.sqrt(2))), abs=0.04)
    assert late == pytest.approx(norm.cdf(0.2 / (0.3 * math.sqrt(2))), abs=0.04)


def test_groups_disagree_about_what_matters():
    groups = (
        LabelerGroup(name="help", helpful=8, honest=1, harmless=1),
        LabelerGroup(name="safety", helpful=1, honest=1, harmless=8),
    )
    helper, guard = make_labelers(2, EXACT.model_copy(update={"groups": groups}), 0)
    table = {"bold": Attributes(1, 1, 0), "timid": Attributes(0, 1, 1)}
    pair = (a_completion("bold"), a_completion("timid"))
    for labeler, winner in ((helper, 0), (guard, 1)):
        seen = compare(labeler, a_prompt(), *pair, lambda prompt, completion: table[completion.id], seed=0)
        assert seen.label.groups[0] == (winner,)
        assert seen.labeler_group == labeler.group


def test_individuals_spread_around_the_configuration():
    config = LabelerConfig(spread=0.3, noise=0.2, laziness=0)
    labelers = make_labelers(400, config, 3)
    noises = np.array([labeler.noise for labeler in labelers])
    assert noises.mean() == pytest.approx(0.2, abs=0.01)
    assert noises.std() / noises.mean() == pytest.approx(0.3, abs=0.05)
    assert {labeler.laziness for labeler in labelers} == {0.0}
    assert [sum(labeler.group == group.name for labeler in labelers) for group in config.groups] == [100] * 4
    assert all(sum(labeler.weights) == pytest.approx(1) for labeler in labelers)


def test_labelers_are_drawn_by_position_and_held_out_ones_apart():
    config = LabelerConfig()
    assert make_labelers(3, config, 0) == make_labelers(8, config, 0)[:3]
    assert make_labelers(3, config, 0) != make_labelers(3, config, 1)
    known, held_out = make_labelers(5, config, 0), make_labelers(5, config, 0, held_out=True)
    assert held_out[4].pseudonym == "held-out-labeler-04"
    assert not {labeler.noise for labeler in known} & {labeler.noise for labeler in held_out}


def test_equal_arguments_give_equal_judgements_and_the_order_shown_is_random():
    labeler = make_labelers(1, LabelerConfig(), 0)[0]
    items = [a_completion(name) for name in "abcd"]
    quality = key(a=0.1, b=0.4, c=0.6, d=0.9)

    def look(**where: int) -> dict:
        return rank(labeler, a_prompt(), items, quality, **where).model_dump(exclude={"created_at"})

    assert look(seed=1) == look(seed=1)
    assert look(seed=1)["id"] != look(seed=1, position=1)["id"] != look(seed=2)["id"]
    first_places = [look(seed=i)["order_shown"][0] for i in range(400)]
    assert np.bincount(first_places, minlength=4).min() > 70


def test_what_could_not_be_scored_is_left_out():
    labeler = make_labelers(1, LabelerConfig(accuracy=0.5, spread=0), 0)[0]
    items = [a_completion(name) for name in "abc"]
    quality = key(a=0.9, b=math.nan, c=0.1)
    for seed in range(20):
        named = {i for group in rank(labeler, a_prompt(), items, quality, seed=seed).label.groups for i in group}
        assert named == {0, 2}
    assert {rating.value for rating in rate(labeler, a_prompt(), items[1], quality, seed=0)} == {None}


def test_ratings_follow_quality_and_flags_the_attributes():
    labeler = make_labelers(1, EXACT, 0)[0]
    table = {"good": Attributes(1, 1, 1), "bad": Attributes(0.5, 0.0, 0.1)}

    def quality(prompt, completion):
        return table[completion.id]

    good = {r.attribute: r.value for r in rate(labeler, a_prompt(), a_completion("good"), quality, seed=0)}
    assert good == {"overall_quality": 7, "instruction_not_followed": 0, "hallucination": None, "harmful_advice": 0}
    closed = a_prompt(expects_closed_domain=True)
    ratings = rate(labeler, closed, a_completion("bad"), quality, seed=0, comparison_id="comparison-1")
    # Mean of 0.5, 0, 0.1 is 0.2; 1 + round(6 * 0.2) = 2
    assert [r.value for r in ratings] == [2, 0, 1, 1]
    assert ratings[0].scale == (1, 7)
    assert {r.comparison_id for r in ratings} == {"comparison-1"}


def test_work_is_shared_evenly_and_overlap_counts():
    prompts, completions, quality = a_world(200, seed=2)
    labelers = make_labelers(7, LabelerConfig(), 0)
    comparisons = rank_all(labelers, prompts, completions, quality, seed=0, overlap=0.2)
    assert len(comparisons) == 240
    twice = [p.id for p in prompts if sum(c.prompt_id == p.id for c in comparisons) == 2]
    assert len(twice) == 40
    for prompt_id in twice:
        assert len({c.producer_id for c in comparisons if c.prompt_id == prompt_id}) == 2
    work = [sum(c.producer_id == labeler.pseudonym for c in comparisons) for labeler in labelers]
    assert max(work) - min(work) < 20
    assert len({c.id for c in comparisons}) == 240


def test_assigned_labelers_differ_within_a_prompt():
    assigned = assign_labelers(100, 5, 3, seed=0)
    assert len(assigned) == 100
    assert all(len(set(team)) == 3 for team in assigned)
    assert assign_labelers(0, 5, 3, seed=0) == []
    with pytest.raises(InputError, match="3 for each prompt, out of 2"):
        assign_labelers(10, 2, 3, seed=0)


def test_remembered_qualities_are_computed_once():
    calls = []

    def quality(prompt, completion):
        calls.append(completion.id)
        return Attributes(1, 1, 1)

    known = remember(quality)
    for _ in range(3):
        known(a_prompt(), a_completion("a"))
    assert calls == ["a"]


def test_agreement_of_two_labels_by_hand():
    def label(items, groups):
        return rank(make_labelers(1, EXACT, 0)[0], a_prompt(), items, key(a=1, b=0.5, c=0), seed=0).model_copy(
            update={"items": tuple(item.id for item in items), "label": Ranking(groups=groups)}
        )

    abc = [a_completion(name) for name in "abc"]
    # First: a > b > c. Second, items in another order: c > {a, b}. Decided by both: a-c and b-c, both opposed.
    first, second = label(abc, ((0,), (1,), (2,))), label(abc[::-1], ((0,), (1, 2)))
    assert count_agreement(first, second) == (0, 2)
    assert count_agreement(first, first) == (3, 3)
    assert math.isnan(count_agreement(second, label(abc, ((0, 1, 2),))).rate)


def test_bad_input_is_named():
    labeler = make_labelers(1, LabelerConfig(), 0)[0]
    with pytest.raises(InputError, match=r"prompt prompt-0: .*two or more"):
        rank(labeler, a_prompt(), [a_completion("a")], key(a=1), seed=0)
    with pytest.raises(InputError, match="different ids"):
        compare(labeler, a_prompt(), a_completion("a"), a_completion("a"), key(a=1), seed=0)
    with pytest.raises(InputError, match="count of 0"):
        make_labelers(0, LabelerConfig(), 0)
    with pytest.raises(InputError, match="all weights are 0"):
        make_labelers(1, LabelerConfig(groups=(LabelerGroup(name="x", helpful=0, honest=0, harmless=0),)), 0)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        LabelerConfig(laziness=1.5)
    with pytest.raises(InputError, match="1 prompts and 0 sets"):
        rank_all([labeler], [a_prompt()], [], key(), seed=0)
