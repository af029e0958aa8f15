"""Reward model on rankings of K = 9 completions, all 36 pairs: ours against TRL's `RewardTrainer`.

Prompts of 64 words, completions of 10 to 40; 4 prompts, that is 144 pairs, in one optimizer step on both sides. The
peer reads both texts of every pair in full. Ours reads a prompt once and each completion once (`learn/reward.py`).
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any

from benchmarks.workloads import Workload

UNIT = "comparisons (pairs) per second"
PEER_NAME = "TRL 1.16 RewardTrainer"
MUST_REACH, AIM = 8.0, 20.0
PROMPTS_PER_STEP = 4
OURS = {
    "llama": [
        {"max_tokens": 2048, "num_prompts": 16},
        {"max_tokens": 8192, "num_prompts": 16},
    ],
    "mini": [{"max_tokens": 2048, "num_prompts": 16}],
    "base": [{"max_tokens": 2048, "num_prompts": 4}],
}
PEER: dict[str, list[dict[str, Any]]] = {
    "llama": [{"batch": size} for size in (4, 12, 36)] + [{"batch": 12, "by_length": True}],
    "mini": [{"batch": 12, "by_length": True}],
    "base": [{"batch": 12, "by_length": True}],
}


def ours(work: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], float]]:
    """Return slices of `train_reward_model`."""
    from benchmarks.ours import load, new_stage, ranked_groups
    from qinglan.learn.reward import RewardConfig, train_reward_model

    start = load(work, options["dtype"])
    groups = ranked_groups(work.data["rankings"][: options["num_prompts"]])
    config = RewardConfig(batch_size=PROMPTS_PER_STEP, max_tokens=options["max_tokens"])

    def make_slice() -> Callable[[], float]:
        stage, folder = new_stage()

        def run() -> float:
            train_reward_model(start, groups, config, stage=stage, seed=0)
            folder.cleanup()
            return 36.0 * len(groups)

        return run

    return make_slice


def peer(work: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], float]]:
    """Return slices of `RewardTrainer.train`: one optimizer step."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from benchmarks.trl_side import arguments, scalar_model, tokenizer_of

    tokenizer = tokenizer_of(work)
    rows = [
        {"chosen_ids": a["prompt_ids"] + a["completion_ids"], "rejected_ids": b["prompt_ids"] + b["completion_ids"]}
        for ranking in work.data["rankings"][:PROMPTS_PER_STEP]
        for a, b in combinations(ranking, 2)
    ]
    longest = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    dataset = Dataset.from_list([{**row, "length": length} for row, length in zip(rows, longest, strict=True)])
    changes: dict[str, Any] = {"per_device_train_batch_size": options["batch"], "max_length": None}
    changes["gradient_accumulation_steps"] = 36 * PROMPTS_PER_STEP // options["batch"]
    if options.get("by_length"):
        changes |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    changes["bf16"] = options["dtype"] == "bfloat16"

    def make_slice() -> Callable[[], float]:
        args = RewardConfig(**arguments(**changes))
        model = scalar_model(work)  # fresh: a trainer leaves its wrappers on a model
        trainer = RewardTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)

        def run() -> float:
            trainer.train()
            return float(len(dataset))

        return run

    return make_slice
