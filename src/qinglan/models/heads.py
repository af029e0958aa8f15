"""Models with one scalar per token: reward models (score of a whole completion) and value models (value of a state).

A reward model is a causal trunk whose unembedding is replaced by one linear unit (Ouyang et al. 2022, section 3.5;
Stiennon et al. 2020, section 3.4, give the head's initial spread). The score stands at the last real token, the end
token where there is one. An offset makes demonstrations score 0 on average (Ouyang et al. 2022, section 3.5); it is
subtracted from every number that leaves this module, so that a value model that starts as a copy of the reward model
agrees with it.

Saved as `AutoModelForSequenceClassification` with one label; offset and render hash stand in config.json.

Shapes: B rows, T columns, D hidden units.
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
from qinglan.core.records import Completion, Prompt, Scorer
from qinglan.core.rng import stream
from qinglan.models import adapters
from qinglan.models.adapters import (
    LoRAConfig,
    adapter_of,
    carry_adapter,
    is_adapter_directory,
    load_model,
    notes_of,
    save_adapter,
    share_weights,
    trainable_copy,
)
from qinglan.models.chat import ChatFormat, TemplateName, make_chat_format, tokenizer_to_save
from qinglan.models.completion_rows import make_completion_batches, states_at_ends
from qinglan.models.directory import load_tokenizer, prepare, save_weights, write_model_directory
from qinglan.models.language_model import LanguageModel, end_states
from qinglan.models.sizes import with_filled_rows
from qinglan.models.tokens import TokenBatch, TokenSequence


class ScalarModel(NamedTuple):
    """A trunk with one linear unit on top, and how conversations are written for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    device: Device
    offset: float
    """Subtracted from raw scores and values, in the scores' own unit."""
    name: str


def scalar_model_from(
    lm: LanguageModel, *, seed: int, trunk: Literal["copy", "shared", "same"] = "copy"
) -> ScalarModel:
    """Return a scalar model with the trunk of `lm` and a new head, weights ~ N(0, 1/(D+1)), no bias.

    The trunk is a copy, or has modules of its own over the same weights, not to be trained ("shared"), or is that of
    `lm` itself ("same"), so that one forward pass serves both.
    """
    config = copy.deepcopy(lm.model.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):  # no memory and no random draws for weights that are replaced below
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise InputError(
            f"{lm.name}: {type(lm.model).__name__} has no form with a scalar head; choose another model"
        ) from error
    original: Any = lm.model.base_model
    if trunk != "same":
        original = copy.deepcopy(original) if trunk == "copy" else share_weights(original)
    setattr(model, model.base_model_prefix, original)
    carry_adapter(lm.model, model)
    num_hidden = model.score.in_features
    weight = torch.randn((1, num_hidden), generator=stream(seed, "scalar head")) * (num_hidden + 1) ** -0.5
    model.score = nn.utils.skip_init(nn.Linear, num_hidden, 1, bias=False, device=lm.device.torch_device)
    with torch.no_grad():
        model.score.weight.copy_(weight)
    return ScalarModel(prepare(model), lm.tokenizer, lm.chat, lm.device, 0.0, lm.name)


def start_of_training(scalar: ScalarModel, lora: LoRAConfig, *, seed: int, name: str) -> ScalarModel:
    """Return the model that a trainer works on: a copy, or head and adapter over its weights (`trainable_copy`)."""
    return scalar._replace(model=trainable_copy(scalar.model, lora, seed=seed), name=name)


def end_of_training(scalar: ScalarModel, lora: LoRAConfig) -> ScalarModel:
    """Return the model that a trainer leaves: with `lora.merge`, its adapter is added to a copy of the weights."""
    return scalar._replace(model=adapters.end_of_training(scalar.model, lora))


def token_values(scalar: ScalarModel, hidden: Tensor) -> Tensor:
    """Return one number for each token, fp32 [...], offset subtracted, from hidden states [..., D]."""
    head: Any = scalar.model.score
    with torch.autocast(hidden.device.type, enabled=False):
        rows = with_filled_rows(hidden.float().reshape(-1, hidden.shape[-1]))
        values = F.linear(rows, head.weight.float())[: hidden.shape[:-1].numel(), 0]
        return values.view(hidden.shape[:-1]) - scalar.offset


def last_token_scores(scalar: ScalarModel, batch: TokenBatch) -> Tensor:
    """Return the score of each sequence, fp32 [num sequences] in the order of `batch.sequence_rows`; gradients flow."""
    return token_values(scalar, end_states(scalar.model, batch))


def score_sequences(scalar: ScalarModel, sequences: Sequence[TokenSequence], max_tokens: int = 8192) -> Tensor:
    """Return the scores of sequences in the given order, fp32 [n] on the CPU, no gradient.

    Args:
        scalar: reward model.
        sequences: prompts with completions.
        max_tokens: budget of rows * columns of one forward pass.
    """
    scores = torch.empty(len(sequences))
    with torch.no_grad(), scalar.device.autocast():
        for batch in make_completion_batches(sequences, range(len(sequences)), [scalar.model], max_tokens=max_tokens):
            scores[batch.numbers] = token_values(scalar, states_at_ends(scalar.model, batch)).cpu()
    return scores


def as_scorer(scalar: ScalarModel, max_tokens: int = 8192) -> Scorer:
    """Return the reward model as a function (prompts, completions) -> scores.

    A completion that carries token ids is scored on exactly those (they must come from the same tokenizer); one that is
    only text is written as in training.
    """

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        # The K completions of a ranking share a prompt, which is rendered once.
        rendered = {messages: scalar.chat.prompt_ids(messages) for messages in {prompt.messages for prompt in prompts}}
        sequences = []
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt_ids = rendered[prompt.messages]
            written = completion.token_ids
            ids = scalar.chat.completion_ids(completion.text) if written is None else list(written)
            sequences.append(TokenSequence(prompt_ids + ids, len(prompt_ids)))
        return score_sequences(scalar, sequences, max_tokens).tolist()

    return score


def save_scalar_model(scalar: ScalarModel, directory: Path) -> None:
    """Write a directory that `AutoModelForSequenceClassification` opens, with offset and render hash in config.json.

    A model with an adapter becomes a PEFT directory, with the head in it and those two in qinglan.json.

    `transformers` finds the scored token as the last one that is not padding. Where padding is an end token that
    would be the token before it, so no padding token is named then, and `transformers` takes one sequence at a time.
    """

    def write(part: Path) -> None:
        pad_id = None if scalar.chat.pad_id in scalar.chat.end_ids else scalar.chat.pad_id
        notes = {"offset": scalar.offset, "render_hash": scalar.chat.render_hash}
        tokenizer_to_save(scalar.chat).save_pretrained(part)
        if adapter_of(scalar.model) is not None:
            save_adapter(scalar.model, part, notes)
            return
        scalar.model.config.qinglan = notes
        save_weights(scalar.model, part, pad_token_id=pad_id)

    write_model_directory(directory, write)
    if adapter_of(scalar.model) is None:
        scalar.model.config.name_or_path = str(Path(directory).resolve())  # where the base of an adapter lies


def load_scalar_model(path: Path | str, device: Device, *, template: TemplateName = "own") -> ScalarModel:
    """Open a reward or value model; one that was not saved by Qinglan has offset 0.

    Raises `InputError` for what `load_language_model` raises it for, for more than one label, and where conversations
    would be written otherwise than in training.
    """
    directory = Path(path)
    tokenizer = load_tokenizer(directory)
    chat = make_chat_format(tokenizer, template)
    model = load_model(AutoModelForSequenceClassification, directory, device)
    if model.config.num_labels != 1:
        raise InputError(f"{directory}: has {model.config.num_labels} labels; expected a reward model with one")
    notes = notes_of(directory) if is_adapter_directory(directory) else getattr(model.config, "qinglan", {})
    saved = {"offset": 0.0, "render_hash": chat.render_hash, **notes}
    if saved["render_hash"] != chat.render_hash:
        raise InputError(
            f"{directory}: tokenizer or chat template are not those it was trained with (render hash "
            f"{chat.render_hash}, trained with {saved['render_hash']}); restore the files, and leave "
            "--template as in training"
        )
    return ScalarModel(model, tokenizer, chat, device, float(saved["offset"]), str(path))
