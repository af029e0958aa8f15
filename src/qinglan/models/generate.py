"""The sampler: one engine for rollouts, K samples, best-of-n, search and chat, on any Hugging Face causal LM.

Each row draws from its own stream of uniform numbers, named by (seed, key, sample index), and has its own length, so
that its tokens depend neither on batch size nor on order nor on neighbours, up to the rounding of matrix products
(about 1e-6 in a logit). The log-probability of every token is recorded under the distribution that it was drawn from,
computed as in training (`language_model.vocabulary_logits`): it may serve as PPO's old log-probability.

Departure from the usual: temperature 0 is greedy, and there the log-probabilities are the model's own at temperature 1,
because those of a distribution with a single point would all be 0.

`engine.py` is the loop, `sampling.py` the draw, `kv_cache.py` and `row_memory.py` what a row remembers.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from qinglan.core.errors import InputError
from qinglan.core.records import Completion, Prompt, Sampler, record_id
from qinglan.core.run import Progress
from qinglan.models.engine import Constraint, Engine, Request, Sample, decode_text
from qinglan.models.language_model import LanguageModel, max_context, vocabulary_size
from qinglan.models.row_memory import RowMemory, make_row_memory, model_facts
from qinglan.models.sampling import SamplingConfig

__all__ = [
    "Constraint",
    "Sample",
    "SamplingConfig",
    "completion_record",
    "forced_prefix",
    "generate",
    "sample_completions",
]


def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    seed: int,
    num_samples: int = 1,
    keys: Sequence[str] | None = None,
    forced: Sequence[Constraint | None] | None = None,
    progress: Progress | None = None,
) -> list[list[Sample]]:
    """Draw `num_samples` completions of each prompt; returns them as [prompt][sample].

    Args:
        lm: the policy.
        prompts: token ids that end exactly where the completion begins.
        config: how to draw.
        seed: names the random streams, with `keys` and the sample's index.
        num_samples: K; a prompt is computed once for all of them.
        keys: a name for each prompt; equal names draw equal uniform numbers anywhere. Default: the prompt's place.
        forced: for each prompt a `Constraint` on its completions, or None.
        progress: shown at every completion; its total should be `len(prompts) * num_samples`.

    Raises:
        InputError: a prompt is empty or leaves no room in the context; the memory budget holds no row; a stop text can
            never appear; a constraint allows no token; the model's logits are NaN.
    """
    if num_samples < 1:
        raise InputError(f"num_samples: got {num_samples}; expected at least 1")
    for name, given in (("keys", keys), ("forced", forced)):
        if given is not None and len(given) != len(prompts):
            raise InputError(f"{name}: got {len(given)} for {len(prompts)} prompts; expected one for each")
    if not prompts:
        return []
    _check_prompts(lm, prompts, config)
    _check_stops(lm, config)
    request = Request(
        prompts=prompts,
        keys=[str(number) for number in range(len(prompts))] if keys is None else keys,
        constraints=[None] * len(prompts) if forced is None else forced,
        num_samples=num_samples,
        seed=seed,
    )
    with _sampling_mode(lm):
        memory, num_slots = _memory_for(lm, request, config)
        return Engine(lm, request, config, memory, num_slots, None if progress is None else progress.show).run()


def sample_completions(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    seed: int,
    num_samples: int = 1,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Draw `num_samples` completions of each prompt record; returns records as [prompt][sample].

    A prompt's id names its random streams, so its completions do not depend on which other prompts are asked for.
    Raises `InputError` as `generate` does.
    """
    prompt_ids = [lm.chat.prompt_ids(prompt.messages) for prompt in prompts]
    keys = [prompt.id for prompt in prompts]
    drawn = generate(lm, prompt_ids, config, seed=seed, num_samples=num_samples, keys=keys, progress=progress)
    return [
        [completion_record(lm, prompt, sample, config, seed=seed, index=index) for index, sample in enumerate(samples)]
        for prompt, samples in zip(prompts, drawn, strict=True)
    ]


def completion_record(
    lm: LanguageModel, prompt: Prompt, sample: Sample, config: SamplingConfig, *, seed: int, index: int
) -> Completion:
    """Return the record of sample number `index` of a prompt; its id follows from what was drawn, and how."""
    sampler = Sampler(policy=lm.name, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, seed=seed)
    return Completion(
        id=record_id("completion", prompt.id, sampler, index, sample.token_ids),
        source="policy",
        producer_id=lm.name,
        prompt_group_id=prompt.prompt_group_id,
        split=prompt.split,
        parents=(prompt.id,),
        prompt_id=prompt.id,
        text=sample.text,
        token_ids=tuple(sample.token_ids),
        finish_reason=sample.finish_reason,
        sampler=sampler,
    )


def forced_prefix(token_ids: Sequence[int]) -> Constraint:
    """Return the constraint that a completion begins with these tokens and goes on freely."""
    return lambda so_far: token_ids[len(so_far) :] or None


@contextmanager
def _sampling_mode(lm: LanguageModel) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, in its compute precision; leave it as it was."""
    was_training = lm.model.training
    lm.model.eval()
    try:
        with torch.inference_mode(), lm.device.autocast():
            yield
    finally:
        lm.model.train(was_training)


def _memory_for(lm: LanguageModel, request: Request, config: SamplingConfig) -> tuple[RowMemory, int]:
    """Return memory for as many rows as the budget holds, and their number; one more slot keeps a parked prompt."""
    dtype = None if lm.device.compute_dtype == torch.float32 else lm.device.compute_dtype
    facts = model_facts(lm.model, lm.name, dtype)
    width = max(len(prompt) for prompt in request.prompts) + config.max_new_tokens
    # Logits, tempered logits, log-probabilities and probabilities in fp32, their sums in fp64: 24 bytes for each token.
    per_row = facts.bytes_per_token * width + 24 * vocabulary_size(lm.model)
    num_rows = (config.memory_budget_mib << 20) // per_row
    if num_rows == 0:
        raise InputError(
            f"memory_budget_mib: {config.memory_budget_mib} MiB hold no row; a row of {width} tokens takes "
            f"{math.ceil(per_row / 2**20)} MiB; give at least that, or lower max_new_tokens"
        )
    num_slots = min(num_rows, config.max_rows, len(request.prompts) * request.num_samples)
    return make_row_memory(lm.model, facts, num_slots + 1, width, dtype), num_slots


def _check_prompts(lm: LanguageModel, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> None:
    context = max_context(lm.model)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number}: has no tokens; expected at least one")
        if len(prompt) + config.max_new_tokens > context:
            raise InputError(
                f"prompt {number}: its {len(prompt)} tokens and max_new_tokens {config.max_new_tokens} exceed the "
                f"context of {lm.name}, {context} tokens; shorten the prompt or lower max_new_tokens"
            )


def _check_stops(lm: LanguageModel, config: SamplingConfig) -> None:
    for stop in config.stop:
        token_ids = lm.tokenizer.encode(stop, add_special_tokens=False)
        if stop.strip() not in decode_text(lm, token_ids):
            raise InputError(
                f"stop: {stop!r} can never appear in a completion of {lm.name}: its tokenizer cannot write it, or it "
                "is a special token, which is no part of the text; choose another text"
            )
