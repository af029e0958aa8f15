"""Cases with labels, as a classifier's training sees them: checked, tokenised, pairs in an order drawn at random."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qinglan.core.errors import InputError
from qinglan.core.records import Case
from qinglan.core.rng import stream
from qinglan.models.cases import encode_case
from qinglan.models.language_model import LanguageModel, TokenSequence, max_context


class Labelled(NamedTuple):
    """Cases with what is taken for the probability of class 1 (or of the first text being better), in [0, 1]."""

    cases: Sequence[Case]
    targets: Sequence[float]


class Example(NamedTuple):
    """One case as tokens: its text, or its two texts in the order drawn; `target` belongs to that order."""

    sequences: tuple[TokenSequence, ...]
    target: float


def check_labelled(labelled: Labelled, where: str) -> None:
    """Raise `InputError` for no cases, labels outside [0, 1], hard labels of one class, or texts mixed with pairs."""
    cases, targets = labelled
    if len(cases) != len(targets):
        raise InputError(f"{where}: {len(targets)} labels for {len(cases)} cases; expected one for each")
    if not cases:
        raise InputError(f"{where}: no cases to train on; expected some of each class")
    for case, target in zip(cases, targets, strict=True):
        if not 0.0 <= target <= 1.0:  # NaN fails too
            raise InputError(f"{where}: case {case.id}: label {target!r}; expected a number from 0 to 1")
    if len({len(case.texts) for case in cases}) != 1 or len(cases[0].texts) not in (1, 2):
        raise InputError(f"{where}: cases of one text and of two are mixed; expected one kind")
    is_pair = len(cases[0].texts) == 2  # the order of a pair is drawn, so that both classes occur anyway
    classes = {target > 0.5 for target in targets if target != 0.5}
    # Soft labels that lean to one side still order the cases; hard ones of a single class say nothing.
    is_hard = all(target in (0.0, 0.5, 1.0) for target in targets)
    if not is_pair and is_hard and len(classes) < 2:
        only = "no class at all" if not classes else f"class {int(classes.pop())}"
        raise InputError(f"{where}: all {len(cases)} labels say {only}; expected both; nothing can be learnt from one")


def encode_examples(lm: LanguageModel, labelled: Labelled, seed: int, where: str) -> list[Example]:
    """Return the cases as tokens, pairs in random order. Raises `InputError` for a text that exceeds the context."""
    limit = max_context(lm.model)
    examples = []
    for case, target in zip(*labelled, strict=True):
        sequences = tuple(encode_case(lm, case))
        longest = max(len(sequence.token_ids) for sequence in sequences)
        if longest > limit:
            raise InputError(
                f"{where}: case {case.id}: a text of {longest} tokens; the context of {lm.name} is {limit} tokens and "
                "nothing is cut silently; shorten the text or leave the case out"
            )
        is_turned = len(sequences) == 2 and is_shown_second_first(seed, case)
        examples.append(Example(sequences[::-1], 1.0 - target) if is_turned else Example(sequences, float(target)))
    return examples


def is_shown_second_first(seed: int, case: Case) -> bool:
    """Return whether a pair is presented in the other order: a coin by its id."""
    return bool(torch.randint(2, (), generator=stream(seed, "classifier", "pair order", case.id)))
