"""Causal language models: load, save, and the log-probabilities of given tokens.

Any directory that `AutoModelForCausalLM` opens (Llama, Qwen, Gemma, Mistral, GPT-2, ...). Weights are fp32, dropout is
0: a ratio of probabilities must be exactly 1 before the first step. The trunk's forward pass computes no logits; they
are computed where a target stands, in chunks, in fp32 whatever the precision of the matmuls before them.

Shapes: B rows, T columns, D hidden units, V tokens in the vocabulary, N targets in a batch.
"""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qinglan.core.device import Device
from qinglan.core.errors import InputError
from qinglan.models import adapters
from qinglan.models.adapters import LoRAConfig, adapter_of, load_model, save_adapter, trainable_copy
from qinglan.models.chat import ChatFormat, TemplateName, make_chat_format, tokenizer_to_save
from qinglan.models.directory import MAX_FILE_SIZE, load_tokenizer, save_weights, write_model_directory
from qinglan.models.kernels import Runs
from qinglan.models.sizes import with_filled_rows
from qinglan.models.tokens import SequenceRow, TokenBatch, TokenSequence, collate, padded_batches
from qinglan.models.trunk import has_runs, is_written_out, states_of_batch, states_of_runs

__all__ = [
    "LanguageModel",
    "SequenceRow",
    "TargetLogprobs",
    "TokenBatch",
    "TokenSequence",
    "check_batching",
    "completion_logprobs",
    "copy_language_model",
    "end_of_training",
    "hidden_states",
    "load_language_model",
    "max_context",
    "save_language_model",
    "start_of_training",
    "target_logprobs",
    "target_states",
    "token_logprobs",
    "vocabulary_logits",
    "vocabulary_size",
]

_CHUNK_ELEMENTS = 1 << 25  # logits of one chunk: 128 MiB of fp32


class LanguageModel(NamedTuple):
    """A causal model with its tokenizer and chat format. Roles (policy, reference, ...) are variable names."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    device: Device
    name: str
    """Path or name; the `producer_id` of what the model writes."""


class TargetLogprobs(NamedTuple):
    """Of the N targets of a batch, row by row."""

    logprobs: Tensor
    """fp32 [N], nats."""
    entropy: Tensor
    """fp32 [N], nats: of the tempered distribution over the vocabulary at the same position; NaN if not asked for."""


def load_language_model(
    path: Path | str, device: Device, *, template: TemplateName = "own", for_training: bool = True
) -> LanguageModel:
    """Open a Hugging Face directory, or a PEFT directory with its base, in fp32, evaluation mode, dropout 0.

    Args:
        path: the directory.
        device: where the model runs.
        template: the tokenizer's own chat template, or the plain one.
        for_training: False for a model that is only sampled from, which needs no batches of padded or packed sequences.

    Raises `InputError` for no such directory, no tokenizer, no chat template, damaged or missing weights, and for an
    architecture that a small trial run shows is not scored exactly (for training: OPT, Bloom, Falcon, Mamba).
    """
    directory = Path(path)
    tokenizer = load_tokenizer(directory)
    chat = make_chat_format(tokenizer, template)
    model = load_model(AutoModelForCausalLM, directory, device)
    if max(chat.end_ids) >= vocabulary_size(model):
        raise InputError(
            f"{directory}: the tokenizer's end token lies outside the model's vocabulary; use its own tokenizer"
        )
    if model.base_model is model:
        raise InputError(
            f"{directory}: {type(model).__name__} has no trunk that gives hidden states; not supported here"
        )
    _check_logits(model, directory)
    if for_training:
        check_batching(model)
    return LanguageModel(model, tokenizer, chat, device, str(path))


def save_language_model(lm: LanguageModel, directory: Path, *, max_file_size: str = MAX_FILE_SIZE) -> None:
    """Write an ordinary Hugging Face directory, or PEFT directory where the model has an adapter.

    An earlier one of that name is replaced only when this one is whole. Weights are split into files of at most
    `max_file_size`, as "16MB".
    """

    def write(part: Path) -> None:
        tokenizer_to_save(lm.chat).save_pretrained(part)
        if adapter_of(lm.model) is not None:
            save_adapter(lm.model, part, {})
            return
        generation = GenerationConfig(eos_token_id=sorted(lm.chat.end_ids), pad_token_id=lm.chat.pad_id)
        lm.model.generation_config = generation
        save_weights(lm.model, part, pad_token_id=lm.chat.pad_id, max_file_size=max_file_size)

    write_model_directory(directory, write)
    if adapter_of(lm.model) is None:
        lm.model.config.name_or_path = str(Path(directory).resolve())  # where the base of an adapter lies


def start_of_training(lm: LanguageModel, lora: LoRAConfig, *, seed: int, name: str) -> LanguageModel:
    """Return the model that a trainer works on: a copy of `lm`, or an adapter over its weights (`trainable_copy`)."""
    return lm._replace(model=trainable_copy(lm.model, lora, seed=seed), name=name)


def end_of_training(lm: LanguageModel, lora: LoRAConfig) -> LanguageModel:
    """Return the model that a trainer leaves: with `lora.merge`, its adapter is added to a copy of the weights."""
    return lm._replace(model=adapters.end_of_training(lm.model, lora))


def copy_language_model(lm: LanguageModel, name: str | None = None) -> LanguageModel:
    """Return a model with its own copy of the weights, under a new name if one is given."""
    return lm._replace(model=copy.deepcopy(lm.model), name=lm.name if name is None else name)


def max_context(model: PreTrainedModel) -> int:
    """Return the number of tokens the model has positions for; `sys.maxsize` where its configuration sets no limit."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of rows of the embedding, which may exceed the number of tokens that the tokenizer knows."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, "B T D"]:
    """Return the trunk's last hidden states; no logits are computed. Works for every model with a trunk.

    Sequences in one row do not see each other. Matmuls have the precision of the `Device.autocast` around the call.
    Raises `InputError` for a sequence longer than the model's context.
    """
    return _run_trunk(model, batch, None)


def states_at(
    model: PreTrainedModel, batch: TokenBatch, rows: Int[Tensor, " M"], columns: Int[Tensor, " M"]
) -> Float[Tensor, "M D"]:
    """Return `hidden_states` at some real tokens only, which saves many models work in their last layer."""
    return _run_trunk(model, batch, (rows * batch.input_ids.shape[1] + columns).to(model.device))


def target_states(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, "N D"]:
    """Return the states that predict the targets: those one column to their left."""
    rows, columns = batch.target_mask.nonzero(as_tuple=True)
    return states_at(model, batch, rows, columns - 1)


def end_states(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, "S D"]:
    """Return the state at the last token of each sequence, in the order of `batch.sequence_rows`."""
    last = torch.tensor([(sequence.row, sequence.end - 1) for sequence in batch.sequence_rows])
    return states_at(model, batch, *last.unbind(dim=1))


def _run_trunk(model: PreTrainedModel, batch: TokenBatch, places: Tensor | None) -> Tensor:
    context = max_context(model)
    longest = max(sequence.end - sequence.start for sequence in batch.sequence_rows)
    if longest > context:
        raise InputError(
            f"sequence of {longest} tokens: the model's context is {context} tokens and nothing is cut silently; "
            "shorten the prompt, lower max_new_tokens, or use a model with a longer context"
        )
    position_ids = batch.position_ids
    if position_ids.shape[1] > context:
        # Only padding, or a packed row's padding, counts that far; learned positions have no row for it.
        position_ids = position_ids.clamp(max=context - 1)
    input_ids, position_ids = batch.input_ids.to(model.device), position_ids.to(model.device)
    if is_written_out(model):
        if has_runs(model):
            spans = [(one.row * input_ids.shape[1], one.start, one.end) for one in batch.sequence_rows]
            tokens = torch.cat([torch.arange(row + start, row + end) for row, start, end in spans])
            runs = Runs.of([end - start for _, start, end in spans])
            return states_of_runs(model, input_ids, position_ids, tokens, runs, places)
        return states_of_batch(model, input_ids, position_ids, places=places)
    # use_cache=False and no attention_mask: only then does transformers look for packed sequences (masking_utils).
    states = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    return states if places is None else states.flatten(0, 1).index_select(0, places)


def vocabulary_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return fp32 logits [..., V] of hidden states [..., D], with the architecture's own scale and soft cap.

    The matmul is fp32 even under autocast: a bf16 logit of 20 is off by up to 0.06, and its log-probability would be.
    """
    config = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        logits = F.linear(hidden.float(), head.weight.float(), bias)
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2: cap * tanh(logits / cap)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def target_logprobs(
    model: PreTrainedModel,
    states: Float[Tensor, "N D"],
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    with_entropy: bool = True,
) -> TargetLogprobs:
    """Return log-probability and entropy of every target: the logits at column t-1 score the token at column t.

    Args:
        model: causal model whose trunk made `states`.
        states: those of `target_states`.
        batch: names the targets.
        temperature: logits are divided by it, as the sampler does.
        chunk_tokens: targets whose logits exist at one time; by default as many as take 128 MiB. Where there are
            several chunks, the backward pass computes their logits again.
        with_entropy: False saves two passes over the logits.
    """
    targets = batch.input_ids[batch.target_mask].to(states.device)
    return token_logprobs(
        model, states, targets, temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=with_entropy
    )


def token_logprobs(
    model: PreTrainedModel,
    states: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    with_entropy: bool = True,
    entropy_gradient: bool = True,
) -> TargetLogprobs:
    """Return log-probability and entropy of `targets` [N] given the hidden states [N, D] that predict them.

    The other arguments are those of `target_logprobs`; without `entropy_gradient` the entropy is only measured.
    """
    if temperature <= 0:
        raise InputError(f"temperature: {temperature}; expected more than 0 to score tokens")

    def of_chunk(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        num_targets, states = len(states), with_filled_rows(states)
        tokens = F.pad(tokens, (0, len(states) - num_targets))
        logits = vocabulary_logits(model, states)
        all_logprobs = F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
        logprobs = all_logprobs.gather(-1, tokens[:, None])[:num_targets, 0]
        if not with_entropy:
            return logprobs, torch.full_like(logprobs, torch.nan)
        if not entropy_gradient:
            all_logprobs = all_logprobs.detach()
        return logprobs, -(all_logprobs.exp() * all_logprobs).sum(-1)[:num_targets]  # H = -sum_v p_v log p_v

    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_ELEMENTS // vocabulary_size(model))
    if len(targets) <= chunk_tokens:
        return TargetLogprobs(*of_chunk(states, targets))
    chunks = [
        checkpoint(of_chunk, part, tokens, use_reentrant=False, preserve_rng_state=False)
        for part, tokens in zip(states.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    logprobs, entropy = zip(*chunks, strict=True)
    return TargetLogprobs(torch.cat(logprobs), torch.cat(entropy))


def completion_logprobs(
    lm: LanguageModel, sequences: Sequence[TokenSequence], *, temperature: float = 1.0, max_tokens: int = 8192
) -> list[Tensor]:
    """Return the log-probabilities of each sequence's targets, in the given order (fp32, on the CPU, no gradient).

    Args:
        lm: the model that scores.
        sequences: prompts with completions.
        temperature: of the distribution that is scored.
        max_tokens: budget of rows * columns of one forward pass.
    """
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    with torch.no_grad(), lm.device.autocast():
        for batch in padded_batches(sequences, max_tokens):
            states = target_states(lm.model, batch)
            logprobs = target_logprobs(lm.model, states, batch, temperature=temperature, with_entropy=False).logprobs
            for sequence, values in zip(batch.sequence_rows, logprobs.cpu().split(batch.lengths), strict=True):
                found[sequence.original] = values
    return found


def check_batching(model: PreTrainedModel) -> None:
    """Check that padding and packing leave every hidden state as it is alone; `load_language_model` does so.

    Raises `InputError` for an architecture whose attention does not keep packed sequences apart.
    """
    num_tokens = vocabulary_size(model)
    sequences = [TokenSequence([(7 * i + 3 * length) % num_tokens for i in range(length)], 1) for length in (9, 4, 6)]
    with torch.no_grad():
        alone = [hidden_states(model, collate(sequences, [[index]]))[0] for index in range(len(sequences))]
        for rows in ([[0], [1], [2]], [[0, 1, 2]]):
            batch = collate(sequences, rows)
            hidden = hidden_states(model, batch)
            for original, row, start, end in batch.sequence_rows:
                expected = alone[original]
                difference = (hidden[row, start:end] - expected).abs().max() / expected.abs().max()
                if not difference < 1e-3:
                    raise InputError(
                        f"{type(model).__name__}: a sequence's hidden states change by {difference:.1e} when it shares "
                        f"a batch ({'packed' if len(rows) == 1 else 'padded'}); it can be sampled from, not trained"
                    )


def _check_logits(model: PreTrainedModel, directory: Path) -> None:
    """Refuse an architecture whose logits are not `vocabulary_logits` of its hidden states."""
    batch = collate([TokenSequence([0, 1, 0, 1], 1)])
    with torch.no_grad():
        theirs = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits.float()
        ours = vocabulary_logits(model, hidden_states(model, batch))
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        raise InputError(f"{directory}: {type(model).__name__} computes its logits in a way that is not supported here")
