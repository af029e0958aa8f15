"""Settings of pretraining (`pretrain.py`)."""

from typing import Literal

from pydantic import Field, model_validator

from qinglan.core.config import Config
from qinglan.learn.optimize import cosine_factor, warmup_factor


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
    """Compile the loss with `torch.compile`: a minute at the start, then up to thrice as fast on a GPU. Repeatable, but
    not to the last bit what it is without."""
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
