"""On a GPU: are CUDA graphs exact, and what do pretraining, fine-tuning, sampling and PPO reach?

    python -m benchmarks.gpu OUT.json [PART ...]

Rates are by wall clock, each run ended by a synchronisation: medians of three runs after a warm-up for pretraining and
fine-tuning, of two for sampling by graphs; one run without a warm-up for sampling without them, for
`transformers.generate` and for PPO. Fine-tuning is set against a plain padded loop and the rate of `torch.mm`.
"""

import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import random_llama
from qinglan.core.device import Device
from qinglan.models.language_model import LanguageModel, TokenSequence, completion_logprobs, copy_language_model

VOCABULARY = 32_000


def seconds_of(work: Callable[[], Any], repeats: int = 3, *, warm_up: bool = True) -> float:
    """Return the median seconds of `work`, after a warm-up."""
    if warm_up:
        work()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def random_model(dtype: Any = "bfloat16", num_layers: int = 24, hidden: int = 1280) -> LanguageModel:
    """Return a randomly drawn Llama on the GPU, of 0.7 billion weights by default; matrix products in `dtype`."""
    device = Device.detect("cuda", dtype)
    with device.torch_device:
        lm = random_llama(num_layers, hidden, VOCABULARY)
    return lm._replace(model=lm.model.to(device.torch_device), device=device)


def limits() -> dict[str, Any]:
    """Return the card's rates of matrix products and of copying."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c, d = (torch.randn(4096, 4096, device="cuda") for _ in range(2))
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bf16_flops": 10 * 2.0 * 8192**3 / seconds_of(lambda: [torch.mm(a, b) for _ in range(10)], 5),
        "fp32_flops": 10 * 2.0 * 4096**3 / seconds_of(lambda: [torch.mm(c, d) for _ in range(10)], 5),
        "copied_bytes": source.numel() * 4.0 / seconds_of(lambda: target.copy_(source), 5),
    }


def pretraining() -> dict[str, Any]:
    """Return milliseconds of an update of each size, with graphs and without, and how far their weights differ."""
    from qinglan.learn.blocks import Blocks
    from qinglan.learn.pretrain_config import PretrainConfig
    from qinglan.learn.pretrain_update import make_optimizers, make_work, update
    from qinglan.tasks.base_models import CONTEXT, base_tokenizer, build

    found: dict[str, Any] = {}
    tokenizer = base_tokenizer()
    for size, batch_tokens in (("nano", 1024), ("micro", 1024), ("mini", 2048), ("small", 8192), ("base", 16384)):
        ends, row = {}, {}
        for graphs in (False, True):
            lm = build(size, tokenizer, 0, device=Device.detect("cuda"))
            config = PretrainConfig(num_tokens=10**6, context=CONTEXT, batch_tokens=batch_tokens, cuda_graphs=graphs)
            work = make_work(lm, make_optimizers(lm, config), config)
            rng = torch.Generator().manual_seed(0)
            shape = (config.batch_size, CONTEXT + 1)
            batches = [
                Blocks(torch.randint(2304, shape, generator=rng), torch.rand(shape, generator=rng)) for _ in range(8)
            ]

            def run(first: int, work: Any = work, config: Any = config, batches: Any = batches) -> None:
                for step in range(first, first + 8):
                    update(work, config, batches[step % 8], step, "gpu")

            run(0)
            ends[graphs] = [p.detach().clone() for p in lm.model.parameters()]
            row["graph_ms" if graphs else "plain_ms"] = 1000 * seconds_of(lambda run=run: run(8), 3) / 8
        moved = [p.detach().cpu() for p in build(size, tokenizer, 0).model.parameters()]
        gone = math.sqrt(sum(float((a.cpu() - b).square().sum()) for a, b in zip(ends[False], moved, strict=True)))
        apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(*ends.values(), strict=True)))
        row["tokens_per_second"] = 1000 * batch_tokens / row["graph_ms"]
        found[size] = row | {"relative_difference_after_8_updates": apart / gone}
    return found


def fine_tuning() -> dict[str, Any]:
    """Return tokens per second of SFT on lengths as in real chats, ours and a plain padded loop, and FLOP/s."""
    from qinglan.learn.sft import SFTConfig, update

    rng = random.Random(0)
    lengths = [min(1000, max(8, round(1.3 * math.exp(rng.gauss(math.log(133), 1.1))))) for _ in range(64)]
    sequences = [TokenSequence([rng.randrange(VOCABULARY) for _ in range(n)], n // 3) for n in lengths]
    lm = random_model()
    num_trained = lm.model.num_parameters() - VOCABULARY * lm.model.config.hidden_size
    found: dict[str, Any] = {"parameters": lm.model.num_parameters(), "mean_tokens": statistics.mean(lengths)}
    for name, changes in {
        "packed": {"pack": True, "max_tokens": 16384},
        "padded": {"pack": False, "max_tokens": 16384},
    }.items():
        student = copy_language_model(lm)  # beside `lm`, which stays
        config = SFTConfig(**changes)
        optimizer = config.optimizer.make(student.model)
        torch.cuda.reset_peak_memory_stats()

        def ours(student: Any = student, optimizer: Any = optimizer, config: Any = config) -> None:
            update(student, optimizer, sequences, [], config, 0, "gpu")

        seconds = seconds_of(ours)
        found[name] = {
            "tokens_per_second": sum(lengths) / seconds,
            "flops": 6.0 * num_trained * sum(lengths) / seconds,
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
        del student, optimizer, ours  # else the next one's peak holds them too
        gc.collect()
    student = copy_language_model(lm)
    optimizer = torch.optim.AdamW(student.model.parameters(), 1e-5, fused=True)
    torch.cuda.reset_peak_memory_stats()

    def plain() -> None:
        order = sorted(range(64), key=lambda i: lengths[i])
        for start in range(0, 64, 8):
            rows = [sequences[i] for i in order[start : start + 8]]
            width = max(len(row.token_ids) for row in rows)
            ids = torch.zeros(8, width, dtype=torch.long)
            labels = torch.full((8, width), -100)
            mask = torch.zeros(8, width, dtype=torch.long)
            for i, row in enumerate(rows):
                n = len(row.token_ids)
                ids[i, :n], mask[i, :n] = torch.tensor(row.token_ids), 1
                labels[i, row.num_prompt_tokens : n] = ids[i, row.num_prompt_tokens : n]
            with torch.autocast("cuda", torch.bfloat16):
                out = student.model(
                    input_ids=ids.cuda(), attention_mask=mask.cuda(), labels=labels.cuda(), use_cache=False
                )
            (out.loss / 8).backward()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    found["plain_loop"] = {
        "tokens_per_second": sum(lengths) / seconds_of(plain),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
    return found


def sampling() -> dict[str, Any]:
    """Return tokens per second of 8 completions for each of 64 prompts, and whether graphs change what is drawn."""
    from transformers import GenerationConfig

    from qinglan.models.generate import SamplingConfig, generate

    found: dict[str, Any] = {}
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(20)] for _ in range(64)]
    # Exactness, in fp32: what a graph decodes, and its log-probabilities against a plain forward pass.
    exact = random_model("float32")
    config = SamplingConfig(max_new_tokens=48, temperature=0.0, max_rows=24)
    drawn = {
        graphs: generate(exact, prompts[:24], config.model_copy(update={"cuda_graphs": graphs}), seed=0)
        for graphs in (False, True)
    }
    same = [a[0].token_ids == b[0].token_ids for a, b in zip(*drawn.values(), strict=True)]
    rows = [TokenSequence(prompt + one[0].token_ids, 20) for prompt, one in zip(prompts, drawn[True], strict=False)]
    scored = completion_logprobs(exact, rows)
    worst = max(
        float((torch.tensor(one[0].raw_logprobs) - values).abs().max())
        for one, values in zip(drawn[True], scored, strict=True)
    )
    found["exact"] = {"greedy_equal": sum(same), "of": len(same), "worst_logprob_difference": worst}
    del exact
    lm = random_model()
    ends = frozenset(range(0, VOCABULARY, 64))  # a text ends after 64 tokens on average
    lm = lm._replace(chat=lm.chat._replace(end_ids=ends))
    for graphs in (True, False):
        config = SamplingConfig(max_new_tokens=128, max_rows=512, cuda_graphs=graphs, memory_budget_mib=40_000)
        counts: list[int] = []

        def ours(config: Any = config, counts: list[int] = counts) -> None:
            done = generate(lm, prompts, config, seed=len(counts), num_samples=8)
            counts.append(sum(len(one.token_ids) for samples in done for one in samples))

        seconds = seconds_of(ours, 2 if graphs else 1, warm_up=graphs)
        found["graphs" if graphs else "plain"] = {"tokens_per_second": statistics.mean(counts) / seconds}
    model = lm.model.to(torch.bfloat16).eval()
    generation = GenerationConfig(
        max_new_tokens=128, do_sample=True, top_k=0, top_p=1.0, eos_token_id=sorted(ends), pad_token_id=1
    )
    counts = []

    def theirs() -> None:
        with torch.inference_mode():
            written = model.generate(
                torch.tensor(prompts).cuda(), generation_config=generation, num_return_sequences=8
            )[:, 20:]
        is_end = written % 64 == 0
        counts.append(int((is_end.cumsum(1) - is_end.long() == 0).sum()))

    seconds = seconds_of(theirs, 1, warm_up=False)
    found["transformers"] = {"tokens_per_second": statistics.mean(counts) / seconds}
    return found


def ppo() -> dict[str, Any]:
    """Return episodes per second of PPO with a value model, and of RLOO, on the half-billion model."""
    from benchmarks.ours import new_stage, prompt_record
    from qinglan.learn.ppo import PPOConfig, train_ppo
    from qinglan.models.generate import SamplingConfig
    from qinglan.models.heads import as_scorer, scalar_model_from

    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [" ".join(rng.choice(letters) + rng.choice(letters) for _ in range(16)) for _ in range(256)]
    prompts = [prompt_record(number, text) for number, text in enumerate(texts)]
    policy = random_model(num_layers=12, hidden=768)  # smaller: a checkpoint of four of 0.7 billion takes a minute
    reference = copy_language_model(policy)
    reward_model = scalar_model_from(policy, seed=0)
    found: dict[str, Any] = {}
    for estimator in ("gae", "rloo"):
        config = PPOConfig(
            estimator=estimator,
            num_iterations=3,
            episodes_per_iteration=128,
            samples_per_prompt=1 if estimator == "gae" else 4,
            minibatch_episodes=64,
            inner_epochs=4 if estimator == "gae" else 1,
            sampling=SamplingConfig(max_new_tokens=64, memory_budget_mib=20_000),
            learning_rate=1e-6,
            value_learning_rate=1e-6,
            kl_coef=0.05,
            missing_eos="keep",
            max_tokens=16384,
        )
        stage, folder = new_stage()
        scorer = as_scorer(reward_model)
        start = reward_model if estimator == "gae" else None
        torch.cuda.synchronize()
        started = time.perf_counter()
        train_ppo(policy, reference, scorer, prompts, config, stage=stage, seed=0, value_start=start)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        (log,) = Path(folder.name).rglob("metrics.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        found[estimator] = {
            "episodes_per_second": 3 * 128 / seconds,
            "last_line": lines[-1],
        }
        folder.cleanup()
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "limits": limits,
    "pretraining": pretraining,
    "sampling": sampling,
    "fine_tuning": fine_tuning,
    "ppo": ppo,
}


def main(out: Path, parts: list[str]) -> None:
    """Run the parts and write what was found after each."""
    found: dict[str, Any] = {}
    for part in parts or list(PARTS):
        started = time.perf_counter()
        try:
            found[part] = PARTS[part]()
        except Exception as error:  # one part must not cost the others: the card is lent by the minute
            found[part] = {"error": f"{type(error).__name__}: {error}"}
        found[part]["seconds_taken"] = round(time.perf_counter() - started, 1)
        print(part, json.dumps(found[part]), flush=True)
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
