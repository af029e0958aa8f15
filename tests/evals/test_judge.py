"""Head to head: both orders, ties half, length control, tags, agreement, and what could not be judged."""

import math

import numpy as np
import pytest

from qinglan.core.errors import InputError
from qinglan.core.records import Completion, Message, Prompt
from qinglan.core.rng import numpy_stream
from qinglan.evals.judge import completion_lengths, head_to_head, judge_by_labelers, judge_by_scorers, summarise
from qinglan.supervisors.simulated import Attributes, LabelerConfig, make_labelers

EXACT = LabelerConfig(spread=0, accuracy=1, noise=0, tie_band=0.05, position_bias=0, length_bias=0, laziness=0)


def a_prompt(i: int, tag: str = "open_qa") -> Prompt:
    return Prompt(
        id=f"p{i}",
        source="human",
        producer_id="u",
        prompt_group_id=f"user-{i // 2}",
        split="test",
        tags=(tag, "all"),
        messages=(Message(role="user", content="why ?"),),
    )


def a_completion(name: str, words: int = 8, token_ids: tuple[int, ...] | None = None) -> Completion:
    return Completion(
        id=name,
        source="policy",
        producer_id="m",
        prompt_group_id="u",
        prompt_id="p",
        text="word " * words,
        token_ids=token_ids,
    )


def a_match(qualities_a, qualities_b, words=(8, 8)):
    prompts = [a_prompt(i, "chat" if i % 2 else "open_qa") for i in range(len(qualities_a))]
    a = [a_completion(f"a{i}", words[0]) for i in range(len(prompts))]
    b = [a_completion(f"b{i}", words[1]) for i in range(len(prompts))]
    table = {f"a{i}": q for i, q in enumerate(qualities_a)} | {f"b{i}": q for i, q in enumerate(qualities_b)}
    return prompts, a, b, lambda prompt, completion: Attributes(*[table[completion.id]] * 3)


def held_out(config: LabelerConfig, count: int = 5):
    return make_labelers(count, config, 0, held_out=True)


def test_exact_judges_by_hand():
    # wins, loses, ties, is not scored
    match = a_match([0.9, 0.1, 0.5, math.nan], [0.1, 0.9, 0.5, 0.5])
    found = head_to_head(*match[:3], held_out(EXACT), match[3], 0)
    np.testing.assert_array_equal(found.preferences, [1.0, 0.0, 0.5, math.nan])
    assert (found.win_rate.value, found.win_rate.n, found.unscored) == (0.5, 3, 1)
    assert {tag: measure.value for tag, measure in found.by_tag.items()} == {"all": 0.5, "chat": 0.0, "open_qa": 0.75}
    assert found.tie_rate.value == pytest.approx(1 / 3)
    assert (found.judge_agreement.value, found.judge_agreement.n) == (1.0, 6)  # three pairs of judges, two prompts
    assert len(found.comparisons) == 4 * 3 * 2
    assert {c.producer_id[:8] for c in found.comparisons} == {"held-out"}
    assert {c.split for c in found.comparisons} == {"test"}


def test_both_orders_cancel_position_bias():
    config = EXACT.model_copy(update={"position_bias": 1.0})
    prompts, a, b, quality = a_match([0.6] * 10, [0.5] * 10)
    judged = judge_by_labelers(prompts, a, b, held_out(config), quality, seed=0, judges_per_prompt=2)
    assert (judged.preferences == 0.5).all()  # each judge wants what stands first, so nobody wins
    shown = [comparison.order_shown for comparison in judged.comparisons]
    assert shown.count((0, 1)) == shown.count((1, 0)) == 20


def test_swapping_the_sides_mirrors_the_result():
    rng = numpy_stream(0, "qualities")
    prompts, a, b, quality = a_match(rng.random(40), rng.random(40))
    there = head_to_head(prompts, a, b, held_out(EXACT), quality, 0)
    back = head_to_head(prompts, b, a, held_out(EXACT), quality, 0)
    assert back.win_rate.value == pytest.approx(1 - there.win_rate.value)


def test_noisy_labelers_find_the_better_policy_and_agree_as_people_do():
    rng = numpy_stream(1, "qualities")
    prompts, a, b, quality = a_match(rng.beta(3, 2, 150), rng.beta(2, 3, 150))
    found = head_to_head(prompts, a, b, held_out(LabelerConfig(), 10), quality, 0)
    assert found.win_rate.low > 0.5
    assert 0.65 < found.judge_agreement.value < 0.95
    again = head_to_head(prompts, a, b, held_out(LabelerConfig(), 10), quality, 0)
    assert again.win_rate == found.win_rate


def test_length_control_removes_what_length_bought():
    rng = numpy_stream(2, "lengths")
    prompts = [a_prompt(i) for i in range(300)]
    a = [a_completion(f"a{i}", int(words)) for i, words in enumerate(rng.integers(10, 60, 300))]
    b = [a_completion(f"b{i}", int(words)) for i, words in enumerate(rng.integers(10, 30, 300))]
    config = EXACT.model_copy(update={"noise": 0.1, "length_bias": 0.15})
    found = head_to_head(prompts, a, b, held_out(config), lambda p, c: Attributes(0.5, 0.5, 0.5), 0)
    assert found.win_rate.low > 0.6
    assert abs(found.length_controlled.value - 0.5) < 0.1
    assert abs(found.length_matched.value - 0.5) < 0.1


def test_scorers_judge_too():
    prompts, a, b, _ = a_match([0] * 3, [0] * 3)
    scores = {"a0": 1.0, "a1": 0.0, "a2": math.nan, "b0": 0.0, "b1": 0.0, "b2": 0.0}

    def scorer(prompts, completions):
        return [scores[completion.id] for completion in completions]

    judged = judge_by_scorers(prompts, a, b, [scorer, scorer])
    np.testing.assert_array_equal(judged.preferences[:, 0], [1.0, 0.5, math.nan])
    found = summarise(prompts, a, b, judged, seed=0)
    assert (found.win_rate.value, found.unscored, found.comparisons) == (0.75, 1, ())


def test_lengths_are_in_one_unit():
    with_tokens, without = a_completion("a", 3, (1, 2, 3, 4)), a_completion("b", 3)
    assert completion_lengths([with_tokens], [with_tokens]) == ((4,), (4,))
    assert completion_lengths([with_tokens], [without]) == ((3,), (3,))


def test_one_record_for_both_sides_is_a_tie_and_few_labelers_are_enough():
    prompts, a, _, quality = a_match([0.5] * 4, [0.5] * 4)
    found = head_to_head(prompts, a, a, held_out(EXACT, 1), quality, 0)
    assert (found.win_rate.value, found.tie_rate.value, found.comparisons) == (0.5, 1.0, ())
    with pytest.raises(InputError, match="one of each per prompt"):
        head_to_head(prompts, a, a[:2], held_out(EXACT), quality, 0)


def test_nothing_to_judge():
    found = head_to_head([], [], [], held_out(EXACT), lambda p, c: Attributes(1, 1, 1), 0)
    assert (found.win_rate.value, found.length_controlled.value, found.unscored) == (None, None, 0)
