"""A reward model on human comparisons: ours and TRL's `RewardTrainer` on the same pairs, start, epoch and split.

    python -m benchmarks.human_comparisons --model DIR --comparisons FILE --out FILE.json

Both sides start from the same weights, head included, read the same token ids, and take steps of 8 pairs over one
epoch, with AdamW (betas 0.9 and 0.95, no decay), a cosine to nothing or nearly so, and gradients clipped at 1. Each
side gets its best of several learning rates by accuracy on a validation part of the training side (one seed); the test
side is read once for each seed, by the same function. Whole prompt groups stay on one side.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import ROOT, machine, write
from benchmarks.ours import new_stage
from qinglan.core.device import Device, prepare_process
from qinglan.core.records import ComparisonGroup, pairs_of
from qinglan.core.rng import permutation
from qinglan.data.load import load_comparisons
from qinglan.data.prompts import split_by_group
from qinglan.evals.metrics import mean_difference, mean_with_interval
from qinglan.learn.encode import encode_completion
from qinglan.learn.optimize import OptimizerConfig
from qinglan.learn.reward import RewardConfig, train_reward_model
from qinglan.models.heads import ScalarModel, save_scalar_model, scalar_model_from, score_sequences
from qinglan.models.language_model import LanguageModel, load_language_model, max_context

BATCH = 8
RATES = (1e-4, 3e-4, 1e-3)


class Sides(NamedTuple):
    """Comparisons by use; `train` and `valid` together are what the final models learn from."""

    train: list[ComparisonGroup]
    valid: list[ComparisonGroup]
    test: list[ComparisonGroup]


def read_sides(lm: LanguageModel, path: Path, seed: int) -> Sides:
    """Return pairs that fit into the context, three quarters for training (a sixth of them for validation)."""
    groups = load_comparisons(path, on_bad="skip").records
    limit = max_context(lm.model)
    fitting = [
        group
        for group in groups
        if pairs_of(group.comparison.label)
        and max(len(encode_completion(lm.chat, group.prompt, c).token_ids) for c in group.completions) <= limit
    ]
    sides = split_by_group(fitting, {"train": 0.75, "valid": 0.25}, seed)
    parts = split_by_group(sides["train"], {"train": 5 / 6, "valid": 1 / 6}, seed + 1)
    return Sides(parts["train"], parts["valid"], sides["valid"])


def is_right(scalar: ScalarModel, groups: Sequence[ComparisonGroup]) -> np.ndarray:
    """Return for each pair 1 where the better completion scores higher, 0 where lower, one half where equal."""
    sequences, places = [], []
    for group in groups:
        pair = pairs_of(group.comparison.label)[0]
        for item in (pair.first, pair.second):
            sequences.append(encode_completion(scalar.chat, group.prompt, group.completions[item]))
        places.append(pair.p_first_better)
    scores = score_sequences(scalar, sequences).view(-1, 2)
    gaps = np.asarray(scores[:, 0] - scores[:, 1]) * np.where(np.asarray(places) > 0.5, 1.0, -1.0)
    return np.where(gaps > 0, 1.0, np.where(gaps < 0, 0.0, 0.5))


def train_ours(lm: LanguageModel, groups: Sequence[ComparisonGroup], rate: float, seed: int) -> ScalarModel:
    """Return our reward model."""
    stage, folder = new_stage()
    config = RewardConfig(optimizer=OptimizerConfig(learning_rate=rate), batch_size=BATCH)
    scalar = train_reward_model(lm, groups, config, stage=stage, seed=seed)
    folder.cleanup()
    return scalar


def train_trl(lm: LanguageModel, groups: Sequence[ComparisonGroup], rate: float, seed: int) -> ScalarModel:
    """Return TRL's reward model, from the very weights that ours starts with, in the same order of pairs."""
    import trl
    from datasets import Dataset

    from benchmarks.trl_side import arguments
    from qinglan.core.rng import stream_seed

    start = scalar_model_from(lm, seed=stream_seed(seed, "reward", "head"))
    rows = []
    for index in permutation(len(groups), seed, "reward", "order", 0):
        group = groups[index]
        pair = pairs_of(group.comparison.label)[0]
        better, worse = (pair.first, pair.second) if pair.p_first_better > 0.5 else (pair.second, pair.first)
        ids = [encode_completion(lm.chat, group.prompt, group.completions[item]).token_ids for item in (better, worse)]
        rows.append({"chosen_ids": ids[0], "rejected_ids": ids[1]})
    changes: dict[str, Any] = {"learning_rate": rate, "per_device_train_batch_size": BATCH, "max_length": None}
    changes |= {"lr_scheduler_type": "cosine", "train_sampling_strategy": "sequential", "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        save_scalar_model(start, Path(folder) / "start")
        args = trl.RewardConfig(**arguments(output_dir=folder, **changes))
        trainer = trl.RewardTrainer(
            model=start.model, args=args, train_dataset=Dataset.from_list(rows), processing_class=lm.tokenizer
        )
        trainer.train()
    return start._replace(model=trainer.model.eval())


def outcome(
    name: str, lm: LanguageModel, train: Sequence[ComparisonGroup], seen: Sequence[ComparisonGroup], *,
    rate: float, seed: int, cache: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train one side and return which pairs of `seen` it orders rightly, and its seconds; kept in `cache`."""
    file = cache / f"{name}-{len(train)}-{rate}-{seed}.json"
    if not file.is_file():
        wall, cpu = time.monotonic(), time.process_time()
        scalar = {"ours": train_ours, "trl": train_trl}[name](lm, train, rate, seed)
        seconds, cpu_seconds = time.monotonic() - wall, time.process_time() - cpu
        right = is_right(scalar, seen).tolist()
        write(file, {"right": right, "seconds": seconds, "cpu_seconds": cpu_seconds})
        print(f"{name}, rate {rate}, seed {seed}: {np.mean(right):.3f}, {cpu_seconds:.0f} CPU seconds", flush=True)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def run_side(name: str, lm: LanguageModel, sides: Sides, seeds: Sequence[int], cache: Path) -> dict[str, Any]:
    """Choose the rate on the validation part, then train on both parts with every seed and look at the test side."""
    valid = {
        rate: float(np.mean(outcome(name, lm, sides.train, sides.valid, rate=rate, seed=0, cache=cache)["right"]))
        for rate in RATES
    }
    best = max(RATES, key=lambda rate: valid[rate])
    whole = [*sides.train, *sides.valid]
    every = [outcome(name, lm, whole, sides.test, rate=best, seed=seed, cache=cache) for seed in seeds]
    return {
        "rate": best,
        "valid_accuracy": {str(rate): accuracy for rate, accuracy in valid.items()},
        "test_accuracy_by_seed": {str(s): float(np.mean(one["right"])) for s, one in zip(seeds, every, strict=True)},
        "cpu_seconds": float(np.median([one["cpu_seconds"] for one in every])),
        "right": np.mean([one["right"] for one in every], axis=0),
    }


def main() -> None:
    """Choose rates, train three seeds of each side, write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--comparisons", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--side", choices=("ours", "trl"), help="train one side only; finished trainings are kept")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "human_comparisons")
    chosen = parser.parse_args()
    prepare_process()
    lm = load_language_model(chosen.model, Device.detect("cpu"), template="plain")
    sides = read_sides(lm, chosen.comparisons, seed=0)
    found = {
        name: run_side(name, lm, sides, chosen.seeds, chosen.cache)
        for name in ("ours", "trl")
        if chosen.side in (None, name)
    }
    if chosen.side:
        return
    prompts = [group.prompt.prompt_group_id for group in sides.test]
    right = {name: one.pop("right") for name, one in found.items()}
    for name, values in right.items():
        found[name]["test_accuracy"] = mean_with_interval(values, prompts, seed=0)._asdict()
    before = is_right(scalar_model_from(lm, seed=0), sides.test)
    result = {
        "pairs": {name: len(part) for name, part in sides._asdict().items()},
        **found,
        "ours_minus_trl": mean_difference(right["ours"], right["trl"], prompts, seed=0)._asdict(),
        "random_head": mean_with_interval(before, prompts, seed=0)._asdict(),
        "settings": machine(),
    }
    write(chosen.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
