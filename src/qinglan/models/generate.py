"""The sampler: one engine for rollouts, K samples, best-of-n, search and chat, on any Hugging Face causal LM.

Each row draws from its own stream of uniform numbers, named by (seed, key, sample index), and has its own length, so
that its tokens depend neither on batch size nor on order nor on neighbours, up to the rounding of matrix products
(about 1e-6 in a logit). The log-probability of every token is recorded under the distribution that it was drawn from,
computed as in training (`language_model.vocabulary_logits`): it may serve as PPO's old log-probability.

Departure from the usual: temperature 0 is greedy, and there the log-probabilities are the model's own at temperature 1,
because those of a distribution with a single point would all be 0.

`engine.py` is the loop, `sampling.py` the draw, `constraints.py` what a completion must say, `kv_cache.py` and
`row_memory.py` what a row remembers; `options.py` scores given continuations. docs/engine.md says how each promise is
tested.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from qinglan.core.errors import InputError
from qinglan.core.records import Completion, Prompt, Sampler, record_id
from qinglan.core.run import Progress
from qinglan.models.constraints import Constraint, forced_prefix, one_of, one_of_after
from qinglan.models.engine import Engine, Request, Sample, decode_text
from qinglan.models.kv_cache import SlotCache
from qinglan.models.language_model import LanguageModel, max_context, vocabulary_size
from qinglan.models.packed import packed_bytes
from qinglan.models.row_memory import RowMemory, dtype_of_keys, make_row_memory, model_facts
from qinglan.models.sampling import SamplingConfig

__all__ = [
    "Constraint",
    "Request",
    "Sample",
    "SamplingConfig",
    "completion_record",
    "forced_prefix",
    "generate",
    "generate_requests",
    "one_of",
    "one_of_after",
    "sample_completions",
]

MIN_PACKED_STEPS = 16
"""Steps of decoding from which on packing the weights pays (on a CPU)."""


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
        InputError: as `generate_requests` does.
    """
    for name, given in (("keys", keys), ("forced", forced)):
        if given is not None and len(given) != len(prompts):
            raise InputError(f"{name}: got {len(given)} for {len(prompts)} prompts; expected one for each")
    requests = [
        Request(
            prompt,
            key=str(number) if keys is None else keys[number],
            seed=seed,
            constraint=None if forced is None else forced[number],
        )
        for number, prompt in enumerate(prompts)
    ]
    return generate_requests(lm, requests, config, num_samples=num_samples, progress=progress)


def generate_requests(
    lm: LanguageModel,
    requests: Sequence[Request],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
    progress: Progress | None = None,
) -> list[list[Sample]]:
    """Draw `num_samples` completions of each request; returns them as [request][sample].

    A request has its own seed, stop texts, constraint and prefix. K continuations of a partial completion are one
    request with that prefix: prompt and prefix are computed once. `config.max_new_tokens` counts from the prefix on.

    Raises:
        InputError: a prompt is empty or leaves no room in the context; a prefix holds an end token; the memory budget
            holds no row; a stop text can never appear; a constraint allows no token; the model's logits are NaN.
    """
    if num_samples < 1:
        raise InputError(f"num_samples: got {num_samples}; expected at least 1")
    if not requests:
        return []
    _check_requests(lm, requests, config)
    with _sampling_mode(lm):
        memory, num_slots = _memory_for(lm, requests, num_samples, config)
        on_done = None if progress is None else progress.show
        engine = Engine(lm, requests, num_samples, config, memory=memory, num_slots=num_slots, on_done=on_done)
        return engine.run()


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


@contextmanager
def _sampling_mode(lm: LanguageModel) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, in its compute precision; leave it as it was."""
    was_training = lm.model.training
    lm.model.eval()
    try:
        with torch.no_grad(), lm.device.autocast():
            yield
    finally:
        lm.model.train(was_training)


def _memory_for(
    lm: LanguageModel, requests: Sequence[Request], num_samples: int, config: SamplingConfig
) -> tuple[RowMemory, int]:
    """Return memory for as many rows as the budget holds, and their number.

    One more slot, for a prompt some of whose samples wait, is counted in where there may be such a prompt.
    """
    dtype = dtype_of_keys(lm)
    facts = model_facts(lm.model, lm.name, dtype)
    width = max(len(request.prompt) + len(request.prefix) for request in requests) + config.max_new_tokens
    # Logits, tempered logits, log-probabilities and probabilities in fp32, their sums in fp64: 24 bytes for each token
    # of the vocabulary; a sort, its order, its probabilities and sums for top-p; a mask and one more copy where bound.
    is_bound = any(request.constraint is not None for request in requests)
    per_token = 24 + (24 if config.top_p < 1 else 0) + (9 if is_bound or config.top_k > 0 or config.top_p < 1 else 0)
    kept = facts.bytes_per_token * width
    per_row = kept + per_token * vocabulary_size(lm.model)
    parked = kept if num_samples > 1 else 0
    budget = config.memory_budget_mib << 20
    num_rows = (budget - parked) // per_row
    if num_rows <= 0:
        raise InputError(
            f"memory_budget_mib: {config.memory_budget_mib} MiB hold no row; a row of {width} tokens takes "
            f"{math.ceil((per_row + parked) / 2**20)} MiB; give at least that, or lower max_new_tokens"
        )
    num_slots = min(num_rows, config.max_rows, len(requests) * num_samples)
    # Packed weights may take what room the rows leave.
    copies = packed_bytes(lm.model, lm.device.compute_dtype)
    has_room = 0 < copies <= budget - parked - num_slots * per_row
    memory = make_row_memory(lm.model, facts, num_slots + (1 if parked else 0), width, dtype)
    if isinstance(memory, SlotCache):
        if config.cuda_graphs:
            memory.record_steps(num_slots, lm.name)
        if has_room and config.max_new_tokens >= MIN_PACKED_STEPS:
            memory.pack_products(num_slots, lm.device.compute_dtype)
    return memory, num_slots


def _check_requests(lm: LanguageModel, requests: Sequence[Request], config: SamplingConfig) -> None:
    context = max_context(lm.model)
    for number, request in enumerate(requests):
        if not len(request.prompt):
            raise InputError(f"prompt {number}: has no tokens; expected at least one")
        length = len(request.prompt) + len(request.prefix)
        if length + config.max_new_tokens > context:
            raise InputError(
                f"prompt {number}: its {length} tokens and max_new_tokens {config.max_new_tokens} exceed the "
                f"context of {lm.name}, {context} tokens; shorten the prompt or lower max_new_tokens"
            )
        if not lm.chat.end_ids.isdisjoint(request.prefix):
            raise InputError(f"prompt {number}: the prefix of its completions holds an end token; leave it out")
    for stop in {text for request in requests for text in request.stop or ()} | set(config.stop):
        _check_stop(lm, stop)


def _check_stop(lm: LanguageModel, stop: str) -> None:
    """Refuse a stop text that the tokenizer cannot write: a special token, or letters that it makes into others."""
    between = f"a{stop}b"  # alone, a text may lose its outer blanks
    if not stop or stop not in decode_text(lm, lm.tokenizer.encode(between, add_special_tokens=False)):
        raise InputError(
            f"stop: {stop!r} can never appear in a completion of {lm.name}: its tokenizer cannot write it, or it "
            "is a special token, which is no part of the text; choose another text"
        )
