"""Continuous batching: a queue of prompts, live rows in slots, one token for each live row at every step.

Each prompt is prefilled once, with the prefix that its completions begin with, and copied to the slots of its K
samples. Finished rows leave at once: the last rows move into their slots, so that a step costs what the live rows cost.
When a quarter of the slots is free they are refilled. The last token of a prefilled text is fed by the row's first
step, not by the prefill, so that all logits that are drawn from come from one place.
"""

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qinglan.core.errors import InputError
from qinglan.core.records import FinishReason
from qinglan.core.rng import numpy_stream
from qinglan.models.constraints import Constraint
from qinglan.models.language_model import LanguageModel, token_logprobs, vocabulary_logits
from qinglan.models.row_memory import RowMemory
from qinglan.models.sampling import Draw, SamplingConfig, draw

MAX_PREFILL_TOKENS = 2048
"""Prompt tokens, padding included, in one forward pass, before rows and columns are filled up (to less than twice)."""


class Sample(NamedTuple):
    """One completion as it was drawn."""

    token_ids: list[int]
    """Its prefix comes first. The end token is included where finish_reason is "eos", and what completed the stop text
    where it is "stop"."""
    logprobs: list[float]
    """Nats, one for each token, under the distribution it was drawn from; 0 where it was forced, as in the prefix."""
    finish_reason: FinishReason
    text: str
    """Of the whole completion, prefix included; what a stop text began, and the text behind it, is cut."""
    raw_logprobs: list[float]
    """Nats, one for each token, forced ones too, under the model's whole distribution at the sampler's temperature
    (greedy: 1): as a forward pass over prompt and completion gives them. Equal to `logprobs` where nothing was left
    out by top-k, top-p or a constraint."""


class Request(NamedTuple):
    """One prompt, and what is particular to its completions."""

    prompt: Sequence[int]
    """Token ids that end exactly where the completion begins."""
    key: str
    """With `seed` and the sample's index, it names the random stream."""
    seed: int
    prefix: Sequence[int] = ()
    """Tokens that every completion begins with, computed once for all samples: K continuations of a partial text."""
    constraint: Constraint | None = None
    stop: tuple[str, ...] | None = None
    """Texts that end these completions; None: those of the configuration."""

    @property
    def text_ids(self) -> list[int]:
        """Prompt and prefix: what is there before anything is drawn."""
        return [*self.prompt, *self.prefix]


class Row:
    """A completion that is being written."""

    __slots__ = ("logprobs", "number", "pending", "raw_logprobs", "request", "sample", "token_ids")

    def __init__(self, number: int, request: Request, sample: int) -> None:
        self.number = number
        self.request = request
        self.sample = sample
        self.pending: list[int] = []
        self.token_ids = list(request.prefix)
        self.logprobs = [0.0] * len(request.prefix)
        self.raw_logprobs: list[float] = []

    def allowed(self) -> AbstractSet[int] | None:
        """Return what the next token may be, None for anything. Forced tokens come one by one."""
        if not self.pending and self.request.constraint is not None:
            answer = self.request.constraint(self.token_ids)
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
        requests: Sequence[Request],
        num_samples: int,
        config: SamplingConfig,
        *,
        memory: RowMemory,
        num_slots: int,
        on_done: Callable[[int], None] | None = None,
    ) -> None:
        """Prepare `num_samples` of each request; `on_done` is told how many are finished.

        `memory` holds `num_slots` rows, and one more unless each request wants a single sample.
        """
        self.lm, self.requests, self.num_samples, self.config = lm, requests, num_samples, config
        self.texts = [request.text_ids for request in requests]
        self.memory, self.num_slots = memory, num_slots
        self.on_done = on_done
        self.device = lm.model.device
        self.refill_at = max(1, num_slots // 4)
        # The longest prompts leave the queue first, so that rows of similar length stand together.
        self.queue = sorted(range(len(requests)), key=lambda number: len(self.texts[number]))
        self.parked: tuple[int, int] | None = None
        """A prompt some of whose samples still wait, and the first of them; slot num_slots keeps its prefix."""
        self.live: list[Row] = []
        self.tokens, self.positions, self.counts = (
            torch.zeros(0, dtype=torch.long, device=self.device) for _ in range(3)
        )
        """What each live row feeds next, at which position, and how many tokens of its completion there are."""
        self.uniforms = torch.zeros(num_slots, config.max_new_tokens, dtype=torch.float64, device=self.device)
        self.is_constrained = any(request.constraint is not None for request in requests)
        self.stops = [config.stop if request.stop is None else request.stop for request in requests]
        self.stop_ends = {text[-1] for stop in self.stops for text in stop}
        self.may_end_stop: dict[int, bool] = {}
        self.prefix_logprobs: dict[int, list[float]] = {}
        self.prefix_texts = [decode_text(lm, request.prefix) if request.prefix else "" for request in requests]
        self.done: list[dict[int, Sample]] = [{} for _ in requests]
        self.num_done = 0

    def run(self) -> list[list[Sample]]:
        """Draw everything; returns [prompt][sample]."""
        while self.live or self.queue or self.parked:
            if (self.queue or self.parked) and self.num_slots - len(self.live) >= self.refill_at:
                self.refill()
            self.step()
        return [[samples[number] for number in range(self.num_samples)] for samples in self.done]

    def refill(self) -> None:
        """Admit rows into the free slots: the parked prompt's first, then new prompts, prefilled in batches."""
        first = len(self.live)
        texts = self.texts
        if self.parked is not None:
            number, sample = self.parked
            slots = self.admit(number, sample)
            if len(texts[number]) > 1:
                self.memory.copy(slots, [self.num_slots] * len(slots), len(texts[number]) - 1)
        while self.queue and len(self.live) < self.num_slots:
            batch: list[int] = []
            targets: list[int] = []
            sources: list[int] = []
            while self.queue and len(self.live) < self.num_slots:
                widest = len(texts[batch[0] if batch else self.queue[-1]])
                if batch and widest * (len(batch) + 1) > MAX_PREFILL_TOKENS:
                    break
                number = self.queue.pop()
                slots = self.admit(number, 0)
                if self.parked is not None:
                    slots.append(self.num_slots)
                targets += slots
                sources += [len(batch)] * len(slots)
                batch.append(number)
            hidden = self.memory.prefill([texts[number][:-1] for number in batch], targets, sources)
            for row, number in enumerate(batch):
                self.read_prefix(number, hidden[row])
        self.start_rows(first)

    def read_prefix(self, number: int, hidden: Tensor) -> None:
        """Keep the log-probabilities of a request's prefix; `hidden` are the prefilled states of its text, [T, D]."""
        prompt, prefix = self.requests[number].prompt, self.requests[number].prefix
        if prefix:
            states = hidden[len(prompt) - 1 : len(prompt) + len(prefix) - 1]
            tokens = torch.tensor(prefix, device=self.device)
            temperature = self.config.temperature or 1.0
            scored = token_logprobs(self.lm.model, states, tokens, temperature=temperature, with_entropy=False)
            self.prefix_logprobs[number] = scored.logprobs.tolist()

    def admit(self, number: int, sample: int) -> list[int]:
        """Give free slots to the samples of a request from `sample` on, and park it if there are too few."""
        first = len(self.live)
        last = min(self.num_samples, sample + self.num_slots - first)
        self.live += [Row(number, self.requests[number], index) for index in range(sample, last)]
        self.parked = (number, last) if last < self.num_samples else None
        return list(range(first, len(self.live)))

    def start_rows(self, first: int) -> None:
        """Set what the rows from slot `first` on feed at their first step, and their uniform numbers."""
        rows = self.live[first:]
        for slot, row in enumerate(rows, start=first):
            row.raw_logprobs = list(self.prefix_logprobs.get(row.number, ()))
            stream = numpy_stream(row.request.seed, "sample", row.request.key, row.sample)
            self.uniforms[slot] = torch.from_numpy(stream.random(self.config.max_new_tokens))
        tokens = torch.tensor([self.texts[row.number][-1] for row in rows], device=self.device)
        positions = torch.tensor([len(self.texts[row.number]) - 1 for row in rows], device=self.device)
        self.tokens = torch.cat([self.tokens, tokens])
        self.positions = torch.cat([self.positions, positions])
        self.counts = torch.cat([self.counts, torch.zeros_like(positions)])

    def step(self) -> None:
        """Feed one token to each live row, draw the next ones, and let finished rows go."""
        width = int(self.positions.max()) + 1
        states = self.memory.extend(self.tokens[:, None], self.positions[:, None], width)
        logits = vocabulary_logits(self.lm.model, states[:, 0])
        # Rows that fill up the live ones are drawn for as well: tensors of few sizes, whose memory serves again.
        num_rows, num_live = len(states), len(self.live)
        counts = F.pad(self.counts, (0, num_rows - num_live))
        drawn = draw(
            logits,
            self.uniforms[:num_rows].gather(1, counts[:, None])[:, 0],
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            allowed=self.allowed(*logits.shape) if self.is_constrained else None,
        )
        drawn = Draw(*(values[:num_live] for values in drawn))
        self.tokens = drawn.token_ids
        self.positions = self.positions + 1
        self.counts = self.counts + 1
        finished = self.record(drawn)
        if finished:
            self.retire(finished)

    def allowed(self, num_rows: int, vocab_size: int) -> Tensor:
        """Return the mask of allowed tokens, [rows, vocab]. Raises `InputError` for a set that no token fits."""
        mask = torch.ones(num_rows, vocab_size, dtype=torch.bool)
        for slot, row in enumerate(self.live):
            token_ids = row.allowed()
            if token_ids is None:
                continue
            if not token_ids or min(token_ids) < 0 or max(token_ids) >= vocab_size:
                raise InputError(
                    f"constraint of prompt {row.number}: after {len(row.token_ids)} tokens it names "
                    f"{sorted(token_ids)[:5] or 'no token'}; expected ids from 0 to {vocab_size - 1}, or None for all"
                )
            mask[slot] = False
            mask[slot, list(token_ids)] = True
        return mask.to(self.device)

    def record(self, drawn: Draw) -> list[int]:
        """Append a token to each live row and return the slots of the rows that are finished."""
        token_ids, logprobs, raw_logprobs = (values.tolist() for values in drawn)
        if math.isnan(sum(logprobs)):
            raise InputError(
                f"{self.lm.name}: its logits are not numbers (NaN); the weights are damaged, use earlier ones"
            )
        end_ids, longest = self.lm.chat.end_ids, self.config.max_new_tokens
        finished = []
        for slot, (row, token) in enumerate(zip(self.live, token_ids, strict=True)):
            row.token_ids.append(token)
            row.logprobs.append(logprobs[slot])
            row.raw_logprobs.append(raw_logprobs[slot])
            if token in end_ids:
                self.finish(row, "eos", self.lm.chat.text_of(row.token_ids))
            elif self.stops[row.number] and (text := self.text_before_stop(row)) is not None:
                self.finish(row, "stop", text.strip())
            elif len(row.token_ids) - len(row.request.prefix) == longest:
                self.finish(row, "length", self.lm.chat.text_of(row.token_ids))
            else:
                continue
            finished.append(slot)
        return finished

    def finish(self, row: Row, reason: FinishReason, text: str) -> None:
        """Keep a row's completion."""
        self.done[row.number][row.sample] = Sample(row.token_ids, row.logprobs, reason, text, row.raw_logprobs)
        self.num_done += 1
        if self.on_done is not None:
            self.on_done(self.num_done)

    def text_before_stop(self, row: Row) -> str | None:
        """Return the text before a stop text that the newest token completed; None if it completed none.

        A stop text may begin in the prefix, but one that lies in it whole is past. Most tokens cannot complete one, and
        are told by their own text; the others cost decoding the row.
        """
        token = row.token_ids[-1]
        if token not in self.may_end_stop:
            piece = decode_text(self.lm, [token])
            # Alone, a token may lose a blank, and a character that is cut in two shows as U+FFFD.
            self.may_end_stop[token] = "\ufffd" in piece or any(end.isspace() or end in piece for end in self.stop_ends)
        if not self.may_end_stop[token]:
            return None
        text = decode_text(self.lm, row.token_ids)
        past = len(self.prefix_texts[row.number])
        found = [text.find(stop, max(0, past - len(stop) + 1)) for stop in self.stops[row.number]]
        places = [place for place in found if place >= 0]
        return text[: min(places)] if places else None

    def retire(self, finished: list[int]) -> None:
        """Close the gaps that finished rows left: the last live rows move into them."""
        num_left = len(self.live) - len(finished)
        gone = set(finished)
        holes = [slot for slot in finished if slot < num_left]
        movers = [slot for slot in range(num_left, len(self.live)) if slot not in gone]
        order = list(range(num_left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            self.memory.copy(holes, movers, int(self.positions[movers].max()))
            self.uniforms[holes] = self.uniforms[movers]
        self.live = [self.live[slot] for slot in order]
        kept = torch.tensor(order, dtype=torch.long, device=self.device)
        self.tokens, self.positions, self.counts = self.tokens[kept], self.positions[kept], self.counts[kept]


def decode_text(lm: LanguageModel, token_ids: Sequence[int]) -> str:
    """Return the text of tokens without special tokens; unlike `chat.text_of`, blanks at the ends stay."""
    text = lm.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
