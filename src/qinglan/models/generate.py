"""The sampler: one engine for rollouts, K samples, best-of-n, search and chat, for any Hugging Face causal LM.

Continuous batching: each prompt is prefilled once and its keys and values are copied to its K samples; every step feeds one
token to each live row; finished rows leave at once, and free slots are refilled from the queue. A row draws from its own
stream of uniform numbers, named by (seed, key, sample index), and carries its own length, so that its tokens do not depend
on batch size, order or neighbours (up to the rounding of matrix products, about 1e-6 in a logit). The log-probability of
each sampled token is recorded under the distribution that it was drawn from.

The last prompt token is fed by the first decoding step, not by the prefill: all logits come from one place.
`kv_cache.py` holds the memory, `sampling.py` the draw. Log-probabilities from here serve as PPO's old log-probabilities.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.records import Completion, FinishReason, Prompt, Sampler, record_id
from qinglan.core.rng import numpy_stream
from qinglan.core.run import Progress
from qinglan.models.language_model import LanguageModel
from qinglan.models.row_memory import RowMemory, make_row_memory, model_facts
from qinglan.models.sampling import draw

Constraint = Callable[[Sequence[int]], Sequence[int] | AbstractSet[int] | None]
"""What may follow: given the completion's tokens so far, returns a sequence of token ids to force (an end id among them ends
the completion), a set of ids to sample from, or None for anything. Asked before each token that is not already forced."""

MAX_PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, in one forward pass."""


class SamplingConfig(Config):
    """How completions are drawn."""

    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 0 is greedy. InstructGPT samples at 1 in training (Ouyang et al. 2022, appendix C.4)."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens with this probability (Holtzman et al. 2020); 1 keeps all."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest completion in tokens, the end token included."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; the first one that appears, and what follows, is cut from the text."""
    memory_budget_mib: int = Field(default=1024, ge=1)
    """Memory for live rows (keys, values and logits), in MiB; decides how many are decoded together."""
    max_rows: int = Field(default=512, ge=1)
    """Most rows decoded together, whatever the memory."""

    @model_validator(mode="after")
    def _stops_can_match(self) -> Self:
        if any(not stop for stop in self.stop):
            raise ValueError("stop: an empty text ends every completion before it begins; give at least one character")
        return self


class Sample(NamedTuple):
    """One completion as it was drawn."""

    token_ids: list[int]
    """The end token is included where finish_reason is "eos", and what completed a stop text where it is "stop"."""
    logprobs: list[float]
    """Nats, one for each token, under the distribution it was drawn from; 0 where the token was forced."""
    finish_reason: FinishReason
    text: str


class Row:
    """A completion that is being written."""

    __slots__ = ("constraint", "logprobs", "pending", "prompt", "sample", "token_ids")

    def __init__(self, prompt: int, sample: int, constraint: Constraint | None) -> None:
        self.prompt = prompt
        self.sample = sample
        self.constraint = constraint
        self.pending: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []

    def allowed(self) -> AbstractSet[int] | None:
        """Return what the next token may be, None for anything; takes from the forced tokens first."""
        if not self.pending and self.constraint is not None:
            answer = self.constraint(self.token_ids)
            if answer is None:
                return None
            if not answer:
                raise InputError(
                    f"constraint: nothing may follow after {len(self.token_ids)} tokens; "
                    "expected token ids to force, a set of ids to choose from, or None"
                )
            if isinstance(answer, AbstractSet):
                return answer
            self.pending = list(answer)
        return {self.pending.pop(0)} if self.pending else None


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

    `prompts` are token ids that end where the completion begins. `keys` name the rows' random streams (default: the
    prompt's position), so equal (seed, key, sample index) draw the same uniform numbers anywhere. `forced` holds a
    `Constraint` or None for each prompt. Raises `InputError` for a prompt that is empty or does not fit the context, a
    budget that holds no row, a stop text that can never appear, and logits that are not numbers.
    """
    if num_samples < 1:
        raise InputError(f"num_samples: {num_samples} completions asked for; give at least 1")
    if not prompts:
        return []
    _check_prompts(lm, prompts, config)
    _check_stops(lm, config)
    with _inference(lm):
        return Engine(lm, prompts, config, seed, num_samples, keys=keys, forced=forced, progress=progress).run()


class Engine:
    """The state of one call of `generate`: a queue of prompts, live rows in slots 0..n-1, and what each is about to feed."""

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        config: SamplingConfig,
        seed: int,
        num_samples: int,
        *,
        keys: Sequence[str] | None,
        forced: Sequence[Constraint | None] | None,
        progress: Progress | None,
    ) -> None:
        self.lm, self.prompts, self.config, self.seed, self.num_samples = lm, prompts, config, seed, num_samples
        self.keys = keys if keys is not None else [str(number) for number in range(len(prompts))]
        self.forced = forced if forced is not None else [None] * len(prompts)
        self.progress = progress
        self.device = lm.model.device
        self.memory, self.num_slots = _memory_for(lm, prompts, config, num_samples)
        self.refill_at = max(1, self.num_slots // 4)
        # Longest first: rows of similar length are admitted together, and buffers reach their full width early.
        self.queue = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        self.parked: tuple[int, int] | None = None
        """A prompt some of whose samples have not been admitted, and the first such sample; slot num_slots holds it."""
        self.live: list[Row] = []
        self.tokens = torch.zeros(0, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(0, dtype=torch.long, device=self.device)
        self.counts = torch.zeros(0, dtype=torch.long, device=self.device)
        self.uniforms = torch.zeros(self.num_slots, config.max_new_tokens, dtype=torch.float64, device=self.device)
        self.may_end_stop: dict[int, bool] = {}
        self.done: list[list[Sample | None]] = [[None] * num_samples for _ in prompts]
        self.num_done = 0

    def run(self) -> list[list[Sample]]:
        """Draw everything."""
        while self.live or self.queue or self.parked:
            if (self.queue or self.parked) and self.num_slots - len(self.live) >= self.refill_at:
                self.refill()
            self.step()
        return [[sample for sample in samples if sample is not None] for samples in self.done]

    def refill(self) -> None:
        """Admit rows from the queue into the free slots: prefill new prompts once, copy each to the slots of its samples."""
        first = len(self.live)
        if self.parked is not None:
            prompt, sample = self.parked
            taken = self.admit(prompt, sample)
            self.memory.copy(taken, [self.num_slots] * len(taken), len(self.prompts[prompt]) - 1)
        batch: list[int] = []
        targets: list[int] = []
        sources: list[int] = []
        while self.queue and len(self.live) < self.num_slots:
            prompt = self.queue.pop()
            longest = max(len(self.prompts[number]) for number in [*batch, prompt])
            if batch and longest * (len(batch) + 1) > MAX_PREFILL_TOKENS:
                self.memory.prefill([self.prompts[number][:-1] for number in batch], targets, sources)
                batch, targets, sources = [], [], []
            taken = self.admit(prompt, 0)
            if self.parked is not None:
                taken.append(self.num_slots)
            targets += taken
            sources += [len(batch)] * len(taken)
            batch.append(prompt)
        if batch:
            self.memory.prefill([self.prompts[number][:-1] for number in batch], targets, sources)
        self.start_rows(first)

    def admit(self, prompt: int, sample: int) -> list[int]:
        """Give the samples of `prompt` from number `sample` on the slots that are free; park it if some are left."""
        last = min(self.num_samples, sample + self.num_slots - len(self.live))
        slots = list(range(len(self.live), len(self.live) + last - sample))
        self.live += [Row(prompt, number, self.forced[prompt]) for number in range(sample, last)]
        self.parked = (prompt, last) if last < self.num_samples else None
        return slots

    def start_rows(self, first: int) -> None:
        """Set what the rows from slot `first` on feed next, and their uniform numbers."""
        rows = self.live[first:]
        length = self.config.max_new_tokens
        for slot, row in enumerate(rows, start=first):
            numbers = numpy_stream(self.seed, "sample", self.keys[row.prompt], row.sample).random(length)
            self.uniforms[slot] = torch.from_numpy(numbers)
        tokens = torch.tensor([self.prompts[row.prompt][-1] for row in rows], device=self.device)
        positions = torch.tensor([len(self.prompts[row.prompt]) - 1 for row in rows], device=self.device)
        self.tokens = torch.cat([self.tokens, tokens])
        self.positions = torch.cat([self.positions, positions])
        self.counts = torch.cat([self.counts, torch.zeros_like(positions)])

    def step(self) -> None:
        """Feed one token to each live row, draw the next, and let finished rows go."""
        width = int(self.positions.max()) + 1
        logits = self.memory.decode(self.tokens, self.positions, width)
        uniforms = self.uniforms[: len(self.live)].gather(1, self.counts[:, None])[:, 0]
        config = self.config
        drawn = draw(
            logits,
            uniforms,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            allowed=self.allowed(logits.shape[-1]),
        )
        self.tokens = drawn.token_ids
        self.positions += 1
        self.counts += 1
        finished = self.record(drawn.token_ids.tolist(), drawn.logprobs.tolist())
        if finished:
            self.retire(finished, width)

    def allowed(self, vocab_size: int) -> Tensor | None:
        """Return the mask of allowed tokens, [live, vocab], None where no row is constrained."""
        if not any(row.constraint is not None for row in self.live):
            return None
        mask = torch.ones(len(self.live), vocab_size, dtype=torch.bool)
        for slot, row in enumerate(self.live):
            ids = row.allowed()
            if ids is None:
                continue
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise InputError(
                    f"constraint: token ids {min(ids)}..{max(ids)} given; expected ids in 0..{vocab_size - 1}"
                )
            mask[slot] = False
            mask[slot, list(ids)] = True
        return mask.to(self.device)

    def record(self, token_ids: list[int], logprobs: list[float]) -> list[int]:
        """Append a token to each live row and return the slots of the rows that are finished."""
        if math.isnan(sum(logprobs)):
            raise InputError(
                f"sampling from {self.lm.name}: the model's logits are not numbers; its weights are damaged"
            )
        end_ids, longest, stops = self.lm.chat.end_ids, self.config.max_new_tokens, self.config.stop
        finished = []
        for slot, (row, token, logprob) in enumerate(zip(self.live, token_ids, logprobs, strict=True)):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            if token in end_ids:
                self.finish(row, "eos")
            elif stops and self.is_stopped(row):
                self.finish(row, "stop")
            elif len(row.token_ids) == longest:
                self.finish(row, "length")
            else:
                continue
            finished.append(slot)
        return finished

    def is_stopped(self, row: Row) -> bool:
        """Return whether the newest token completed a stop text; most tokens cannot, and are told by their own text."""
        token = row.token_ids[-1]
        if token not in self.may_end_stop:
            piece = self.lm.tokenizer.decode([token])
            ends = {stop[-1] for stop in self.config.stop}
            # A blank may be lost, and a character's bytes be incomplete, when a token is decoded alone.
            self.may_end_stop[token] = "\ufffd" in piece or any(end.isspace() or end in piece for end in ends)
        return self.may_end_stop[token] and _before_stop(self.decode(row.token_ids), self.config.stop) is not None

    def finish(self, row: Row, reason: FinishReason) -> None:
        """Keep a row's completion."""
        if reason == "stop":
            text = (_before_stop(self.decode(row.token_ids), self.config.stop) or "").strip()
        else:
            text = self.lm.chat.text_of(row.token_ids)
        self.done[row.prompt][row.sample] = Sample(row.token_ids, row.logprobs, reason, text)
        self.num_done += 1
        if self.progress is not None:
            self.progress.show(self.num_done)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of tokens, special tokens left out, blanks at the ends kept."""
        return str(self.lm.tokenizer.decode(token_ids, skip_special_tokens=True))

    def retire(self, finished: list[int], width: int) -> None:
        """Close the gaps that finished rows left: the last live rows move into them."""
        num_left = len(self.live) - len(finished)
        gone = set(finished)
        holes = [slot for slot in finished if slot < num_left]
        movers = [slot for slot in range(num_left, len(self.live)) if slot not in gone]
        order = list(range(num_left))
        if holes:
            self.memory.copy(holes, movers, width)
            self.uniforms[holes] = self.uniforms[movers]
            for hole, mover in zip(holes, movers, strict=True):
                order[hole] = mover
        self.live = [self.live[slot] for slot in order]
        kept = torch.tensor(order, dtype=torch.long, device=self.device)
        self.tokens, self.positions, self.counts = self.tokens[kept], self.positions[kept], self.counts[kept]


def sample_completions(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    seed: int,
    num_samples: int = 1,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Draw `num_samples` completions of each prompt record; returns them as [prompt][sample].

    A prompt's id names its random streams, so its completions do not depend on which other prompts are asked for.
    Raises `InputError` as `generate` does.
    """
    prompt_ids = [lm.chat.prompt_ids(prompt.messages) for prompt in prompts]
    keys = [prompt.id for prompt in prompts]
    drawn = generate(lm, prompt_ids, config, seed=seed, num_samples=num_samples, keys=keys, progress=progress)
    return [
        [completion_record(lm, prompt, sample, config, seed=seed, index=k) for k, sample in enumerate(samples)]
        for prompt, samples in zip(prompts, drawn, strict=True)
    ]


def completion_record(
    lm: LanguageModel, prompt: Prompt, sample: Sample, config: SamplingConfig, *, seed: int, index: int
) -> Completion:
    """Return the record of sample number `index` of a prompt; its id follows from what was drawn, and how."""
    return Completion(
        id=record_id("completion", prompt.id, lm.name, seed, index, config.temperature, sample.token_ids),
        source="policy",
        producer_id=lm.name,
        prompt_group_id=prompt.prompt_group_id,
        split=prompt.split,
        parents=(prompt.id,),
        prompt_id=prompt.id,
        text=sample.text,
        token_ids=tuple(sample.token_ids),
        finish_reason=sample.finish_reason,
        sampler=Sampler(
            policy=lm.name, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, seed=seed
        ),
    )


def forced_prefix(token_ids: Sequence[int]) -> Constraint:
    """Return the constraint that a completion begins with these tokens and goes on freely."""
    return lambda so_far: token_ids[len(so_far) :] or None


@contextmanager
def _inference(lm: LanguageModel) -> Iterator[None]:
    """Run the model in eval mode, without gradients, in its compute precision; give it back as it was."""
    was_training = lm.model.training
    lm.model.eval()
    try:
        with torch.inference_mode(), lm.device.autocast():
            yield
    finally:
        lm.model.train(was_training)


def _memory_for(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], config: SamplingConfig, num_samples: int
) -> tuple[RowMemory, int]:
    """Return memory for as many rows as the budget holds, and their number; one more slot parks a prompt's prefix."""
    dtype = None if lm.device.compute_dtype == torch.float32 else lm.device.compute_dtype
    facts = model_facts(lm.model, lm.name, dtype)
    width = max(len(prompt) for prompt in prompts) + config.max_new_tokens
    # Logits and log-probabilities in fp32, probabilities summed in fp64, one more of each for the filters.
    per_row = facts.bytes_per_token * width + 24 * lm.model.config.get_text_config().vocab_size
    budget = config.memory_budget_mib << 20
    needed = min(config.max_rows, len(prompts) * num_samples)
    if budget < per_row:
        raise InputError(
            f"memory_budget_mib: {config.memory_budget_mib} MiB hold no row; one of {width} tokens takes "
            f"{math.ceil(per_row / 2**20)} MiB: give at least that, or lower max_new_tokens"
        )
    num_slots = min(needed, budget // per_row)
    return make_row_memory(lm.model, facts, num_slots + 1, width, dtype), num_slots


def _check_prompts(lm: LanguageModel, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> None:
    """Raise `InputError` for an empty prompt, or one that leaves no room for the completion."""
    context = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number}: has no tokens; a prompt needs at least one")
        if context is not None and len(prompt) + config.max_new_tokens > context:
            raise InputError(
                f"prompt {number}: its {len(prompt)} tokens and max_new_tokens {config.max_new_tokens} exceed the context "
                f"of {lm.name}, {context} tokens; shorten the prompt or lower max_new_tokens"
            )


def _check_stops(lm: LanguageModel, config: SamplingConfig) -> None:
    """Raise `InputError` for a stop text that the tokenizer can never produce."""
    for stop in config.stop:
        token_ids = lm.tokenizer.encode(stop, add_special_tokens=False)
        if stop.strip() not in lm.tokenizer.decode(token_ids, skip_special_tokens=True):
            raise InputError(
                f"stop: {stop!r} can never appear in a completion of {lm.name} (its tokenizer cannot write it, or it is a "
                "special token, which ends a completion by itself); choose another text"
            )


def _before_stop(text: str, stops: Sequence[str]) -> str | None:
    """Return the text before the first stop text in it, None if there is none."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return text[: min(places)] if places else None
