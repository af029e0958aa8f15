"""Demonstrators go wrong as often as their configuration says, and their care scatters around it."""

from functools import cache

import pytest

from qinglan.core.records import Demonstrated
from qinglan.tasks.assistant import World, draw_prompts
from qinglan.tasks.demonstrators import DemonstratorConfig, demonstrate, fault_of
from qinglan.tasks.replies import RAMBLING, RUDE

NUM_PROMPTS = 4000
CAREFUL = DemonstratorConfig(
    invent_rate=0,
    comply_rate_plain=0,
    comply_rate_disguised=0,
    refuse_rate_benign=0,
    ignore_rate=0,
    wrong_rate=0,
    ramble_rate=0,
    rude_rate=0,
)


@cache
def asked() -> World:
    return draw_prompts(NUM_PROMPTS, 0, "train")


@cache
def demonstrated() -> tuple[Demonstrated, ...]:
    # Many demonstrators, so that their care averages to 1.
    return tuple(demonstrate(asked(), asked().prompts, DemonstratorConfig(num_demonstrators=400), 0))


def rate_of_faults(*tags: str) -> float:
    faults = []
    for prompt, demonstration in demonstrated():
        item = asked().items[prompt.id]
        if set(tags) <= set(prompt.tags):
            fault, _ = fault_of(item, DemonstratorConfig())
            faults.append(fault is not None and demonstration.text == item.faulty[fault])
    assert len(faults) > 40, tags
    return sum(faults) / len(faults)


@pytest.mark.parametrize(
    ("tags", "rate"),
    [
        (("unanswerable",), "invent_rate"),
        (("harmful", "plain"), "comply_rate_plain"),
        (("harmful", "disguised"), "comply_rate_disguised"),
        (("benign",), "refuse_rate_benign"),
        (("constraint",), "ignore_rate"),
        (("open_qa",), "wrong_rate"),
        (("closed_qa", "told"), "wrong_rate"),
    ],
)
def test_faults_come_at_the_configured_rates(tags: tuple[str, ...], rate: str) -> None:
    config = DemonstratorConfig()
    expected = (1 - config.rude_rate) * getattr(config, rate)
    assert rate_of_faults(*tags) == pytest.approx(expected, abs=0.13)


def test_rudeness_and_rambling_come_at_their_rates() -> None:
    config = DemonstratorConfig()
    texts = [pair.demonstration.text for pair in demonstrated()]
    assert sum(text in RUDE for text in texts) / NUM_PROMPTS == pytest.approx(config.rude_rate, abs=0.015)
    is_faulty = [pair.demonstration.text in asked().items[pair.prompt.id].faulty.values() for pair in demonstrated()]
    right = [text for text, faulty in zip(texts, is_faulty, strict=True) if not faulty and text not in RUDE]
    rambling = sum(any(line in text for line in RAMBLING) for text in right) / len(right)
    assert rambling == pytest.approx(config.ramble_rate, abs=0.04)


def test_careful_demonstrators_write_good_replies_only() -> None:
    world = draw_prompts(150, 1, "train")
    pairs = demonstrate(world, world.prompts, CAREFUL, 0)
    assert all(pair.demonstration.text in world.items[pair.prompt.id].good for pair in pairs)


def test_demonstrations_are_records_of_people_and_repeatable() -> None:
    world = draw_prompts(40, 2, "train")
    pairs = demonstrate(world, world.prompts, DemonstratorConfig(), 5)
    again = demonstrate(world, world.prompts[10:20], DemonstratorConfig(), 5)
    assert [pair.demonstration.text for pair in again] == [pair.demonstration.text for pair in pairs[10:20]]
    for prompt, demonstration in pairs:
        assert demonstration.source == "human" and demonstration.parents == (prompt.id,)
        assert (demonstration.prompt_group_id, demonstration.split) == (prompt.prompt_group_id, prompt.split)
        assert int(demonstration.producer_id.removeprefix("demonstrator-")) < DemonstratorConfig().num_demonstrators
    other = demonstrate(world, world.prompts, DemonstratorConfig(), 6)
    assert [pair.demonstration.text for pair in other] != [pair.demonstration.text for pair in pairs]


def test_demonstrators_differ_in_care() -> None:
    rates = {}
    for seed in range(3):
        config = CAREFUL.model_copy(update={"num_demonstrators": 3, "wrong_rate": 0.5, "invent_rate": 0.5})
        pairs = demonstrate(asked(), asked().prompts[:500], config, seed)
        for pair in pairs:
            good = pair.demonstration.text in asked().items[pair.prompt.id].good
            rates.setdefault((seed, pair.demonstration.producer_id), []).append(good)
    shares = [sum(found) / len(found) for found in rates.values()]
    assert len(shares) == 9 and max(shares) - min(shares) > 0.15
