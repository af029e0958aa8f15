"""Choices of pretraining, one changed at a time: held-out loss of `nano` after some hundred thousand tokens, by seed.

    python -m benchmarks.ablations OUT.json [--seeds 3] [--tokens 600000] [NAME ...]

A seed draws weights and corpus; variants of one seed read the same blocks, so differences are paired. The held-out loss
is that of the default corpus for all, with its weights, and once more over verdicts alone.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn

from qinglan.core.device import Device
from qinglan.core.rng import stream
from qinglan.learn.blocks import Blocks, BlockSource, read_blocks
from qinglan.learn.pretrain import HELD_OUT_FIRST_BLOCK
from qinglan.learn.pretrain_config import PretrainConfig
from qinglan.learn.pretrain_update import Optimizers, make_optimizers, make_work, update
from qinglan.models.language_model import LanguageModel
from qinglan.tasks import base_models
from qinglan.tasks.base_models import CONTEXT, SIZES, Size, base_tokenizer, build
from qinglan.tasks.corpus import CorpusBlocks
from qinglan.tasks.document import VERDICT

PARTS = ("plain", "induction", "judging", "code", "chess")
EARLY = 0.1
NUM_HELD_OUT = 64


class Variant(NamedTuple):
    """What one variant changes."""

    config: Mapping[str, Any] = MappingProxyType({})
    shape: Size = SIZES["nano"]
    constants: Mapping[str, float] = MappingProxyType({})
    """Of `tasks/base_models.py`."""
    change: Callable[[LanguageModel], None] | None = None
    """Applied to the freshly drawn model."""
    weights: Callable[[Tensor], Tensor] | None = None
    """Applied to the loss weights in training."""
    parts: tuple[str, ...] = PARTS
    early: float = EARLY
    only_adamw: float | None = None
    """AdamW for everything, at this rate."""


def draw_outputs(lm: LanguageModel) -> None:
    """Draw the matrices that start at zero."""
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                values = torch.randn(parameter.shape, generator=stream(0, "ablation", name))
                parameter.copy_(values * parameter.shape[1] ** -0.5)


def drop_qk_norm(lm: LanguageModel) -> None:
    """Take the norms of queries and keys away."""
    for layer in lm.model.base_model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()


VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "muon 0.02": Variant({"muon_lr": 0.02}),
    "muon 0.08": Variant({"muon_lr": 0.08}),
    "adamw 0.003": Variant({"adamw_lr": 0.003}),
    "adamw 0.03": Variant({"adamw_lr": 0.03}),
    "no muon, adamw 0.003": Variant(only_adamw=0.003),
    "no muon, adamw 0.01": Variant(only_adamw=0.01),
    "batch 2048": Variant({"batch_tokens": 2048}),
    "batch 4096": Variant({"batch_tokens": 4096}),
    "cosine": Variant({"schedule": "cosine"}),
    "linear": Variant({"schedule": "linear"}),
    "rope base 100": Variant(constants={"ROPE_BASE": 100.0}),
    "rope base 10000": Variant(constants={"ROPE_BASE": 10_000.0}),
    "embeddings 0.02": Variant(constants={"EMBEDDING_STD": 0.02}),
    "embeddings 0.2": Variant(constants={"EMBEDDING_STD": 0.2}),
    "outputs drawn": Variant(change=draw_outputs),
    "no qk-norm": Variant(change=drop_qk_norm),
    "2 layers of 80": Variant(shape=Size(2, 80, 160, 5, 16)),
    "5 layers of 48": Variant(shape=Size(5, 48, 128, 3, 16)),
    "verdicts weigh 1": Variant(weights=lambda w: w.clamp(max=1.0)),
    "verdicts weigh 10": Variant(weights=lambda w: torch.where(w >= VERDICT / 2, 2 * w, w)),
    "given text weighs 1": Variant(weights=lambda w: torch.where((w > 0) & (w < 1), torch.ones_like(w), w)),
    "no early induction": Variant(early=0.0),
    "no induction": Variant(parts=tuple(part for part in PARTS if part != "induction"), early=0.0),
}


def run(variant: Variant, seed: int, num_tokens: int) -> dict[str, float]:
    """Train one variant and return its held-out losses."""
    changes = {"num_tokens": num_tokens, "context": CONTEXT, "batch_tokens": 1024, "muon_lr": 0.04} | dict(
        variant.config
    )
    config = PretrainConfig(**changes, dtype="bfloat16")
    tokenizer = base_tokenizer()
    before = {name: getattr(base_models, name) for name in variant.constants}
    SIZES["ablation"] = variant.shape
    try:
        for name, value in variant.constants.items():
            setattr(base_models, name, value)
        lm = build("ablation", tokenizer, seed, device=Device.detect("cpu", "bfloat16"))
    finally:
        for name, value in before.items():
            setattr(base_models, name, value)
        del SIZES["ablation"]
    if variant.change is not None:
        variant.change(lm)
    num_early = round(variant.early * num_tokens / config.context)
    source = CorpusBlocks(tokenizer._tokenizer, seed, config.context, num_early, variant.parts)
    optimizers = make_optimizers(lm, config)
    if variant.only_adamw is not None:
        config = config.model_copy(update={"adamw_lr": variant.only_adamw})
        adamw = torch.optim.AdamW(lm.model.parameters(), variant.only_adamw, config.betas, weight_decay=0.0, fused=True)
        optimizers = Optimizers(None, adamw)
    work = make_work(lm, optimizers, config)
    for step in range(config.num_steps):
        batch = read_blocks(source, step * config.batch_size, config.batch_size, config.context)
        if variant.weights is not None:
            batch = batch._replace(weights=variant.weights(batch.weights))
        update(work, config, batch, step, "ablation")
    return held_out(lm, CorpusBlocks(tokenizer._tokenizer, seed, CONTEXT, 0, PARTS))


@torch.inference_mode()
def held_out(lm: LanguageModel, source: BlockSource) -> dict[str, float]:
    """Return the weighted loss on blocks that nobody trains on, and that of verdicts alone; nats per token."""
    sums = {"loss": [0.0, 0.0], "verdicts": [0.0, 0.0]}
    for first in range(0, NUM_HELD_OUT, 16):
        batch: Blocks = read_blocks(source, HELD_OUT_FIRST_BLOCK + first, 16, CONTEXT)
        logits = lm.model(input_ids=batch.token_ids[:, :-1], use_cache=False).logits.float()
        losses = -logits.log_softmax(-1).gather(-1, batch.token_ids[:, 1:, None])[..., 0]
        weights = batch.weights[:, 1:]
        for name, chosen in (("loss", weights), ("verdicts", weights * (weights >= VERDICT))):
            sums[name][0] += float((losses * chosen).sum())
            sums[name][1] += float(chosen.sum())
    return {name: total / weight for name, (total, weight) in sums.items()}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Return mean losses and the paired difference from the default, with Student's interval over seeds."""
    lines = ["| variant | loss | less the default's | verdicts | less the default's |", "|---|---:|---:|---:|---:|"]
    for name, runs in found.items():
        cells = []
        for key in ("loss", "verdicts"):
            values = [one[key] for one in runs]
            gains = [value - base[key] for value, base in zip(values, found["default"], strict=False)]
            cells.append(f"{statistics.fmean(values):.3f}")
            if name == "default" or len(gains) < 2:
                cells.append("")
                continue
            half = float(stats.t.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / len(gains) ** 0.5
            middle = statistics.fmean(gains)
            cells.append(f"{middle:+.3f} [{middle - half:+.3f}, {middle + half:+.3f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not in the file yet, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=600_000)
    chosen = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = json.loads(chosen.out.read_text()) if chosen.out.is_file() else {}
    for seed in range(chosen.seeds):
        for name in chosen.names:
            if len(found.get(name, [])) > seed:
                continue
            found.setdefault(name, []).append(run(VARIANTS[name], seed, chosen.tokens))
            print(seed, name, found[name][-1], flush=True)
            chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
