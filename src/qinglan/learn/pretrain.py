"""Pretraining: next-token prediction over blocks of tokens, for base models small enough to be made at home.

None of the four systems pretrains; each starts from a base model. This loop makes that model for the built-in world, on
a CPU in the background or on a GPU. What carries small nets is taken from elsewhere:

- Muon for hidden matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW for embeddings and gains;
- warm-up, a constant rate and a linear decay to zero ("trapezoid": Hägele et al. 2024, arXiv 2405.18392), or a cosine;
- optionally an exponential moving average of the weights, which is then what is probed and returned;
- a loss weight for every token, given by the corpus: a specification may count little, constants taken from it much.

A corpus is a function from a position to blocks of tokens, so data order needs no state: a run that is killed and
started again ends bit-identical, on CPU with the same number of threads, to one never stopped. The settings stand in
`pretrain_config.py`, one update in `pretrain_update.py`.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qinglan.core.device import device_name
from qinglan.core.errors import InputError
from qinglan.core.files import write_json
from qinglan.core.run import Stage
from qinglan.learn.blocks import BlockSource, read_batches, read_blocks
from qinglan.learn.optimize import Checkpointer, restore_training, training_tensors
from qinglan.learn.pretrain_config import PretrainConfig
from qinglan.learn.pretrain_update import TINY, Optimizers, block_loss, make_optimizers, make_work, update
from qinglan.models.language_model import (
    LanguageModel,
    copy_language_model,
    load_language_model,
    max_context,
    save_language_model,
)

Probe = Callable[[LanguageModel], dict[str, float]]
"""Measures a model on the way; its numbers are logged beside the loss."""

HELD_OUT_FIRST_BLOCK = 1_000_000_000
"""Training never comes to blocks from this number on: the held-out loss is measured there, alike for every model."""


def pretrain(
    lm: LanguageModel,
    blocks: BlockSource,
    config: PretrainConfig,
    *,
    stage: Stage,
    seed: int,
    probe: Probe | None = None,
) -> LanguageModel:
    """Return a copy of `lm` trained on `blocks`, saved in `stage.dir/"model"` with `summary.json` beside it.

    Args:
        lm: where training starts, usually freshly drawn; it is not changed.
        blocks: the corpus by position; with `num_data_processes` it must be picklable.
        config: settings.
        stage: folder for checkpoints and result; a killed stage goes on from its last checkpoint, bit-identical on CPU.
        seed: written into the summary; the loop draws nothing (initialisation and corpus have seeds of their own).
        probe: measures the model on the way, as often as `num_probes` says.

    Raises:
        InputError: a context longer than the model's, blocks of another shape, or a loss that is not finite.
    """
    directory = stage.dir / "model"
    if directory.is_dir():  # written whole, after the last update: an earlier start of this stage came to its end
        return load_language_model(directory, lm.device)._replace(name=stage.name)

    # 1. Student and state
    student = start_student(lm, config, stage.name)
    averaged = copy_language_model(student, name=stage.name) if config.averaging else student
    optimizers = make_optimizers(student, config)
    checkpointer = Checkpointer(stage.dir / "checkpoints")
    state = checkpointer.load()
    steps_done, tally = 0, Tally()
    if state is not None:
        restore(state.tensors, student, averaged, optimizers)
        steps_done, tally = state.step, Tally(**state.values)

    # 2. Loop
    work = make_work(student, optimizers, config)
    num_steps = config.num_steps
    log_every, probe_every = -(-num_steps // config.num_logs), -(-num_steps // config.num_probes)
    progress = stage.progress(num_steps - steps_done)
    saved = time.monotonic()
    batches = read_batches(
        blocks, range(steps_done, num_steps), config.batch_size, config.context, config.num_data_processes
    )
    with closing(batches):
        for step in range(steps_done, num_steps):
            started = time.monotonic()
            batch = next(batches)
            got_data = time.monotonic()
            loss = update(work, config, batch, step, f"{stage.name}, update {step + 1}")
            if config.averaging:
                average_weights(averaged.model, student.model, config.averaging, step)
            tally = tally.add(loss, got_data - started, time.monotonic() - started)

            is_last = step + 1 == num_steps
            is_probed = is_last or (step + 1) % probe_every == 0
            if is_probed or (step + 1) % log_every == 0:
                line, tally = tally.line(config) | {"tokens": (step + 1) * config.batch_tokens}, tally.next_line()
                measured = measure(averaged, blocks, config, probe) if is_probed else {}
                stage.log(step + 1, line | measured)
            # None after the last update, so that a resumed run always has metrics of its own to end with.
            if not is_last and time.monotonic() - saved >= config.seconds_between_checkpoints:
                checkpointer.save(step + 1, state_tensors(student, averaged, optimizers), tally._asdict())
                saved = time.monotonic()
            progress.show(
                step + 1 - steps_done, f"loss {loss:.3f}  {config.batch_tokens / tally.last_seconds:.0f} tokens/s"
            )

    # 3. Result
    student.model.zero_grad()
    summary = {
        "seed": seed,
        "parameters": averaged.model.num_parameters(),
        "tokens": line["tokens"],
        "seconds": round(tally.seconds, 1),
        "device": device_name(lm.device),
        "loss": line["loss"],
        "held_out_loss": measured.pop("held_out_loss", None),
        "probes": measured,
        "config": config.model_dump(mode="json"),
    }
    write_json(stage.dir / "summary.json", summary)
    save_language_model(averaged, directory)
    checkpointer.clear()
    return averaged._replace(device=lm.device)


# ------------------------------------------------------------------------------------------------- start and resume


def start_student(lm: LanguageModel, config: PretrainConfig, name: str) -> LanguageModel:
    """Return the copy of `lm` to train, with matrix products in the configured precision.

    Raises `InputError` for a context longer than the model's.
    """
    limit = max_context(lm.model)
    if config.context > limit:
        raise InputError(
            f"{name}: context is {config.context} tokens, but {lm.name} takes {limit} at the most; lower context"
        )
    device = lm.device
    if config.dtype != "auto":
        device = device._replace(compute_dtype=getattr(torch, config.dtype))
    return copy_language_model(lm, name=name)._replace(device=device)


def state_tensors(student: LanguageModel, averaged: LanguageModel, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return all tensors that the rest of the run depends on."""
    tensors = training_tensors(student.model, optimizers.adamw)
    if optimizers.muon is not None:
        tensors |= training_tensors(nn.Module(), optimizers.muon, prefix="muon.")  # its momentum; no weights again
    if averaged is not student:
        tensors |= training_tensors(averaged.model, prefix="averaged.")
    return tensors


def restore(
    tensors: Mapping[str, Tensor], student: LanguageModel, averaged: LanguageModel, optimizers: Optimizers
) -> None:
    """Put what `state_tensors` returned back in place."""
    restore_training(tensors, student.model, optimizers.adamw)
    if optimizers.muon is not None:
        restore_training(tensors, nn.Module(), optimizers.muon, prefix="muon.")
    if averaged is not student:
        restore_training(tensors, averaged.model, prefix="averaged.")


@torch.no_grad()
def average_weights(averaged: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the weights: a <- d * a + (1 - d) * w, with d climbing to `decay` from 0.1 at step 0."""
    share = 1.0 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), share)


# ------------------------------------------------------------------------------------------------------ measurement


class Tally(NamedTuple):
    """What the next line of metrics is made from. Part of a checkpoint: the lines after a resume are the same."""

    loss_sum: float = 0.0
    """Losses added up since the last line."""
    num_updates: int = 0
    """Updates since the last line."""
    line_seconds: float = 0.0
    """Time since the last line, probes and checkpoints left out."""
    data_seconds: float = 0.0
    """Time since the last line spent waiting for blocks."""
    seconds: float = 0.0
    """Time of all updates so far, those before an interruption included."""
    last_seconds: float = 0.0
    """Time of the last update."""

    def add(self, loss: float, data_seconds: float, seconds: float) -> "Tally":
        """Return the tally after one more update."""
        return Tally(
            self.loss_sum + loss,
            self.num_updates + 1,
            self.line_seconds + seconds,
            self.data_seconds + data_seconds,
            self.seconds + seconds,
            seconds,
        )

    def line(self, config: PretrainConfig) -> dict[str, float]:
        """Return the metrics since the last line."""
        return {
            "loss": self.loss_sum / self.num_updates,
            "tokens_per_second": config.batch_tokens * self.num_updates / self.line_seconds,
            "data_share": self.data_seconds / self.line_seconds,
        }

    def next_line(self) -> "Tally":
        """Return the tally with which the next line starts."""
        return Tally(seconds=self.seconds, last_seconds=self.last_seconds)


def measure(lm: LanguageModel, blocks: BlockSource, config: PretrainConfig, probe: Probe | None) -> dict[str, float]:
    """Return held-out loss and the probe's numbers."""
    metrics = {}
    if config.num_held_out_blocks:
        metrics["held_out_loss"] = held_out_loss(lm, blocks, config)
    return metrics | (probe(lm) if probe is not None else {})


@torch.inference_mode()
def held_out_loss(lm: LanguageModel, blocks: BlockSource, config: PretrainConfig) -> float:
    """Return the weighted mean loss, in nats per token, on blocks that training never comes to."""
    loss_sum = weight_sum = 0.0
    for first in range(0, config.num_held_out_blocks, config.batch_size):
        count = min(config.batch_size, config.num_held_out_blocks - first)
        batch = read_blocks(blocks, HELD_OUT_FIRST_BLOCK + first, count, config.context)
        weight = float(batch.weights[:, 1:].sum())
        loss_sum += float(block_loss(lm, batch)) * weight
        weight_sum += weight
    return loss_sum / max(weight_sum, TINY)
