"""Supervised fine-tuning on demonstrations (InstructGPT, section 3.5 and appendices C.1 and C.3).

The paper trains two such models, and so do we: the *baseline* that the policy is compared with (16 epochs, residual
dropout, checkpoint chosen by the reward model's score on validation prompts, not by validation loss, which is at its
best after one epoch while people's preference keeps improving), and PPO's *starting point* and reference policy
(2 epochs with 10% pretraining data mixed in). Both are calls of `train_sft` with another configuration.

Only the completion's tokens are targets, its end token among them. The loss of an update is the mean over all target
tokens of the whole optimizer batch, however it is cut into micro-batches.

Departures: AdamW for Adam (the same while weight decay is 0); gradients are clipped. "10% pretraining data" is read as
a share of the sequences and, because pretraining sequences are all target, as the weight of their mean in the loss.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.records import Demonstrated
from qinglan.core.rng import permutation, stream_seed
from qinglan.core.run import Stage
from qinglan.learn.batch import make_batches
from qinglan.learn.compiling import compile_trunks
from qinglan.learn.dropout import adapter_dropout, residual_dropout
from qinglan.learn.encode import encode_completion
from qinglan.learn.gradients import Backward, accumulate
from qinglan.learn.losses import cross_entropy
from qinglan.learn.optimize import (
    Checkpointer,
    OptimizerConfig,
    TrainingState,
    check_finite,
    clip_gradients,
    restore_training,
    set_lr,
    training_tensors,
)
from qinglan.models.adapters import LoRAConfig
from qinglan.models.language_model import (
    LanguageModel,
    TokenBatch,
    TokenSequence,
    completion_logprobs,
    end_of_training,
    load_language_model,
    max_context,
    save_language_model,
    start_of_training,
    target_logprobs,
    target_states,
)
from qinglan.models.trunk import num_at_once

PretrainSource = Callable[[int, int], list[list[int]]]
"""`(start, count)` -> token ids of pretraining sequences number start .. start + count - 1, the same on every call."""


class SFTConfig(Config):
    """Supervised fine-tuning; the defaults suit models of 0.2 to 2 million parameters."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    """AdamW and its cosine schedule."""
    num_epochs: int = Field(default=3, ge=1)
    """Passes over the demonstrations (InstructGPT: 16 for the baseline, 2 for PPO's starting point)."""
    batch_size: int = Field(default=32, ge=1)
    """Demonstrations per update (InstructGPT: 32; 8 at 175B)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Residual dropout (InstructGPT's baseline: 0.2)."""
    pretrain_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of pretraining sequences in each batch, and their weight in its loss (PPO's starting point: 0.1)."""
    pack: bool = True
    """Put several short sequences into one row, each seeing only itself."""
    max_tokens: int = Field(default=8192, ge=1)
    """Tokens in one forward pass, padding included. Changes speed and memory, never the gradient."""
    max_length: int | None = Field(default=None, ge=2)
    """Demonstrations with more tokens, prompt included, are left out and counted; default: the model's context."""
    lora: LoRAConfig = LoRAConfig()
    """Train a low-rank adapter in place of every weight."""
    compile: bool = False
    """Compile the trunk's training step with `torch.compile`; a run is then repeatable, but not to the last bit."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Updates between two checkpoints; one is also written after each epoch with a `select` function."""

    @classmethod
    def paper_baseline(cls) -> Self:
        """Return the 1.3B and 6B baseline of appendix C.1: 16 epochs, rate 9.65e-6, batch 32, dropout 0.2."""
        return cls(optimizer=OptimizerConfig(learning_rate=9.65e-6), num_epochs=16, batch_size=32, dropout=0.2)

    @classmethod
    def paper_ppo_start(cls) -> Self:
        """Return the 1.3B starting point of appendix C.3: 2 epochs, rate 5e-6, batch 32, 10% pretraining data."""
        return cls(optimizer=OptimizerConfig(learning_rate=5e-6), num_epochs=2, batch_size=32, pretrain_fraction=0.1)


def train_sft(
    lm: LanguageModel,
    demonstrations: Sequence[Demonstrated],
    config: SFTConfig,
    *,
    stage: Stage,
    seed: int,
    pretrain: PretrainSource | None = None,
    valid: Sequence[Demonstrated] = (),
    select: Callable[[LanguageModel], float] | None = None,
) -> LanguageModel:
    """Return a copy of `lm` fine-tuned on `demonstrations`, also saved as a model directory in `stage.dir/"model"`.

    Args:
        lm: where training starts; it is not changed.
        demonstrations: prompts with the completions to imitate.
        config: settings; `pretrain_fraction` above 0 wants `pretrain`.
        stage: folder for checkpoints and result; a killed stage goes on from its last checkpoint, bit-identical on CPU.
        seed: decides order and dropout masks.
        pretrain: the pretraining corpus, by position.
        valid: held-out demonstrations, whose loss is logged after each epoch.
        select: called with the model after each epoch; the epoch with the highest number is returned (the first of
            equals). Default: the last epoch.

    Raises:
        InputError: nothing to train on, a completion without end token, or a loss that is not finite.
    """
    directory = stage.dir / "model"
    if directory.is_dir():  # written whole, after the last update: an earlier start of this stage came to its end
        return load_language_model(directory, lm.device)._replace(name=stage.name)

    # 1. Data
    examples = encode_demonstrations(lm, demonstrations, config.max_length, stage.name)
    valid_examples = encode_demonstrations(lm, valid, config.max_length, stage.name) if valid else []
    mix = _pretraining_mix(lm, pretrain, config, stage.name)
    steps_per_epoch = -(-len(examples) // config.batch_size)
    num_steps = config.num_epochs * steps_per_epoch

    # 2. Student and state
    student = start_of_training(lm, config.lora, seed=stream_seed(seed, "sft", "adapter"), name=stage.name)
    optimizer = config.optimizer.make(student.model)
    checkpointer = Checkpointer(stage.dir / "checkpoints")
    state = checkpointer.load()
    if state is None:
        stage.log(0, check_start(student, examples[: config.batch_size], config, stage.name))
        steps_done, best = 0, Best(None, {})
    else:
        restore_training(state.tensors, student.model, optimizer)
        steps_done, best = state.step, Best.restored(state)

    # 3. Loop
    dropout = max(config.dropout, config.lora.dropout)
    compiled = compile_trunks([student.model], config.compile, student.device, stage.name, dropout=dropout)
    progress = stage.progress(num_steps)
    for step in range(steps_done, num_steps):
        epoch, place = divmod(step, steps_per_epoch)
        order = permutation(len(examples), seed, "sft", "order", epoch)
        chosen = [examples[i] for i in order[place * config.batch_size :][: config.batch_size]]
        set_lr(optimizer, config.optimizer.lr_at(step, num_steps))
        masks = stream_seed(seed, "sft", "dropout", step)
        with compiled():
            metrics = update(student, optimizer, chosen, mix(step), config, masks, f"{stage.name}, step {step + 1}")
        metrics["epoch"] = (step + 1) / steps_per_epoch

        is_epoch_end = place == steps_per_epoch - 1
        if is_epoch_end and valid_examples:
            metrics["valid_loss"] = mean_loss(student, valid_examples, config.max_tokens)
        if is_epoch_end and select is not None:
            score = check_finite(select(student), "the selection score", f"{stage.name}, epoch {epoch + 1}")
            metrics["selection_score"] = score
            best = best.or_this(score, student)
        stage.log(step + 1, metrics)
        if (step + 1) % config.checkpoint_every == 0 or (is_epoch_end and select is not None):
            tensors = training_tensors(student.model, optimizer) | best.tensors
            checkpointer.save(step + 1, tensors, {"best_score": best.score})
        progress.show(step + 1, f"loss {metrics['loss']:.3f}")

    # 4. Result
    if best.score is not None:
        restore_training(best.tensors, student.model, prefix="best.")
    student = end_of_training(student, config.lora)
    save_language_model(student, directory)
    checkpointer.clear()
    return student


# ----------------------------------------------------------------------------------------------------------- data


def encode_demonstrations(
    lm: LanguageModel, demonstrations: Sequence[Demonstrated], max_length: int | None, stage: str
) -> list[TokenSequence]:
    """Return the demonstrations as tokens, each ending in an end token; too long ones are left out, counted on stderr.

    A demonstration that a model sampled keeps its token ids. Nothing is cut: a cut one would lose its end token.
    Raises `InputError` for a completion that does not end in an end token, or if nothing is left.
    """
    limit = max_length or max_context(lm.model)
    kept = []
    for item in demonstrations:
        sequence = encode_completion(lm.chat, item.prompt, item.demonstration)
        if sequence.token_ids[-1] not in lm.chat.end_ids:
            raise InputError(
                f"{stage}: demonstration {item.demonstration.id}: its last token ({sequence.token_ids[-1]}) is no end "
                f"token ({sorted(lm.chat.end_ids)}); the model would not learn to stop; leave out completions that "
                "were cut short, or give text without token ids"
            )
        if len(sequence.token_ids) <= limit:
            kept.append(sequence)
    if not kept:
        raise InputError(
            f"{stage}: none of {len(demonstrations)} demonstrations fits into {limit} tokens; expected at least one; "
            "give shorter ones or raise max_length"
        )
    if len(kept) < len(demonstrations):
        left_out = len(demonstrations) - len(kept)
        print(
            f"{stage}: {left_out} of {len(demonstrations)} demonstrations left out (over {limit} tokens)",
            file=sys.stderr,
        )
    return kept


def check_start(
    lm: LanguageModel, sequences: Sequence[TokenSequence], config: SFTConfig, stage: str
) -> dict[str, float]:
    """Check the first batch as the model will see it: every completion's end token is a target.

    Returns what is logged at step 0: sequences, target tokens, and the share of rows in which nothing is a target.
    Raises `InputError` if an end token is not supervised, which would teach the model never to stop.
    """
    batches = make_batches(sequences, max_tokens=config.max_tokens, pack=config.pack)
    for batch in batches:
        for _, row, _, end in batch.sequence_rows:
            is_taught = bool(batch.target_mask[row, end - 1]) and int(batch.input_ids[row, end - 1]) in lm.chat.end_ids
            if not is_taught:
                raise InputError(
                    f"{stage}: the end token of a completion is not among the targets; expected it to be taught; check "
                    "the chat template and the tokenizer's end token"
                )
    has_target = torch.cat([batch.target_mask.any(dim=1) for batch in batches])
    num_targets = sum(int(batch.target_mask.sum()) for batch in batches)
    masked_share = 1.0 - float(has_target.float().mean())
    return {
        "start/sequences": len(sequences),
        "start/target_tokens": num_targets,
        "start/masked_row_share": masked_share,
    }


def _pretraining_mix(
    lm: LanguageModel, pretrain: PretrainSource | None, config: SFTConfig, stage: str
) -> Callable[[int], list[TokenSequence]]:
    """Return the function from a step to the pretraining sequences of its batch; all but a first token are targets."""
    if config.pretrain_fraction == 0:
        return lambda step: []
    if pretrain is None:
        raise InputError(
            f"{stage}: pretrain_fraction is {config.pretrain_fraction}, but there is no pretraining corpus; give one "
            "or set pretrain_fraction to 0"
        )
    ratio = config.pretrain_fraction / (1.0 - config.pretrain_fraction)
    count = max(1, round(config.batch_size * ratio))
    limit = min(config.max_length or sys.maxsize, max_context(lm.model))

    def mix(step: int) -> list[TokenSequence]:
        return [TokenSequence(ids[:limit], 1) for ids in pretrain(step * count, count) if len(ids) > 1]

    return mix


# ----------------------------------------------------------------------------------------------------- one update


class BatchLoss(NamedTuple):
    """Losses of one optimizer batch in nats per target token; their gradient lies in the model's `.grad`."""

    loss: float
    """What is minimised: (1 - f) times the demonstrations' mean plus f times the pretraining mean."""
    demonstration_loss: float
    pretrain_loss: float | None
    num_targets: int


def update(
    lm: LanguageModel,
    optimizer: torch.optim.Optimizer,
    demonstrations: Sequence[TokenSequence],
    pretraining: Sequence[TokenSequence],
    config: SFTConfig,
    dropout_seed: int,
    where: str,
) -> dict[str, float]:
    """Take one optimizer step at the rate that is set; return its metrics. Raises `InputError` if not finite."""
    optimizer.zero_grad()
    losses = accumulate_gradients(lm, demonstrations, pretraining, config, dropout_seed)
    check_finite(losses.loss, "the loss", where)
    grad_norm = check_finite(clip_gradients(lm.model, config.optimizer.max_grad_norm), "the gradient's norm", where)
    optimizer.step()
    metrics = {"loss": losses.loss, "target_tokens": losses.num_targets, "grad_norm": grad_norm}
    if losses.pretrain_loss is not None:
        metrics |= {"demonstration_loss": losses.demonstration_loss, "pretrain_loss": losses.pretrain_loss}
    return metrics | {"lr": optimizer.param_groups[0]["lr"]}


def accumulate_gradients(
    lm: LanguageModel,
    demonstrations: Sequence[TokenSequence],
    pretraining: Sequence[TokenSequence],
    config: SFTConfig,
    dropout_seed: int,
) -> BatchLoss:
    """Add the gradient of one optimizer batch to the model's `.grad`, whatever the size of its micro-batches."""
    sequences = [*demonstrations, *pretraining]
    num_targets = [len(sequence.token_ids) - sequence.num_prompt_tokens for sequence in sequences]
    counts = [sum(num_targets[: len(demonstrations)]), sum(num_targets[len(demonstrations) :])]
    fraction = config.pretrain_fraction if counts[1] else 0.0
    # Kind 0 is a demonstration's target, kind 1 a pretraining sequence's. Each has the weight that makes the sum over
    # the whole batch the mean over its kind, so that how the batch is cut does not matter.
    weights = torch.tensor([(1.0 - fraction) / counts[0], fraction / max(counts[1], 1)])

    def of_batch(numbered: tuple[int, TokenBatch], backward: Backward) -> tuple[Tensor, Tensor]:
        number, batch = numbered
        masks = residual_dropout(lm.model, config.dropout, stream_seed(dropout_seed, number))
        adapter_masks = adapter_dropout(lm.model, config.lora.dropout, stream_seed(dropout_seed, "adapter", number))
        with masks, adapter_masks, lm.device.autocast():
            states = target_states(lm.model, batch)
            logprobs = target_logprobs(lm.model, states, batch, with_entropy=False).logprobs
        kind_of_sequence = torch.tensor([int(place.original >= len(demonstrations)) for place in batch.sequence_rows])
        kinds = kind_of_sequence.repeat_interleave(torch.tensor(batch.lengths))
        backward(cross_entropy(logprobs, weights[kinds].to(logprobs)))
        return kinds, logprobs.detach().cpu().double()

    draws_masks = max(config.dropout, config.lora.dropout) > 0  # by hooks that all batches would meet
    units = [len(sequence.token_ids) for sequence in sequences]
    at_once = 1 if draws_masks else num_at_once([lm.model], lm.device, units, config.max_tokens)
    batches = make_batches(sequences, max_tokens=config.max_tokens // at_once, pack=config.pack, multiple_of=at_once)
    sums = torch.zeros(2, dtype=torch.float64)
    for kinds, logprobs in accumulate([lm.model], enumerate(batches), of_batch, at_once):
        sums.index_add_(0, kinds, -logprobs)
    demo_loss, pretrain_loss = float(sums[0]) / counts[0], float(sums[1]) / max(counts[1], 1)
    loss = (1.0 - fraction) * demo_loss + fraction * pretrain_loss
    return BatchLoss(loss, demo_loss, pretrain_loss if counts[1] else None, sum(counts))


def mean_loss(lm: LanguageModel, sequences: Sequence[TokenSequence], max_tokens: int) -> float:
    """Return the mean loss over all target tokens of `sequences`, in nats, without a gradient."""
    return -float(torch.cat(completion_logprobs(lm, sequences, max_tokens=max_tokens)).mean())


class Best(NamedTuple):
    """The best epoch so far by the caller's `select` function; no score before the first call."""

    score: float | None
    tensors: dict[str, Tensor]

    def or_this(self, score: float, lm: LanguageModel) -> "Best":
        """Return the model at hand if it scores higher, else what was best before."""
        if self.score is not None and score <= self.score:
            return self
        return Best(
            score, {name: tensor.clone() for name, tensor in training_tensors(lm.model, prefix="best.").items()}
        )

    @staticmethod
    def restored(state: TrainingState) -> "Best":
        """Return the best epoch that a checkpoint holds."""
        kept = {name: tensor for name, tensor in state.tensors.items() if name.startswith("best.")}
        return Best(state.values["best_score"], kept)
