"""Binary classifiers: a causal trunk with a fresh head at the last real token (Burns et al. 2023, appendix A).

A head has two units, one for each class, or a single one. Either way a text has one number, its logit z of class 1:
z = z_1 - z_0, or the unit itself, and P(class 1) = sigmoid(z). A pair of texts has z(first) - z(second), with
P(first is better) = sigmoid of that, as in reward models. The last token is found by length, never by comparing ids
with a padding token.

Saved as `AutoModelForSequenceClassification`. Shapes: n texts, D hidden units.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from qinglan.core.device import Device
from qinglan.core.errors import InputError
from qinglan.core.records import Case
from qinglan.core.rng import stream, stream_seed
from qinglan.models.adapters import (
    EVERY_WEIGHT,
    LoRAConfig,
    adapter_of,
    carry_adapter,
    load_model,
    save_adapter,
    share_weights,
    trainable_copy,
)
from qinglan.models.cases import encode_case
from qinglan.models.chat import ChatFormat, TemplateName, make_chat_format, tokenizer_to_save
from qinglan.models.directory import load_tokenizer, prepare, save_weights, write_model_directory
from qinglan.models.language_model import LanguageModel, end_states
from qinglan.models.tokens import TokenBatch, TokenSequence, padded_batches

HeadStart = Literal["probe", "words", "normal", "zero"]


class TextClassifier(NamedTuple):
    """A trunk with a head of one or two units, and how texts are written for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    device: Device
    name: str


def classifier_from(
    lm: LanguageModel,
    *,
    num_outputs: int,
    head: HeadStart,
    seed: int,
    words: tuple[str, str] | None = None,
    lora: LoRAConfig = EVERY_WEIGHT,
) -> TextClassifier:
    """Return a classifier to be trained: a copy of the trunk of `lm`, or an adapter on it, and a new head without bias.

    Args:
        lm: whose trunk is copied.
        num_outputs: 2, one unit for each class, or 1.
        head: "normal": weights ~ N(0, 1/(D+1)); "zero" (the code released with the paper), which a "probe" replaces
            (`set_direction`); "words": the unembedding rows of `words`, so that training starts at the zero-shot
            verdict (the paper, for the words "0" and "1").
        seed: draws a "normal" head, and the first weights of an adapter.
        words: what says class 0 and class 1.
        lora: an adapter in place of training every weight.

    Raises:
        InputError: an architecture without such a form; words that are missing or begin with the same token.
    """
    config = copy.deepcopy(lm.model.config)
    config.num_labels = num_outputs
    try:
        with torch.device("meta"):  # no memory and no random draws for weights that are replaced below
            model: Any = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise InputError(
            f"{lm.name}: {type(lm.model).__name__} has no form with a classification head; choose another model"
        ) from error
    trunk: Any = lm.model.base_model
    setattr(model, model.base_model_prefix, share_weights(trunk))
    carry_adapter(lm.model, model)
    num_hidden = model.score.in_features
    if head == "normal":
        start = stream(seed, "classification head")
        weight = torch.randn((num_outputs, num_hidden), generator=start) * (num_hidden + 1) ** -0.5
    elif head in ("zero", "probe"):
        weight = torch.zeros((num_outputs, num_hidden))
    else:
        if words is None:
            raise InputError(
                f"{lm.name}: a head from words needs a task with words for its two verdicts; use another head"
            )
        rows = word_rows(lm, words)
        if rows is None:
            raise InputError(f"{lm.name}: '{words[0]}' and '{words[1]}' have the same tokens; use another head")
        weight = rows if num_outputs == 2 else rows[1:] - rows[:1]
    model.score = nn.utils.skip_init(nn.Linear, num_hidden, num_outputs, bias=False, device=lm.device.torch_device)
    with torch.no_grad():
        model.score.weight.copy_(weight)
    student = trainable_copy(model, lora, seed=stream_seed(seed, "adapter"))
    return TextClassifier(prepare(student), lm.tokenizer, lm.chat, lm.device, lm.name)


def set_direction(classifier: TextClassifier, direction: Tensor) -> None:
    """Set the head so that z = direction . state, from a direction [D], in place."""
    head: Any = classifier.model.score
    rows = direction[None] if head.weight.shape[0] == 1 else torch.stack([-direction / 2, direction / 2])
    with torch.no_grad():
        head.weight.copy_(rows)


def word_rows(lm: LanguageModel, words: tuple[str, str]) -> Tensor | None:
    """Return the unembedding rows [2, D], fp32, of the first tokens in which the words differ; None if none do."""
    # Behind a space, as they would stand after a text; the family's tokenizer puts that space there by itself.
    no, yes = (lm.tokenizer.encode(f" {word}", add_special_tokens=False) for word in words)
    ids = next(([a, b] for a, b in zip(no, yes, strict=False) if a != b), None)
    head: Any = lm.model.get_output_embeddings()
    return None if ids is None else head.weight.detach()[ids].float().cpu()


def logits_of_batch(classifier: TextClassifier, batch: TokenBatch) -> Tensor:
    """Return z of each sequence, fp32 [n] in the order of `batch.sequence_rows`; gradients flow."""
    states = end_states(classifier.model, batch)
    head: Any = classifier.model.score
    with torch.autocast(states.device.type, enabled=False):
        outputs = F.linear(states.float(), head.weight.float())
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs[:, 1] - outputs[:, 0]


def sequence_logits(classifier: TextClassifier, sequences: Sequence[TokenSequence], max_tokens: int = 8192) -> Tensor:
    """Return z of each sequence in the given order, fp32 [n] on the CPU, no gradient."""
    logits = torch.empty(len(sequences))
    with torch.no_grad(), classifier.device.autocast():
        for batch in padded_batches(sequences, max_tokens):
            places = [sequence.original for sequence in batch.sequence_rows]
            logits[places] = logits_of_batch(classifier, batch).cpu()
    return logits


def text_logits(classifier: TextClassifier, cases: Sequence[Case], max_tokens: int = 8192) -> list[tuple[float, ...]]:
    """Return z of each text of each case: one number, or two for a pair."""
    return encoded_logits(classifier, [encode_case(classifier, case) for case in cases], max_tokens)


def encoded_logits(
    classifier: TextClassifier, encoded: Sequence[Sequence[TokenSequence]], max_tokens: int = 8192
) -> list[tuple[float, ...]]:
    """Return z of each text of each case that is tokenised already."""
    flat = sequence_logits(classifier, [one for sequences in encoded for one in sequences], max_tokens)
    numbers = iter(flat.tolist())
    return [tuple(next(numbers) for _ in sequences) for sequences in encoded]


def case_logits(classifier: TextClassifier, cases: Sequence[Case], max_tokens: int = 8192) -> Tensor:
    """Return the logit of each case, fp32 [n]: of class 1, or that the first text is better."""
    return torch.tensor(margins(text_logits(classifier, cases, max_tokens)))


def margins(logits: Sequence[tuple[float, ...]]) -> list[float]:
    """Return the logit of each case from those of its texts: z, or z(first) - z(second)."""
    return [one[0] if len(one) == 1 else one[0] - one[1] for one in logits]


def save_classifier(classifier: TextClassifier, directory: Path) -> None:
    """Write a directory that `AutoModelForSequenceClassification` opens, or PEFT's counterpart for an adapter.

    `transformers` finds the token that is read as the last one that is not padding. Where padding is an end token no
    padding token is named, and `transformers` takes one sequence at a time.
    """

    def write(part: Path) -> None:
        pad_id = None if classifier.chat.pad_id in classifier.chat.end_ids else classifier.chat.pad_id
        notes = {"render_hash": classifier.chat.render_hash}
        tokenizer_to_save(classifier.chat).save_pretrained(part)
        if adapter_of(classifier.model) is not None:
            save_adapter(classifier.model, part, notes)
            return
        classifier.model.config.qinglan = notes
        save_weights(classifier.model, part, pad_token_id=pad_id)

    write_model_directory(directory, write)


def load_classifier(path: Path | str, device: Device, *, template: TemplateName = "own") -> TextClassifier:
    """Open a classifier of one or two outputs. Raises `InputError` for what cannot be opened, and for more outputs."""
    directory = Path(path)
    tokenizer = load_tokenizer(directory)
    model = load_model(AutoModelForSequenceClassification, directory, device)
    if model.config.num_labels not in (1, 2):
        raise InputError(f"{directory}: has {model.config.num_labels} labels; expected a classifier with one or two")
    return TextClassifier(model, tokenizer, make_chat_format(tokenizer, template), device, str(path))
