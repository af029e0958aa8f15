"""Optimizer, learning-rate schedules, gradient clipping and checkpoints, shared by every training loop.

A loop stays visible in its own file (`sft.py`, `reward.py`, `ppo.py`); here is only what must be alike in all.
InstructGPT (Ouyang et al. 2022, appendix C): Adam with betas 0.9 and 0.95, cosine decay to 10% of the peak, no warm-up.

Resuming: all randomness is drawn by position (`core/rng.py`), so weights, optimizer moments and the number of steps
done are the whole state. A loop that is killed and started again ends bit-identical, on CPU, to one never stopped:

    checkpointer = Checkpointer(stage.dir / "checkpoints")
    state = checkpointer.load()                      # None on a fresh start
    if state is not None:
        restore_training(state.tensors, model, optimizer)
    for step in range(state.step if state else 0, num_steps):
        set_lr(optimizer, peak * cosine_factor(step, num_steps))
        ...                                          # loss, check_finite, backward
        clip_gradients(model, 1.0)
        optimizer.step()
        checkpointer.save(step + 1, training_tensors(model, optimizer))
"""

import errno
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.files import sha256_of, write_atomic, write_text


class OptimizerConfig(Config):
    """AdamW with cosine decay, as the supervised and reward-model stages use it."""

    learning_rate: float = Field(default=1e-3, ge=0)
    """Peak learning rate; the default suits models of 0.2 to 2 million parameters (the papers' values: see presets)."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the cosine, as a fraction of the peak (InstructGPT: 0.1)."""
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps over which the rate climbs linearly to its peak (InstructGPT: none)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two moments (InstructGPT: 0.9 and 0.95)."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon, added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of matrices; biases, gains and other vectors are never decayed."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global L2 norm; infinity turns clipping off."""

    def lr_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of update number `step` (from 0) of `num_steps`."""
        warmup_steps = round(self.warmup_fraction * num_steps)
        return self.learning_rate * cosine_factor(step, num_steps, warmup_steps, self.final_lr_fraction)

    def make(self, model: nn.Module) -> torch.optim.AdamW:
        """Return the optimizer of this configuration for all parameters of `model`."""
        return make_optimizer(model, self.learning_rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


def warmup_factor(step: int, warmup_steps: int, start: float = 0.0) -> float:
    """Return the multiplier of update `step` (from 0): it climbs linearly to 1 over `warmup_steps`, from `start`.

    With `start` 0 the first update has rate 1 / (warmup_steps + 1), never 0. InstructGPT's PPO: 10 steps from 0.1.
    """
    if step >= warmup_steps:
        return 1.0
    if start > 0:
        return start + (1.0 - start) * step / warmup_steps
    return (step + 1) / (warmup_steps + 1)


def cosine_factor(step: int, num_steps: int, warmup_steps: int = 0, final: float = 0.1) -> float:
    """Return the multiplier of update `step` (from 0): warm-up, then half a cosine from 1 to `final` at the last."""
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps)
    decay_steps = max(num_steps - 1 - warmup_steps, 1)
    progress = min((step - warmup_steps) / decay_steps, 1.0)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(
    model: nn.Module,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of `model`; only tensors of two or more dimensions are decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group; one that is a tensor, as recorded steps need it, is filled."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a global L2 norm of at most `max_norm`; return the norm before.

    The numbers are those of `torch.nn.utils.clip_grad_norm_`, which multiplies even where nothing is to be scaled.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    factor = float(max_norm / (norm + 1e-6))
    if factor < 1:
        torch._foreach_mul_(gradients, factor)
    return float(norm)


def check_finite(value: float, what: str, where: str) -> float:
    """Return `value`, or raise `InputError` if it is NaN or infinite; `where` names stage and step ("sft, step 12").

    Raised before the optimizer moves, so the checkpoints and results written so far stay good.
    """
    if not math.isfinite(value):
        raise InputError(
            f"{where}: {what} is {value}; expected a finite number; lower the learning rate or check the data, then "
            "start again (results and checkpoints written so far are kept)"
        )
    return value


# ---------------------------------------------------------------------------------------------------- checkpoints


class TrainingState(NamedTuple):
    """What a checkpoint holds."""

    step: int
    """Updates done."""
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    """Small JSON values, such as the best score so far; floats come back exactly."""


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """Return the weights that are trained and the optimizer's moments under names that start with `prefix`.

    Tied weights stand once; frozen ones, those under an adapter, not at all.
    """
    tensors = {f"{prefix}model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if optimizer is not None:
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"{prefix}optimizer.{index}.{key}": value for key, value in entry.items()}
    return tensors


def restore_training(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None, prefix: str = ""
) -> None:
    """Put what `training_tensors` returned back into `model` and `optimizer`, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"{prefix}model.{name}"])
    if optimizer is not None:
        head = f"{prefix}optimizer."
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(head):
                index, key = name.removeprefix(head).split(".", 1)
                state.setdefault(int(index), {})[key] = value.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Checkpointer:
    """The last checkpoints of one training stage: `step-00000012.safetensors` and, beside it, its SHA-256.

    A checkpoint appears whole or not at all, and counts only with a matching hash. The last `keep` are kept, so that
    one damaged on disk costs some steps, never the run.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = Path(directory)
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> Path:
        """Write the state after `step` updates and remove the oldest; return the file's path.

        Raises `InputError` where the disk is full; earlier checkpoints stay.
        """
        path = self.directory / f"step-{step:08d}.safetensors"
        flat = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        metadata = {"step": str(step), "values": json.dumps(dict(values or {}))}

        def write(part: Path) -> None:
            try:
                save_file(flat, part, metadata=metadata)
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(errno.EIO, str(error)) from error

        write_atomic(path, write)
        # In the format of `sha256sum --check`. Written last: a checkpoint without it was never finished.
        write_text(_hash_file(path), f"{sha256_of(path)}  {path.name}\n")
        self._remove_all_but(step)
        return path

    def load(self) -> TrainingState | None:
        """Return the newest whole checkpoint, or None. One that is damaged or gone is named on standard error."""
        names = {path.name.removesuffix(".sha256") for path in self.directory.glob("step-*")}
        for path in (self.directory / name for name in sorted(names, reverse=True)):
            recorded = _hash_file(path)
            has_both = path.is_file() and recorded.is_file()
            if has_both and recorded.read_text(encoding="utf-8").split(" ")[0] == sha256_of(path):
                return _read(path)
            what = "damaged or unfinished" if path.is_file() else "missing"
            print(f"{path}: {what} checkpoint; going on from the one before it", file=sys.stderr)
        return None

    def clear(self) -> None:
        """Remove all checkpoints, once the stage's result is saved."""
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        return [path for path in self.directory.glob("*") if re.match(r"\.?step-\d+\.safetensors", path.name)]

    def _remove_all_but(self, newest: int) -> None:
        """Keep the last `keep` up to `newest`. A later one is damaged, or we would have gone on from it."""
        steps = sorted(int(path.name[5:13]) for path in self.directory.glob("step-*.safetensors"))
        kept = {f"step-{step:08d}.safetensors" for step in [s for s in steps if s <= newest][-self.keep :]}
        for path in self._files():
            if path.name.removesuffix(".sha256") not in kept:
                path.unlink()


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _read(path: Path) -> TrainingState:
    with safe_open(path, framework="pt") as data:
        metadata = data.metadata()
        names = data.keys()
        tensors = {name: data.get_tensor(name) for name in names}
    return TrainingState(int(metadata["step"]), tensors, json.loads(metadata["values"]))
