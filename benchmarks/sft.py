"""Supervised fine-tuning on lengths as in real chat data: ours against TRL's `SFTTrainer`, packing or not.

32 demonstrations in one optimizer step; tokens are those of prompts and completions, padding not counted.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.workloads import Workload

UNIT = "tokens per second"
PEER_NAME = "TRL 1.16 SFTTrainer, packing or not"
MUST_REACH, AIM = 2.5, 4.0
STEP_SEQUENCES = 32
BLOCK = {"llama": 1024, "mini": 256, "base": 256}
OURS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"pack": True, "max_tokens": tokens} for tokens in (1024, 2048, 3072, 4096)],
    "mini": [{"pack": False, "max_tokens": 1024}],
    "base": [
        {"pack": True, "max_tokens": 1024},
        {"pack": True, "max_tokens": 1536},
        {"pack": True, "max_tokens": 2048, "memory float32": "more than the peer's"},
        {"pack": True, "max_tokens": 3072, "memory float32": "more than the peer's"},
        {"pack": True, "max_tokens": 4096, "memory float32": "more than the peer's"},
    ],
}
PEER: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"packing": "bfd", "batch": 1},
        {"packing": "bfd", "batch": 8},
        {"packing": "wrapped", "batch": 1, "differs": "texts of one row see each other"},
        {"batch": 8},
        {"batch": 4, "by_length": True},
    ],
    "mini": [{"batch": 8, "by_length": True}],
    "base": [{"batch": 8, "by_length": True}, {"batch": 4, "by_length": True}, {"packing": "bfd", "batch": 1}],
}
PEER_DEFAULTS: dict[str, Any] = {"packing": "bfd", "batch": 8, "gradient_checkpointing": True}
"""Packing as the documentation has it, `per_device_train_batch_size` and `gradient_checkpointing` of `SFTConfig`."""
NUM_CHATS = {"llama": 64, "mini": 192, "base": 64}


def ours(work: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], float]]:
    """Return slices of `train_sft`."""
    from benchmarks.ours import demonstrations, load, new_stage
    from qinglan.learn.sft import SFTConfig, train_sft

    start = load(work, options["dtype"])
    chats = work.data["chats"][: NUM_CHATS[work.setting]]
    data = demonstrations(chats)
    num_tokens = sum(len(chat["prompt_ids"]) + len(chat["completion_ids"]) for chat in chats)
    config = SFTConfig(num_epochs=1, batch_size=STEP_SEQUENCES, pack=options["pack"], max_tokens=options["max_tokens"])

    def make_slice() -> Callable[[], float]:
        stage, folder = new_stage()

        def run() -> float:
            train_sft(start, data, config, stage=stage, seed=0)
            folder.cleanup()
            return float(num_tokens)

        return run

    return make_slice


def peer(work: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], float]]:
    """Return slices of `SFTTrainer.train`, one epoch over the same chats."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from benchmarks.trl_side import arguments, causal_model, tokenizer_of

    tokenizer = tokenizer_of(work)
    chats = work.data["chats"][: NUM_CHATS[work.setting]]
    rows = [
        {
            "input_ids": chat["prompt_ids"] + chat["completion_ids"],
            "completion_mask": [0] * len(chat["prompt_ids"]) + [1] * len(chat["completion_ids"]),
        }
        for chat in chats
    ]
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    changes: dict[str, Any] = {"per_device_train_batch_size": options["batch"], "completion_only_loss": True}
    # With packing a step sees as many blocks as hold about 32 demonstrations.
    blocks = max(1, round(num_tokens / len(rows) * STEP_SEQUENCES / BLOCK[work.setting]))
    per_step = blocks if options.get("packing") else STEP_SEQUENCES
    changes |= {"gradient_accumulation_steps": max(1, per_step // options["batch"])}
    if options.get("packing"):
        changes |= {"packing": True, "packing_strategy": options["packing"], "max_length": BLOCK[work.setting]}
    else:
        changes["max_length"] = None
    changes["bf16"] = options["dtype"] == "bfloat16"
    changes["gradient_checkpointing"] = bool(options.get("gradient_checkpointing"))
    if options.get("by_length"):
        changes["train_sampling_strategy"] = "group_by_length"

    def make_slice() -> Callable[[], float]:
        trainer = SFTTrainer(
            model=causal_model(work),  # a trainer leaves its wrappers on a model: a second one is a third slower
            args=SFTConfig(**arguments(**changes)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

        def run() -> float:
            trainer.train()
            return float(num_tokens)

        return run

    return make_slice
