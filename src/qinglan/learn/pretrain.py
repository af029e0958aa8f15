"""Pretraining: next-token prediction over blocks of tokens, for base models small enough to be made at home.

None of the four systems pretrains; each starts from a base model. This loop makes that model for the built-in world, on
a CPU in the background or on a GPU. What carries small nets is taken from elsewhere:

- Muon for hidden matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW for embeddings and gains;
- warm-up, a constant rate and a linear decay to zero ("trapezoid": Hägele et al. 2024, arXiv 2405.18392), or a cosine;
- optionally an exponential moving average of the weights, which is then what is probed and returned;
- a loss weight for every token, given by the corpus: a specification may count little, constants taken from it much.

A corpus is a function from a position to blocks of tokens, so data order needs no state: a run that is killed and
started again ends bit-identical, on CPU with the same number of threads, to one never stopped.
"""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from qinglan.core.config import Config
from qinglan.core.device import device_name
from qinglan.core.errors import InputError
from qinglan.core.files import write_json
from qinglan.core.run import Stage
from qinglan.learn.blocks import Blocks, BlockSource, read_batches, read_blocks
from qinglan.learn.muon import Muon
from qinglan.learn.optimize import (
    Checkpointer,
    check_finite,
    cosine_factor,
    restore_training,
    set_lr,
    training_tensors,
    warmup_factor,
)
from qinglan.models.cuda_graph import Recorded
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

TINY = 1e-9
"""Keeps a batch whose weights are all 0 from dividing by 0; its loss is 0."""


class PretrainConfig(Config):
    """Pretraining; the defaults suit models of 0.2 to 2 million parameters on one or two CPU cores."""

    num_tokens: int = Field(default=20_000_000, ge=1)
    """Tokens to train on, rounded up to whole batches."""
    context: int = Field(default=256, ge=2)
    """Tokens in one row, each seeing those before it; at most the model's own limit."""
    batch_tokens: int = Field(default=4096, ge=2)
    """Tokens per update; a multiple of `context`."""
    muon_lr: float = Field(default=0.02, ge=0)
    """Peak learning rate of the hidden matrices: about the size of an update's singular values (Muon's own scaling)."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Nesterov momentum of Muon."""
    adamw_lr: float = Field(default=0.01, ge=0)
    """Peak learning rate of embeddings, output layer, gains and biases."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the hidden matrices; embeddings and gains are never decayed."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global L2 norm; infinity turns clipping off."""
    schedule: Literal["trapezoid", "cosine", "linear"] = "trapezoid"
    """After the warm-up: constant, then linear to zero; or half a cosine to zero; or linear to zero all the way."""
    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the updates over which the rates climb linearly to their peaks."""
    decay_fraction: float = Field(default=0.4, gt=0, le=1)
    """Share of the updates over which the trapezoid falls to zero; the other schedules have no use for it."""
    averaging: float = Field(default=0.0, ge=0, lt=1)
    """Decay per update of the averaged weights that are probed and returned; 0 takes the last weights themselves."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products, Muon's included; auto follows the device. bfloat16 is nearly twice as fast on a CPU
    that has it, and slower on one that has not."""
    compile: bool = False
    """Compile the loss with `torch.compile`: a minute at the start, then one to three times as fast on a GPU."""
    cuda_graphs: bool = True
    """On a GPU, launch the kernels of an update once and replay them: small models train several times as fast."""
    num_data_processes: int = Field(default=0, ge=0)
    """Processes that make blocks ahead of the loop; 0 makes them in the loop. Changes no result."""
    num_held_out_blocks: int = Field(default=32, ge=0)
    """Blocks for the held-out loss, from number 1,000,000,000 on; 0 measures none."""
    seconds_between_checkpoints: float = Field(default=60.0, ge=0)
    """Work that a crash may cost; 0 saves after every update. Changes no result."""
    num_logs: int = Field(default=200, ge=1)
    """Lines of metrics over the whole run; each holds means since the one before."""
    num_probes: int = Field(default=10, ge=1)
    """Times that held-out loss and probe are measured, at even distances, the last one at the end."""

    @model_validator(mode="after")
    def _check(self) -> "PretrainConfig":
        if self.batch_tokens % self.context:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}, no multiple of context {self.context}; give whole rows"
            )
        if self.schedule == "trapezoid" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction and decay_fraction add up to more than 1; lower one of them")
        return self

    @property
    def num_steps(self) -> int:
        """Updates in the whole run."""
        return -(-self.num_tokens // self.batch_tokens)

    @property
    def batch_size(self) -> int:
        """Blocks (rows) per update."""
        return self.batch_tokens // self.context

    def rate_factor(self, step: int) -> float:
        """Return the multiplier of both peak rates at update `step` (from 0); at `num_steps` it is 0."""
        warmup_steps = round(self.warmup_fraction * self.num_steps)
        if step < warmup_steps:
            return warmup_factor(step, warmup_steps)
        if self.schedule == "cosine":
            return cosine_factor(step, self.num_steps + 1, warmup_steps, final=0.0)
        share = self.decay_fraction if self.schedule == "trapezoid" else 1.0 - self.warmup_fraction
        return min(1.0, (self.num_steps - step) / max(1.0, share * self.num_steps))


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
    work = Work(student, optimizers, config)
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


class Optimizers(NamedTuple):
    """The two optimizers of one model; `muon` is None for a model without hidden matrices."""

    muon: Muon | None
    adamw: torch.optim.AdamW


def make_optimizers(lm: LanguageModel, config: PretrainConfig) -> Optimizers:
    """Return Muon for the hidden matrices and AdamW for embeddings, output layer, gains and biases.

    Muon treats a matrix as a linear map between hidden states. Rows of an embedding or output layer belong to single
    tokens, most of which a batch does not touch: there AdamW's step per element fits, as Muon's author advises.
    """
    model = lm.model
    by_token = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    by_token |= {id(p) for p in model.get_output_embeddings().parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in by_token]
    hidden = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in hidden]
    is_cuda = lm.device.torch_device.type == "cuda"

    def rate(value: float) -> Any:  # a recorded step reads it from the GPU
        return torch.tensor(value, device=lm.device.torch_device) if is_cuda else value

    muon = None
    if matrices:
        momentum, decay = config.muon_momentum, config.weight_decay
        dtype = lm.device.compute_dtype
        muon = Muon(matrices, lr=rate(config.muon_lr), momentum=momentum, weight_decay=decay, dtype=dtype)
    adamw = torch.optim.AdamW(
        others, rate(config.adamw_lr), config.betas, weight_decay=0.0, fused=True, capturable=is_cuda
    )
    return Optimizers(muon, adamw)


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


# ------------------------------------------------------------------------------------------------------- one update


class Work:
    """The two halves of an update, on tensors that stay in place, so that a GPU can record and replay them."""

    def __init__(self, lm: LanguageModel, optimizers: Optimizers, config: PretrainConfig) -> None:
        self.lm, self.optimizers, self.max_grad_norm = lm, optimizers, config.max_grad_norm
        shape, device = (config.batch_size, config.context + 1), lm.device.torch_device
        self.batch = Blocks(
            torch.zeros(shape, dtype=torch.long, device=device), torch.zeros(shape, dtype=torch.float32, device=device)
        )
        self.loss = compiled(lambda: block_loss(lm, self.batch), lm) if config.compile else None
        self.gradients: Callable[[], Tensor] = self._gradients
        self.step: Callable[[], None] = self._step
        if config.cuda_graphs and device.type == "cuda":
            self.gradients = Recorded(self._gradients, f"{lm.name}, gradients")
            self.step = Recorded(self._step, f"{lm.name}, step")

    def _gradients(self) -> Tensor:
        """Set the clipped gradients of the batch; return its loss and their norm before, [2]."""
        self.lm.model.zero_grad()
        loss = self.loss() if self.loss is not None else block_loss(self.lm, self.batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.lm.model.parameters(), self.max_grad_norm)
        return torch.stack([loss.detach(), norm])

    def _step(self) -> None:
        for optimizer in self.optimizers:
            if optimizer is not None:
                optimizer.step()


def compiled(loss: Callable[[], Tensor], lm: LanguageModel) -> Callable[[], Tensor]:
    """Return `loss` compiled for its one shape, or as it is, which is said, where that fails when tried."""
    faster = torch.compile(loss, dynamic=False)
    try:
        faster().backward()
    except Exception as error:  # whatever a compiler raises: training goes on without it
        reason = " ".join(str(error).split("\n")[:2])
        print(f"{lm.name}: cannot compile ({type(error).__name__}: {reason}); going on without", file=sys.stderr)
        torch.compiler.reset()
        faster = loss
    lm.model.zero_grad()
    return faster


def update(work: Work, config: PretrainConfig, batch: Blocks, step: int, where: str) -> float:
    """Take step number `step` (from 0) and return its loss. Raises `InputError`, before the step, if not finite."""
    for kept, new in zip(work.batch, batch, strict=True):
        kept.copy_(new, non_blocking=True)
    loss, norm = work.gradients().tolist()
    check_finite(loss, "the loss", where)
    check_finite(norm, "the gradient's norm", where)
    factor = config.rate_factor(step)
    for optimizer, peak in ((work.optimizers.muon, config.muon_lr), (work.optimizers.adamw, config.adamw_lr)):
        if optimizer is not None:
            set_lr(optimizer, peak * factor)
    work.step()
    return loss


def block_loss(lm: LanguageModel, batch: Blocks) -> Tensor:
    """Return the weighted mean loss of a batch, a scalar in nats per token: sum(w * -log p) / sum(w), in fp32."""
    token_ids = batch.token_ids.to(lm.device.torch_device)
    weights = batch.weights.to(lm.device.torch_device)[:, 1:].flatten()
    kinds = set(getattr(lm.model.config, "layer_types", None) or ())
    # Rows are whole and causal, which transformers would find out by looking at positions: a GPU would have to wait.
    mask: Any = {"full_attention": None} if kinds == {"full_attention"} else None
    with lm.device.autocast():
        logits = lm.model(input_ids=token_ids[:, :-1], attention_mask=mask, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), token_ids[:, 1:].flatten(), reduction="none")
    return losses @ weights / weights.sum().clamp_min(TINY)


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
