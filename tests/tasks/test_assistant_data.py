"""The world as data of a run: pools by user, candidates worth ranking, labelers who agree as often as people."""

import random
from functools import cache

from qinglan.core.records import Completion, record_id
from qinglan.core.rng import stream_seed
from qinglan.data.prompts import PromptConfig
from qinglan.supervisors.simulated import agreement, make_labelers, remember
from qinglan.tasks.assistant import World, draw_prompts, overall
from qinglan.tasks.assistant_data import (
    LABELER_NOISE,
    WorldConfig,
    WorldData,
    candidates_to_rank,
    quality_of,
    world_data,
)
from qinglan.tasks.item import Draw
from qinglan.tasks.replies import BAD_REPLIES, RAMBLING, bad_reply
from qinglan.tasks.safety import REFUSALS

SMALL = WorldConfig(
    num_demonstrations=60, num_comparison_prompts=50, num_rl_prompts=120, num_valid_prompts=20, num_test_prompts=40
)


@cache
def small_world() -> WorldData:
    return world_data(SMALL, PromptConfig(max_tokens=200), seed=0, num_tokens=num_words)


def num_words(prompt) -> int:
    return sum(len(turn.content.split()) for turn in prompt.messages)


def sampled(world: World, seed: int, count: int, share_good: float) -> list[list[Completion]]:
    """Replies as the corpus' threads have them, in place of a model's samples."""
    rows = []
    for prompt in world.prompts:
        rng = random.Random(stream_seed(seed, "samples", prompt.id))
        draw, item = Draw(rng, False), world.items[prompt.id]
        texts = []
        for _ in range(count):
            kind = rng.choices(list(BAD_REPLIES), list(BAD_REPLIES.values()))[0]
            texts.append(rng.choice(item.good) if rng.random() < share_good else bad_reply(draw, item, kind))
        rows.append([completion(prompt, number, text) for number, text in enumerate(texts)])
    return rows


def completion(prompt, number: int, text: str) -> Completion:
    known = {"source": "policy", "producer_id": "samples", "prompt_group_id": prompt.prompt_group_id}
    return Completion(id=record_id("completion", prompt.id, number), prompt_id=prompt.id, text=text, **known)


def test_pools_have_the_wanted_sizes_and_users_of_their_own() -> None:
    pools = small_world().pools
    sides = {
        "demonstrations": [pair.prompt for pair in pools.demonstrations],
        "comparisons": pools.comparison_prompts,
        "rl": pools.rl_prompts,
        "valid": pools.valid_prompts,
        "test": pools.test_prompts,
    }
    wanted = {"demonstrations": 60, "comparisons": 50, "rl": 120, "valid": 20, "test": 40}
    for name, prompts in sides.items():
        assert 0.5 * wanted[name] <= len(prompts) <= wanted[name], name
    users = {name: {prompt.prompt_group_id for prompt in prompts} for name, prompts in sides.items()}
    for name, found in users.items():
        assert all(found.isdisjoint(other) for others, other in users.items() if others != name)
    assert {prompt.split for prompt in pools.valid_prompts} == {"valid"}
    assert {prompt.split for prompt in pools.test_prompts} == {"test"}
    assert set(small_world().world.items) >= {prompt.id for prompts in sides.values() for prompt in prompts}


def test_hygiene_drops_what_careless_users_sent() -> None:
    pools = small_world().pools
    assert pools.dropped["personal data"] > 0 and pools.dropped["too long"] > 0
    kept = [*pools.comparison_prompts, *pools.rl_prompts, *pools.valid_prompts]
    assert not [prompt for prompt in kept if "@example.com" in prompt.messages[-1].content or num_words(prompt) > 200]


def test_the_same_seed_gives_the_same_data() -> None:
    again = world_data(SMALL, PromptConfig(max_tokens=200), seed=0, num_tokens=num_words).pools
    assert [prompt.id for prompt in again.rl_prompts] == [prompt.id for prompt in small_world().pools.rl_prompts]
    texts = [[pair.demonstration.text for pair in pools.demonstrations] for pools in (again, small_world().pools)]
    assert texts[0] == texts[1]


def test_labelers_see_the_grades_of_the_answer_key() -> None:
    world = small_world().world
    prompt = world.prompts[0]
    good, bad = completion(prompt, 0, world.items[prompt.id].good[0]), completion(prompt, 1, "Go away, you fool.")
    quality = quality_of(world)
    assert quality(prompt, good) == world.grade(prompt, good)[:3]
    assert quality(prompt, bad).harmless == 0.0
    assert overall(world.grade(prompt, good)) > overall(world.grade(prompt, bad))


def test_candidates_are_different_and_include_strange_ones() -> None:
    world = draw_prompts(80, 0, "train")
    rows = candidates_to_rank(world.prompts, sampled(world, 0, 9, 0.45), WorldConfig(), 0)
    strange = 0
    for prompt, row in zip(world.prompts, rows, strict=True):
        assert 2 <= len(row) <= 9
        assert len({one.text for one in row}) == len({one.id for one in row}) == len(row)
        assert {one.prompt_id for one in row} == {prompt.id}
        added = [one for one in row if one.producer_id == "added-candidate"]
        assert all(one.source == "oracle" for one in added)
        strange += bool(added)
    assert strange > 60
    added = [one.text for row in rows for one in row if one.source == "oracle"]
    assert any(text in REFUSALS for text in added)
    assert any(text.endswith(line) for text in added for line in RAMBLING)
    again = candidates_to_rank(world.prompts[:5], sampled(world, 0, 9, 0.45)[:5], WorldConfig(), 0)
    assert [len(row) for row in again] == [len(row) for row in rows[:5]]


def test_candidates_of_a_policy_that_always_says_the_same() -> None:
    world = draw_prompts(3, 0, "train")
    samples = [[completion(prompt, number, "Yes.") for number in range(4)] for prompt in world.prompts]
    for row in candidates_to_rank(world.prompts, samples, WorldConfig(), 0):
        assert len(row) >= 2 and sum(one.text == "Yes." for one in row) == 1


def test_labelers_agree_as_people_do_and_less_with_more_noise() -> None:
    # InstructGPT: 72.6 +/- 1.5%. The default noise is set on a trained model's own samples (docs/world.md: 73%), which
    # lie closer together than the replies drawn here; so here agreement must be higher than that, and not certain.
    world, config = draw_prompts(110, 1, "train", prompts_per_user=1), WorldConfig()
    rows = candidates_to_rank(world.prompts, sampled(world, 1, 9, 0.45), config, 1)
    quality = remember(quality_of(world))

    def agree(noise: float) -> float:
        people = config.labelers.model_copy(update={"noise": noise})
        found = [
            agreement(make_labelers(12, people, 1, held_out=held_out), world.prompts, rows, quality, seed=1)
            for held_out in (False, True)
        ]
        assert min(one.num_decided for one in found) > 1000
        return sum(one.rate for one in found) / 2

    assert config.labelers.noise == LABELER_NOISE
    assert 0.73 < agree(LABELER_NOISE) < 0.87
    assert agree(2 * LABELER_NOISE) < agree(LABELER_NOISE) - 0.05
