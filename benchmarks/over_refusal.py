"""Who refuses what, on acts that were asked about in training and on held-out ones, in a finished quickstart.

    python -m benchmarks.over_refusal runs/quickstart

For 100 harmless look-alikes and 100 harmful requests of each split: how the reward model scores a right reply, a
refusal and a faulty reply, and how often each trained model refuses, serves harm and helps, sampled and greedy.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from qinglan.core.device import Device
from qinglan.core.records import Completion, Scorer, Split
from qinglan.models.generate import SamplingConfig, sample_completions
from qinglan.models.heads import as_scorer, load_scalar_model
from qinglan.models.language_model import load_language_model
from qinglan.tasks.assistant import World, draw_prompts, overall
from qinglan.tasks.assistant_data import given_completion
from qinglan.tasks.safety import REFUSALS

NUM_PROMPTS = 100
MODELS = ("start", "baseline", "ppo", "ppo_ceiling")
SPLITS: tuple[Split, ...] = ("train", "test")


def reward_line(world: World, scorer: Scorer) -> str:
    """Return the reward model's mean score of right, refusing and faulty replies."""
    prompts, made = world.prompts, partial(given_completion, producer_id="over-refusal")
    kinds = {
        "right": [made(prompt, world.items[prompt.id].good[0]) for prompt in prompts],
        "refusal": [made(prompt, REFUSALS[i % len(REFUSALS)]) for i, prompt in enumerate(prompts)],
        "faulty": [made(prompt, [*world.items[prompt.id].faulty.values()][-1]) for prompt in prompts],
    }
    return "  ".join(f"{kind} {mean(scorer(prompts, replies)):+.2f}" for kind, replies in kinds.items())


def model_line(world: World, completions: Sequence[Completion]) -> str:
    """Return rates of refusal and harm, and mean helpfulness and gold score."""
    grades = [world.grade(prompt, one) for prompt, one in zip(world.prompts, completions, strict=True)]
    return (
        f"refused {mean(one.refused for one in grades):.2f}  harmful {mean(one.harmful for one in grades):.2f}  "
        f"helpful {mean(one.helpful for one in grades):.2f}  gold {mean(overall(one) for one in grades):.2f}"
    )


def main(run: Path) -> None:
    """Print the lines for one run folder."""
    device = Device.detect("cpu")
    scorer = as_scorer(load_scalar_model(run / "stages" / "reward_model" / "model", device))
    for use_case in ("benign", "harmful"):
        for split in SPLITS:
            world = draw_prompts(NUM_PROMPTS, 5, split, use_case=use_case)
            print(f"{use_case}, {split}: reward model: {reward_line(world, scorer)}")
            for name in MODELS:
                lm = load_language_model(run / "stages" / name / "model", device)
                for temperature in (1.0, 0.0):
                    sampling = SamplingConfig(max_new_tokens=48, temperature=temperature)
                    sampled = sample_completions(lm, world.prompts, sampling, seed=1)
                    shown = model_line(world, [row[0] for row in sampled])
                    print(f"  {name:<12} {'sampled' if temperature else 'greedy ':<8} {shown}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
