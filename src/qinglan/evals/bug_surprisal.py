"""Do planted bugs stand out by their looks? Surprisal of program lines under a language model.

If the most surprising line of a program gives a planted bug away, a catch rate on such bugs says little about bugs that
models write themselves: these numbers stand beside every catch rate.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qinglan.core.rng import stream_seed
from qinglan.core.run import Measure
from qinglan.evals.metrics import mean_with_interval, roc_auc
from qinglan.models.language_model import TokenSequence
from qinglan.tasks.code_cases import draw_task
from qinglan.tasks.code_documents import draw_program, task_text
from qinglan.tasks.code_faults import tamper
from qinglan.tasks.item import Draw

Scorer = Callable[[Sequence[TokenSequence]], Sequence[Tensor]]
"""Log-probabilities of each sequence's completion tokens, in nats: `functools.partial(completion_logprobs, lm)`."""


class Reviewed(NamedTuple):
    """A program as it follows its specification."""

    beginning: str
    """Everything before the program."""
    program: str
    faulty_line: int
    """From 1; 0 for a right program."""


class BugSurprisal(NamedTuple):
    """How far planted bugs stand out."""

    auc: Measure
    """Of the surprisal of the most surprising line, tampered against right programs; 0.5: no difference."""
    hit_rate: Measure
    """Share of tampered programs whose most surprising line is the faulty one."""
    chance: Measure
    """The same for a line drawn at random: the mean of 1 / lines."""


def line_surprisals(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], logprobs: Sequence[float]) -> list[float]:
    """Return for each line its most surprising token's surprisal in nats; a line feed belongs to the line it opens."""
    lines = [0.0]
    for token, logprob in zip(ids, logprobs, strict=True):
        if "\n" in tokenizer.decode([token]):
            lines.append(0.0)
        lines[-1] = max(lines[-1], -logprob)
    return lines


def bug_surprisal(
    tokenizer: PreTrainedTokenizerBase, score: Scorer, programs: Sequence[Reviewed], *, seed: int
) -> BugSurprisal:
    """Return how far the faults in `programs` stand out, with 95% intervals over programs.

    Args:
        tokenizer: of the model that scores; has a token for the beginning of text.
        score: the model.
        programs: tampered ones and right ones.
        seed: of the intervals.
    """
    sequences, sizes = [], []
    for one in programs:
        start = [tokenizer.bos_token_id, *tokenizer(one.beginning, add_special_tokens=False).input_ids]
        written = tokenizer(one.program.rstrip("\n"), add_special_tokens=False).input_ids
        sequences.append(TokenSequence([*start, *written], len(start)))
        sizes.append(written)
    surprisals = [
        line_surprisals(tokenizer, ids, values.tolist()) for ids, values in zip(sizes, score(sequences), strict=True)
    ]
    is_tampered = [float(one.faulty_line > 0) for one in programs]
    faulty = [(one.faulty_line - 1, lines) for one, lines in zip(programs, surprisals, strict=True) if one.faulty_line]
    hits = [float(max(range(len(lines)), key=lines.__getitem__) == line) for line, lines in faulty]
    return BugSurprisal(
        roc_auc([max(lines) for lines in surprisals], is_tampered, seed=seed),
        mean_with_interval(hits, seed=seed, unit="rate"),
        mean_with_interval([1 / len(lines) for _, lines in faulty], seed=seed, unit="rate"),
    )


def planted_bugs(count: int, seed: int) -> list[Reviewed]:
    """Return programs for held-out compositions, about half of them tampered with."""
    draw = Draw(random.Random(stream_seed(seed, "planted bugs")), held_out=True)
    programs = []
    for _ in range(count):
        task = draw_task(draw, num_cases=12)
        text = draw_program(draw, task)
        found = tamper(draw, text, task.cases) if draw.rng.random() < 0.5 else None
        shown = (
            Reviewed(task_text(task), found.program, found.fault.line) if found else Reviewed(task_text(task), text, 0)
        )
        programs.append(shown)
    return programs
