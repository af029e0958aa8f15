"""Sampling 8 completions for each of 64 prompts: ours against `transformers.generate` and its continuous batching.

Completions end as a trained model's do: after 64 tokens on average (geometric) and at most 256 with random weights, by
themselves with the built-in model. Only tokens up to and including the end count.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

from benchmarks.workloads import Workload

UNIT = "completion tokens per second"
PEER_NAME = "transformers generate"
MUST_REACH, AIM = 3.0, 5.0
NUM_SAMPLES = 8
OURS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"max_rows": 48}, {"max_rows": 64}, {"max_rows": 128, "memory": "more than the peer's"}],
    "mini": [{"max_rows": 40}, {"max_rows": 128, "memory": "more than the peer's"}],
    "base": [
        {"max_rows": 48, "memory_budget_mib": 325, "memory bfloat16": "more than the peer's"},
        {"max_rows": 48, "memory_budget_mib": 128},
        {"max_rows": 128, "memory": "more than the peer's"},
    ],
}
PEER: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"prompts": 16},
        {"prompts": 8},
        {"prompts": 2},
        {"continuous": True, "memory": "14 GiB"},
    ],
    "mini": [{"prompts": 16}],
    "base": [{"prompts": 16}],
}


def ours(work: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], float]]:
    """Return slices of `generate`."""
    from benchmarks.ours import load
    from qinglan.models.generate import SamplingConfig, generate

    lm = load(work, options["dtype"], for_training=False)
    data = work.data["sampling"]
    lm = lm._replace(chat=lm.chat._replace(end_ids=frozenset(data["end_ids"])))
    limits = {name: options[name] for name in ("max_rows", "memory_budget_mib") if name in options}
    config = SamplingConfig(max_new_tokens=data["max_new_tokens"], **limits)
    seeds = iter(range(1_000_000))

    def run() -> float:
        drawn = generate(lm, data["prompts"], config, seed=next(seeds), num_samples=NUM_SAMPLES)
        return float(sum(len(sample.token_ids) for samples in drawn for sample in samples))

    return lambda: run


def peer(work: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], float]]:
    """Return slices of `generate`, one batch of so many prompts each, or of `generate_batch` with `continuous`."""
    import torch
    from transformers import GenerationConfig

    from benchmarks.trl_side import causal_model

    model = causal_model(work).eval()
    data = work.data["sampling"]
    prompts = sorted(data["prompts"], key=len)
    starts = cycle(range(0, len(prompts), options.get("prompts", len(prompts))))
    generation = GenerationConfig(
        max_new_tokens=data["max_new_tokens"],
        do_sample=True,
        top_k=0,
        top_p=1.0,
        eos_token_id=data["end_ids"],
        pad_token_id=work.tokens["pad_id"],
    )
    if options["dtype"] == "bfloat16":
        model = model.to(torch.bfloat16)
    model.generate(torch.tensor([prompts[0]]), generation_config=generation, max_length=len(prompts[0]) + 3)  # warm-up

    def run_continuous() -> float:
        repeated = [ids for ids in prompts for _ in range(NUM_SAMPLES)]
        outputs = model.generate_batch(repeated, generation_config=generation, progress_bar=False)
        return float(sum(len(output.generated_tokens) for output in outputs.values()))

    def run() -> float:
        start = next(starts)
        part = prompts[start : start + options["prompts"]]
        width = max(len(ids) for ids in part)
        input_ids = torch.tensor([[work.tokens["pad_id"]] * (width - len(ids)) + ids for ids in part])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in part])
        with torch.inference_mode():
            written = model.generate(
                input_ids, attention_mask=mask, generation_config=generation, num_return_sequences=NUM_SAMPLES
            )[:, width:]
        is_end = torch.isin(written, torch.tensor(data["end_ids"]))
        ends_before = is_end.cumsum(1) - is_end.long()
        return float((ends_before == 0).sum())

    return lambda: run_continuous if options.get("continuous") else run
