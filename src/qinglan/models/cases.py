"""Cases as a model reads them, and what a base model says of them without training: its verdict, its own record.

A plain text begins with the beginning-of-text token and has no end token, so that a classifier's feature, and a base
model's verdict, stand right behind its last word. Texts that complete a conversation are written by the chat template,
end token included; an empty one stands for the place where the completion would begin.

Shapes: n cases, D hidden units.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qinglan.core.errors import InputError
from qinglan.core.records import Case
from qinglan.models.chat import ChatFormat
from qinglan.models.generate import SamplingConfig, generate
from qinglan.models.language_model import LanguageModel, completion_logprobs, end_states, max_context
from qinglan.models.tokens import TokenSequence, padded_batches

MAX_RECORD_TOKENS = 24
"""Longest recollection that a model writes before it judges."""


class Reader(Protocol):
    """Whatever has a tokenizer and a chat format: a language model or a classifier."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""

    @property
    def chat(self) -> ChatFormat:
        """How conversations are written."""


def plain_ids(reader: Reader, text: str) -> list[int]:
    """Return a text's ids behind the beginning-of-text token (the end token where there is none); nothing follows."""
    bos, eos = reader.tokenizer.bos_token_id, reader.tokenizer.eos_token_id
    first = bos if bos is not None else eos if eos is not None else reader.chat.end_id
    # Control tokens that stand in a text are text: they could otherwise forge the end of a turn.
    return [first, *reader.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)]


def encode_case(reader: Reader, case: Case) -> list[TokenSequence]:
    """Return one sequence for each text of the case; the last token is where it is judged.

    Raises `InputError` for a case whose own record was not written yet (`write_records`).
    """
    if case.after_record is not None:
        raise InputError(f"case {case.id}: the model's own record is missing; write it first")
    if not case.messages:
        return [_sequence(plain_ids(reader, text)) for text in case.texts]
    prompt = reader.chat.prompt_ids(case.messages)
    return [_sequence([*prompt, *(reader.chat.completion_ids(text) if text else [])]) for text in case.texts]


def _sequence(ids: list[int]) -> TokenSequence:
    return TokenSequence(ids, len(ids))


def case_length(reader: Reader, case: Case) -> int:
    """Return the tokens of a case's longest text, an own record at its longest included."""
    room = 0 if case.after_record is None else MAX_RECORD_TOKENS + len(case.after_record)
    return room + max(len(sequence.token_ids) for sequence in encode_case(reader, case._replace(after_record=None)))


def case_features(lm: LanguageModel, cases: Sequence[Case], max_tokens: int = 8192) -> Tensor:
    """Return the trunk's last hidden state at the last token of each case, fp32 [n, D] on the CPU, no gradient.

    Of two texts it is the difference, first minus second, so that a linear probe scores both alike.
    """
    encoded = [encode_case(lm, case) for case in cases]
    flat = [sequence for sequences in encoded for sequence in sequences]
    states: list[Tensor] = [torch.empty(0)] * len(flat)
    with torch.no_grad(), lm.device.autocast():
        for batch in padded_batches(flat, max_tokens):
            for place, state in zip(batch.sequence_rows, end_states(lm.model, batch).float().cpu(), strict=True):
                states[place.original] = state
    found = iter(states)
    own = [[next(found) for _ in sequences] for sequences in encoded]
    return torch.stack([one[0] if len(one) == 1 else one[0] - one[1] for one in own])


def verdict_logits(lm: LanguageModel, cases: Sequence[Case], shown: Sequence[tuple[Case, int]] = ()) -> Tensor:
    """Return log P(word for class 1) - log P(word for class 0) right after each case, fp32 [n]: zero-shot judging.

    `shown` are cases with their labels, written before each case: few-shot prompting, for plain texts only.
    Raises `InputError` for cases without verdict words, and where examples and case do not fit into the context.
    """
    before = " ".join(f"{_text(case)} {_verdicts(case)[label]}." for case, label in shown)
    sequences = []
    for case in cases:
        sequences += _with_verdicts(lm, case._replace(texts=(f"{before} {_text(case)}",)) if shown else case)
    longest = max(len(sequence.token_ids) for sequence in sequences)
    if longest > max_context(lm.model):
        raise InputError(
            f"prompt of {longest} tokens with {len(shown)} examples: the context of {lm.name} is "
            f"{max_context(lm.model)} tokens; use fewer examples or shorter texts"
        )
    sums = torch.stack([logprobs.sum() for logprobs in completion_logprobs(lm, sequences)])
    return sums[1::2] - sums[0::2]


def _text(case: Case) -> str:
    if case.messages or len(case.texts) != 1:
        raise InputError(f"case {case.id}: examples can be shown before single plain texts only")
    return case.texts[0]


def _verdicts(case: Case) -> tuple[str, str]:
    if case.verdicts is None:
        raise InputError(f"case {case.id}: has no words for a verdict, so a base model cannot be asked for one")
    return case.verdicts


def _with_verdicts(lm: LanguageModel, case: Case) -> list[TokenSequence]:
    """Return the case followed by each of its verdict words."""
    ids = encode_case(lm, case)[0].token_ids
    found = []
    for word in _verdicts(case):
        joint = plain_ids(lm, f"{case.texts[0]} {word}")
        if not case.messages and joint[: len(ids)] == ids:
            found.append(TokenSequence(joint, len(ids)))
        elif case.messages and not case.texts[0]:
            found.append(TokenSequence(ids + lm.chat.completion_ids(word)[:-1], len(ids)))
        else:
            alone = lm.tokenizer.encode(word, add_special_tokens=False)
            found.append(TokenSequence(ids + alone, len(ids)))
    return found


def write_records(lm: LanguageModel, cases: Sequence[Case]) -> list[Case]:
    """Return the cases with the model's own greedy recollection (up to its first full stop) and what follows it.

    Cases that ask for none come back as they are. The recollection is the model's: what it gets wrong stays wrong.
    """
    asked = [place for place, case in enumerate(cases) if case.after_record is not None]
    written = list(cases)
    if not asked:
        return written
    config = SamplingConfig(temperature=0.0, max_new_tokens=MAX_RECORD_TOKENS, stop=(".",))
    rows = generate(lm, [plain_ids(lm, cases[place].texts[0]) for place in asked], config, seed=0)
    for place, row in zip(asked, rows, strict=True):
        case = cases[place]
        own = row[0].text.strip()
        written[place] = case._replace(texts=(f"{case.texts[0]} {own}.{case.after_record}",), after_record=None)
    return written
