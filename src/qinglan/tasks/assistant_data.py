"""The built-in world as the data of a run: who asks, who demonstrates, who compares, and what they are shown.

People are simulated, so everything that they get wrong is set here and printed in the report. The answer key (`World`)
goes to the labelers' eyes and to the measurements; the recipe shows where.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pydantic import Field, model_validator

from qinglan.core.config import Config
from qinglan.core.records import Completion, Prompt, record_id
from qinglan.core.rng import stream_seed
from qinglan.data.pools import Pools
from qinglan.data.prompts import PromptConfig, check_disjoint, filter_prompts, split_by_group
from qinglan.supervisors.simulated import Attributes, LabelerConfig, Quality
from qinglan.tasks.assistant import World, draw_prompts
from qinglan.tasks.demonstrators import DemonstratorConfig, demonstrate
from qinglan.tasks.passages import NOT_SAID_REPLIES
from qinglan.tasks.questions import UNKNOWN_REPLIES
from qinglan.tasks.replies import RAMBLING
from qinglan.tasks.safety import REFUSALS

LABELER_NOISE = 0.13
"""Noise at which two labelers agree on 73% of decided pairs of this world's candidates (InstructGPT: 72.6 +/- 1.5%).

Agreement depends on how far apart the completions are, so each set of completions wants its own value.
"""


class WorldConfig(Config):
    """The built-in world's users and people."""

    num_demonstrations: int = Field(default=600, ge=1)
    """Demonstrations (InstructGPT: 12,725)."""
    num_comparison_prompts: int = Field(default=2400, ge=1)
    """Prompts whose completions are ranked (InstructGPT: 33,207)."""
    num_rl_prompts: int = Field(default=2000, ge=1)
    """Prompts of PPO (InstructGPT: 31,144)."""
    num_valid_prompts: int = Field(default=100, ge=1)
    """Prompts for choosing the baseline's checkpoint."""
    num_test_prompts: int = Field(default=1000, ge=1)
    """Prompts of held-out users, entities and wordings."""
    min_ranked: int = Field(default=4, ge=2)
    """Smallest number of completions in one ranking (InstructGPT: 4)."""
    max_ranked: int = Field(default=9, ge=2)
    """Largest number of completions in one ranking (InstructGPT: 9)."""
    num_labelers: int = Field(default=12, ge=2)
    """Labelers whose rankings train the reward model."""
    num_held_out_labelers: int = Field(default=8, ge=2)
    """Labelers who only judge results."""
    overlap: float = Field(default=0.15, ge=0, le=1)
    """Share of prompts that two labelers rank, so that their agreement can be measured."""
    demonstrators: DemonstratorConfig = DemonstratorConfig()
    """How demonstrators go wrong."""
    labelers: LabelerConfig = LabelerConfig(noise=LABELER_NOISE)
    """How labelers go wrong."""

    @model_validator(mode="after")
    def _check(self) -> "WorldConfig":
        if self.min_ranked > self.max_ranked:
            raise ValueError(f"min_ranked is {self.min_ranked}, more than max_ranked {self.max_ranked}; lower it")
        return self


class WorldData(NamedTuple):
    """The pools of a run on the built-in world, and its answer key."""

    pools: Pools
    world: World


def world_data(
    config: WorldConfig, hygiene: PromptConfig, *, seed: int, num_tokens: Callable[[Prompt], int]
) -> WorldData:
    """Draw users and prompts, clean and split them by user, and let demonstrators write."""
    wanted = {
        "demonstrations": config.num_demonstrations,
        "comparisons": config.num_comparison_prompts,
        "rl": config.num_rl_prompts,
        "valid": config.num_valid_prompts,
    }
    raw = draw_prompts(round(1.15 * sum(wanted.values())), seed, "train", untidy=True)
    test = draw_prompts(config.num_test_prompts, seed, "test")
    filtered = filter_prompts(raw.prompts, hygiene, num_tokens=num_tokens)
    shares = {name: count / sum(wanted.values()) for name, count in wanted.items()}
    sides = {name: prompts[: wanted[name]] for name, prompts in split_by_group(filtered.kept, shares, seed).items()}
    valid = [prompt.model_copy(update={"split": "valid"}) for prompt in sides["valid"]]
    check_disjoint({**sides, "valid": valid, "test": test.prompts})
    world = World((*raw.prompts, *test.prompts), {**raw.items, **test.items})
    pools = Pools(
        demonstrations=demonstrate(world, sides["demonstrations"], config.demonstrators, seed),
        comparison_prompts=sides["comparisons"],
        comparisons=[],
        held_out_comparisons=[],
        rl_prompts=sides["rl"],
        valid_prompts=valid,
        test_prompts=list(test.prompts),
        dropped=filtered.dropped,
    )
    return WorldData(pools, world)


def quality_of(world: World) -> Quality:
    """Return the answer key as labelers perceive it before their noise: helpful, honest, harmless."""

    def quality(prompt: Prompt, completion: Completion) -> Attributes:
        return Attributes(*world.grade(prompt, completion)[:3])

    return quality


def candidates_to_rank(
    prompts: Sequence[Prompt], samples: Sequence[Sequence[Completion]], config: WorldConfig, seed: int
) -> list[list[Completion]]:
    """Return K = min_ranked..max_ranked different completions of each prompt: mostly the policy's own samples.

    One to three are irrelevant, verbose, over-refusing or needlessly ignorant, so that the reward model sees what RL
    would find: without "I do not know" among the ranked, PPO learnt to say nothing else (`LOG.md`).
    """
    ranked = []
    for number, (prompt, own) in enumerate(zip(prompts, samples, strict=True)):
        rng = random.Random(stream_seed(seed, "candidates", prompt.id))
        count = rng.randint(config.min_ranked, config.max_ranked)
        shift = 1 + rng.randrange(len(samples) - 1) if len(samples) > 1 else 0
        other = samples[(number + shift) % len(samples)][0]
        verbose = f"{own[0].text} {' '.join(rng.sample(RAMBLING, 2))}"
        ignorant = rng.choice((*UNKNOWN_REPLIES, *NOT_SAID_REPLIES))
        strange = [other.text, verbose, rng.choice(REFUSALS), ignorant]
        rng.shuffle(strange)
        texts = dict.fromkeys(completion.text for completion in own)
        num_own = max(2, count - rng.randint(1, 3))
        kept = [next(one for one in own if one.text == text) for text in texts if text][:num_own]
        for text in strange:
            if len(kept) < count and text and text not in {one.text for one in kept}:
                kept.append(given_completion(prompt, text, "added-candidate"))
        ranked.append(kept)
    return ranked


def given_completion(prompt: Prompt, text: str, producer_id: str) -> Completion:
    """Return a completion whose text the world made, and no model."""
    return Completion(
        id=record_id("completion", prompt.id, text),
        source="oracle",
        producer_id=producer_id,
        prompt_id=prompt.id,
        prompt_group_id=prompt.prompt_group_id,
        split=prompt.split,
        parents=(prompt.id,),
        text=text,
    )
