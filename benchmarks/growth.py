"""How time grows with the work: 1, 2, 4 and 8 times the prompts, K, length, vocabulary and layers.

A doubling that doubles the time gives an exponent of 1. Below 1 a fixed part of the cost is shared (prompts, K), above
1 something grows faster than the work (attention with length).
"""

import math
import os
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from benchmarks.harness import RESULTS, machine, write
from benchmarks.limits import seconds_of
from benchmarks.workloads import random_llama

STEPS = (1, 2, 4, 8)


def sampling(num_prompts: int = 4, num_samples: int = 4) -> Callable[[], Any]:
    """Return the sampling of 32 tokens for prompts of 64."""
    from qinglan.models.generate import SamplingConfig, generate

    lm = random_llama()
    endless = lm._replace(chat=lm.chat._replace(end_ids=frozenset()))
    config = SamplingConfig(max_new_tokens=32)
    prompts = [[7 + number] * 64 for number in range(num_prompts)]
    return lambda: generate(endless, prompts, config, seed=0, num_samples=num_samples)


def rankings(num_completions: int) -> Callable[[], Any]:
    """Return one reward-model update on 4 prompts of 64 tokens with K completions of 24."""
    from qinglan.core.records import Ranking, pairs_of
    from qinglan.learn.reward import EncodedGroup, RewardConfig, update
    from qinglan.models.heads import scalar_model_from

    rng = random.Random(0)
    lm = random_llama()
    scalar = scalar_model_from(lm, seed=0)
    pairs = pairs_of(Ranking(groups=tuple((place,) for place in range(num_completions))))
    groups = [
        EncodedGroup([_sequence(rng, 64, 24) for _ in range(1)] * num_completions, pairs, 1.0, "human")
        for _ in range(4)
    ]
    config = RewardConfig(max_tokens=2048)
    optimizer = config.optimizer.make(scalar.model)
    return lambda: update(scalar, optimizer, groups, config, 0, "growth")


def fine_tuning(length: int = 64, vocabulary: int = 1024, num_layers: int = 4) -> Callable[[], Any]:
    """Return one SFT update on 8 sequences."""
    from qinglan.learn.sft import SFTConfig, update

    rng = random.Random(0)
    lm = random_llama(num_layers=num_layers, vocabulary=vocabulary)
    sequences = [_sequence(rng, length // 4, length - length // 4) for _ in range(8)]
    config = SFTConfig(max_tokens=2048)
    optimizer = config.optimizer.make(lm.model)
    return lambda: update(lm, optimizer, sequences, [], config, 0, "growth")


def _sequence(rng: random.Random, num_prompt: int, num_completion: int) -> Any:
    from qinglan.models.language_model import TokenSequence

    return TokenSequence([rng.randrange(1000) for _ in range(num_prompt + num_completion)], num_prompt)


AXES: dict[str, Callable[[int], Callable[[], Any]]] = {
    "sampling: prompts (4 ... 32)": lambda step: sampling(num_prompts=4 * step),
    "sampling: K (2 ... 16)": lambda step: sampling(num_samples=2 * step),
    "reward model: K (2 ... 16)": lambda step: rankings(2 * step),
    "fine-tuning: length (64 ... 512)": lambda step: fine_tuning(length=64 * step),
    "fine-tuning: vocabulary (1,024 ... 8,192)": lambda step: fine_tuning(vocabulary=1024 * step),
    "fine-tuning: layers (2 ... 16)": lambda step: fine_tuning(num_layers=2 * step),
}


def main() -> None:
    """Measure and write results/growth.json."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    axes = {}
    for name, make in AXES.items():
        seconds = [seconds_of(make(step), 3) for step in STEPS]
        exponents = [math.log2(b["cpu"] / a["cpu"]) for a, b in pairwise(seconds)]
        axes[name] = {"times": STEPS, "seconds": seconds, "exponents_by_cpu": exponents}
        print(
            f"growth: {name}: {[round(one['cpu'], 3) for one in seconds]} CPU seconds, exponents "
            f"{[round(e, 2) for e in exponents]}",
            flush=True,
        )
    settings = machine() | {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
    write(RESULTS / "growth.json", {"axes": axes, "settings": settings})
