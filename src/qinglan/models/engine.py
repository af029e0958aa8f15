"""Continuous batching: a queue of prompts, live rows in slots, one token for each live row at every step.

Each prompt is prefilled once and copied to the slots of its K samples. Finished rows leave at once: the last rows move
into their slots, so that a step costs what the live rows cost. When a quarter of the slots is free they are refilled.
The last token of a prompt is fed by the row's first step, not by the prefill, so that all logits come from one place.
"""

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
from torch import Tensor

from qinglan.core.errors import InputError
from qinglan.core.records import FinishReason
from qinglan.core.rng import numpy_stream
from qinglan.models.language_model import LanguageModel
from qinglan.models.row_memory import RowMemory
from qinglan.models.sampling import SamplingConfig, draw

MAX_PREFILL_TOKENS = 2048
"""Prompt tokens, padding included, in one forward pass."""

Constraint = Callable[[Sequence[int]], Sequence[int] | AbstractSet[int] | None]
"""What may follow, given the completion's tokens so far: a sequence of token ids is forced (an end id among them ends
the completion), a set of ids is sampled from, None leaves all open. Asked at every token that is not forced already."""


class Sample(NamedTuple):
    """One completion as it was drawn."""

    token_ids: list[int]
    """The end token is included where finish_reason is "eos", and what completed the stop text where it is "stop"."""
    logprobs: list[float]
    """Nats, one for each token, under the distribution it was drawn from; 0 where the token was forced."""
    finish_reason: FinishReason
    text: str


class Request(NamedTuple):
    """What is asked of the engine."""

    prompts: Sequence[Sequence[int]]
    keys: Sequence[str]
    """Names of the prompts' random streams."""
    constraints: Sequence[Constraint | None]
    num_samples: int
    seed: int


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
        """Return what the next token may be, None for anything. Forced tokens come one by one."""
        if not self.pending and self.constraint is not None:
            answer = self.constraint(self.token_ids)
            if answer is None or isinstance(answer, AbstractSet):
                return answer
            self.pending = list(answer)
            if not self.pending:
                return frozenset()
        return {self.pending.pop(0)} if self.pending else None


class Engine:
    """The state of one call of `generate`. Slot numbers are places in `live`."""

    def __init__(
        self,
        lm: LanguageModel,
        request: Request,
        config: SamplingConfig,
        memory: RowMemory,
        num_slots: int,
        on_done: Callable[[int], None] | None = None,
    ) -> None:
        """Prepare `request`; `memory` holds `num_slots` rows and one more; `on_done` is told how many are finished."""
        self.lm, self.request, self.config = lm, request, config
        self.memory, self.num_slots = memory, num_slots
        self.on_done = on_done
        self.device = lm.model.device
        self.refill_at = max(1, num_slots // 4)
        # The longest prompts leave the queue first, so that rows of similar length stand together.
        self.queue = sorted(range(len(request.prompts)), key=lambda number: len(request.prompts[number]))
        self.parked: tuple[int, int] | None = None
        """A prompt some of whose samples still wait, and the first of them; slot num_slots keeps its prefix."""
        self.live: list[Row] = []
        self.tokens, self.positions, self.counts = (
            torch.zeros(0, dtype=torch.long, device=self.device) for _ in range(3)
        )
        """What each live row feeds next, at which position, and how many tokens of its completion there are."""
        self.uniforms = torch.zeros(num_slots, config.max_new_tokens, dtype=torch.float64, device=self.device)
        self.is_constrained = any(constraint is not None for constraint in request.constraints)
        self.may_end_stop: dict[int, bool] = {}
        self.done: list[dict[int, Sample]] = [{} for _ in request.prompts]
        self.num_done = 0

    def run(self) -> list[list[Sample]]:
        """Draw everything; returns [prompt][sample]."""
        while self.live or self.queue or self.parked:
            if (self.queue or self.parked) and self.num_slots - len(self.live) >= self.refill_at:
                self.refill()
            self.step()
        return [[samples[number] for number in range(self.request.num_samples)] for samples in self.done]

    def refill(self) -> None:
        """Admit rows into the free slots: the parked prompt's first, then new prompts, prefilled in batches."""
        first = len(self.live)
        prompts = self.request.prompts
        if self.parked is not None:
            number, sample = self.parked
            slots = self.admit(number, sample)
            if len(prompts[number]) > 1:
                self.memory.copy(slots, [self.num_slots] * len(slots), len(prompts[number]) - 1)
        while self.queue and len(self.live) < self.num_slots:
            batch: list[int] = []
            targets: list[int] = []
            sources: list[int] = []
            while self.queue and len(self.live) < self.num_slots:
                widest = len(prompts[batch[0] if batch else self.queue[-1]])
                if batch and widest * (len(batch) + 1) > MAX_PREFILL_TOKENS:
                    break
                number = self.queue.pop()
                slots = self.admit(number, 0)
                if self.parked is not None:
                    slots.append(self.num_slots)
                targets += slots
                sources += [len(batch)] * len(slots)
                batch.append(number)
            self.memory.prefill([prompts[number][:-1] for number in batch], targets, sources)
        self.start_rows(first)

    def admit(self, prompt: int, sample: int) -> list[int]:
        """Give free slots to the samples of `prompt` from number `sample` on, and park it if there are too few."""
        first = len(self.live)
        last = min(self.request.num_samples, sample + self.num_slots - first)
        self.live += [Row(prompt, number, self.request.constraints[prompt]) for number in range(sample, last)]
        self.parked = (prompt, last) if last < self.request.num_samples else None
        return list(range(first, len(self.live)))

    def start_rows(self, first: int) -> None:
        """Set what the rows from slot `first` on feed at their first step, and their uniform numbers."""
        prompts, keys, seed = self.request.prompts, self.request.keys, self.request.seed
        rows = self.live[first:]
        for slot, row in enumerate(rows, start=first):
            numbers = numpy_stream(seed, "sample", keys[row.prompt], row.sample).random(self.config.max_new_tokens)
            self.uniforms[slot] = torch.from_numpy(numbers)
        tokens = torch.tensor([prompts[row.prompt][-1] for row in rows], device=self.device)
        positions = torch.tensor([len(prompts[row.prompt]) - 1 for row in rows], device=self.device)
        self.tokens = torch.cat([self.tokens, tokens])
        self.positions = torch.cat([self.positions, positions])
        self.counts = torch.cat([self.counts, torch.zeros_like(positions)])

    def step(self) -> None:
        """Feed one token to each live row, draw the next ones, and let finished rows go."""
        width = int(self.positions.max()) + 1
        logits = self.memory.decode(self.tokens, self.positions, width)
        drawn = draw(
            logits,
            self.uniforms[: len(self.live)].gather(1, self.counts[:, None])[:, 0],
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            allowed=self.allowed(logits.shape[-1]) if self.is_constrained else None,
        )
        self.tokens = drawn.token_ids
        self.positions = self.positions + 1
        self.counts = self.counts + 1
        finished = self.record(drawn.token_ids.tolist(), drawn.logprobs.tolist())
        if finished:
            self.retire(finished, width)

    def allowed(self, vocab_size: int) -> Tensor:
        """Return the mask of allowed tokens, [live, vocab]. Raises `InputError` for a set that no token fits."""
        mask = torch.ones(len(self.live), vocab_size, dtype=torch.bool)
        for slot, row in enumerate(self.live):
            token_ids = row.allowed()
            if token_ids is None:
                continue
            if not token_ids or min(token_ids) < 0 or max(token_ids) >= vocab_size:
                raise InputError(
                    f"constraint of prompt {row.prompt}: after {len(row.token_ids)} tokens it names "
                    f"{sorted(token_ids)[:5] or 'no token'}; expected ids from 0 to {vocab_size - 1}, or None for all"
                )
            mask[slot] = False
            mask[slot, list(token_ids)] = True
        return mask.to(self.device)

    def record(self, token_ids: list[int], logprobs: list[float]) -> list[int]:
        """Append a token to each live row and return the slots of the rows that are finished."""
        if math.isnan(sum(logprobs)):
            raise InputError(
                f"{self.lm.name}: its logits are not numbers (NaN); the weights are damaged, use earlier ones"
            )
        end_ids, longest, stops = self.lm.chat.end_ids, self.config.max_new_tokens, self.config.stop
        finished = []
        for slot, (row, token, logprob) in enumerate(zip(self.live, token_ids, logprobs, strict=True)):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            if token in end_ids:
                self.finish(row, "eos", self.lm.chat.text_of(row.token_ids))
            elif stops and (text := self.text_before_stop(row)) is not None:
                self.finish(row, "stop", text.strip())
            elif len(row.token_ids) == longest:
                self.finish(row, "length", self.lm.chat.text_of(row.token_ids))
            else:
                continue
            finished.append(slot)
        return finished

    def finish(self, row: Row, reason: FinishReason, text: str) -> None:
        """Keep a row's completion."""
        self.done[row.prompt][row.sample] = Sample(row.token_ids, row.logprobs, reason, text)
        self.num_done += 1
        if self.on_done is not None:
            self.on_done(self.num_done)

    def text_before_stop(self, row: Row) -> str | None:
        """Return the text before a stop text that the newest token completed; None if it completed none.

        Most tokens cannot complete one, and are told by their own text; the others cost decoding the row.
        """
        token = row.token_ids[-1]
        if token not in self.may_end_stop:
            piece = decode_text(self.lm, [token])
            ends = {stop[-1] for stop in self.config.stop}
            # Alone, a token may lose a blank, and a character that is cut in two shows as U+FFFD.
            self.may_end_stop[token] = "\ufffd" in piece or any(end.isspace() or end in piece for end in ends)
        if not self.may_end_stop[token]:
            return None
        text = decode_text(self.lm, row.token_ids)
        places = [place for place in map(text.find, self.config.stop) if place >= 0]
        return text[: min(places)] if places else None

    def retire(self, finished: list[int], width: int) -> None:
        """Close the gaps that finished rows left: the last live rows, of up to `width` tokens, move into them."""
        num_left = len(self.live) - len(finished)
        gone = set(finished)
        holes = [slot for slot in finished if slot < num_left]
        movers = [slot for slot in range(num_left, len(self.live)) if slot not in gone]
        order = list(range(num_left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            self.memory.copy(holes, movers, width)
            self.uniforms[holes] = self.uniforms[movers]
        self.live = [self.live[slot] for slot in order]
        kept = torch.tensor(order, dtype=torch.long, device=self.device)
        self.tokens, self.positions, self.counts = self.tokens[kept], self.positions[kept], self.counts[kept]


def decode_text(lm: LanguageModel, token_ids: Sequence[int]) -> str:
    """Return the text of tokens without special tokens; unlike `chat.text_of`, blanks at the ends stay."""
    text = lm.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
