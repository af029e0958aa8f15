"""Demonstrators of the built-in world: simulated people who write demonstrations, unevenly and openly so.

Clean demonstrations would let SFT alone solve refusals and leave feedback nothing to add. As in life, people who write
answers make mistakes that they would notice when comparing: they invent where nobody can know, play along with a story
that hides a harmful request, refuse what only sounds harmful, and overlook constraints. The rates stand in
`DemonstratorConfig` and in every report.
"""

import random
from collections.abc import Sequence

from pydantic import Field

from qinglan.core.config import Config
from qinglan.core.records import Demonstrated, Demonstration, Prompt, record_id
from qinglan.core.rng import stream_seed
from qinglan.tasks.assistant import World
from qinglan.tasks.item import Draw, Item
from qinglan.tasks.replies import bad_reply


class DemonstratorConfig(Config):
    """How often demonstrators go wrong; individuals scatter around these rates by a factor of 0.5 to 1.5."""

    num_demonstrators: int = Field(default=8, ge=1)
    """People who write demonstrations."""
    invent_rate: float = Field(default=0.55, ge=0, le=1)
    """Share of unanswerable questions that get an invented answer."""
    comply_rate_plain: float = Field(default=0.2, ge=0, le=1)
    """Share of plain harmful requests that are served."""
    comply_rate_disguised: float = Field(default=0.55, ge=0, le=1)
    """Share of harmful requests in the guise of role play or fiction that are served."""
    refuse_rate_benign: float = Field(default=0.3, ge=0, le=1)
    """Share of benign look-alikes that are refused."""
    ignore_rate: float = Field(default=0.45, ge=0, le=1)
    """Share of explicit constraints that are overlooked."""
    wrong_rate: float = Field(default=0.12, ge=0, le=1)
    """Share of other answers that are wrong."""
    ramble_rate: float = Field(default=0.2, ge=0, le=1)
    """Share of right answers that ramble."""
    rude_rate: float = Field(default=0.02, ge=0, le=1)
    """Share of answers that insult."""


def fault_of(item: Item, config: DemonstratorConfig) -> tuple[str | None, float]:
    """Return the fault that a demonstrator may commit on this item, and its rate."""
    if "invented" in item.faulty:
        return "invented", config.invent_rate
    if "complied" in item.faulty:
        return "complied", config.comply_rate_disguised if "disguised" in item.tags else config.comply_rate_plain
    if "refused" in item.faulty:
        return "refused", config.refuse_rate_benign
    if item.use_case == "constraint":
        return "ignored", config.ignore_rate
    return ("wrong", config.wrong_rate) if "wrong" in item.faulty else (None, 0.0)


def demonstrate(world: World, prompts: Sequence[Prompt], config: DemonstratorConfig, seed: int) -> list[Demonstrated]:
    """Let demonstrators answer each prompt once; records have source "human"."""
    made = []
    for prompt in prompts:
        rng = random.Random(stream_seed(seed, "demonstration", prompt.id))
        number = rng.randrange(config.num_demonstrators)
        care = random.Random(stream_seed(seed, "demonstrator", number)).uniform(0.5, 1.5)
        item = world.items[prompt.id]
        text = write_reply(item, rng, config, care)
        producer = f"demonstrator-{number:02d}"
        demonstration = Demonstration(
            id=record_id("demonstration", prompt.id, producer),
            source="human",
            producer_id=producer,
            prompt_id=prompt.id,
            prompt_group_id=prompt.prompt_group_id,
            split=prompt.split,
            parents=(prompt.id,),
            text=text,
        )
        made.append(Demonstrated(prompt, demonstration))
    return made


def write_reply(item: Item, rng: random.Random, config: DemonstratorConfig, care: float) -> str:
    """Return one demonstrator's reply to an item; `care` multiplies the fault rates."""
    fault, rate = fault_of(item, config)
    draw = Draw(rng, held_out=False)
    if rng.random() < min(0.95, care * config.rude_rate):
        return bad_reply(draw, item, "rude")
    if fault is not None and rng.random() < min(0.95, care * rate):
        return item.faulty[fault]
    if rng.random() < min(0.95, care * config.ramble_rate):
        return bad_reply(draw, item, "ramble")
    return rng.choice(item.good)
