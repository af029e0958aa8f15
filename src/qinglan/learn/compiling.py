"""`torch.compile` around the training step: off by default, and never a reason to fail.

The trunk alone is compiled, with dynamic shapes, and only while a loop computes gradients: sampling, scoring and
evaluation change their shapes at every call and run as they are. Compiling takes tens of seconds and pays in long
runs. What cannot be compiled (no C++ compiler, an architecture that resists, dropout, whose masks are drawn by
position) is said once, and training goes on without.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from qinglan.core.device import Device
from qinglan.models.language_model import hidden_states
from qinglan.models.tokens import TokenSequence, collate

Compiled = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which trunks run compiled; they run as they are where nothing is to be compiled."""

TRIAL = (TokenSequence([0, 1, 0, 1, 0], 1), TokenSequence([1, 0, 1], 1), TokenSequence([1, 0], 1))


def compile_trunks(
    models: Sequence[PreTrainedModel], is_wanted: bool, device: Device, where: str, *, dropout: float = 0.0
) -> Compiled:
    """Return what makes contexts in which the trunks of `models` run compiled; tries it, packed and padded, first.

    Args:
        models: whose trunks are trained; their weights may change afterwards.
        is_wanted: the setting; without it nothing happens, now or then.
        device: where they run, and with which matmuls.
        where: names the stage in the message that is printed where compiling fails.
        dropout: the largest rate of dropout in training.
    """
    if not is_wanted:
        return nullcontext
    if dropout > 0:
        print(f"{where}: cannot compile with dropout {dropout}; going on without", file=sys.stderr)
        return nullcontext
    trunks: list[Any] = [model.base_model for model in models]
    forwards = [torch.compile(trunk.forward, dynamic=True) for trunk in trunks]

    @contextmanager
    def compiled() -> Iterator[None]:
        with ExitStack() as stack:
            for trunk, forward in zip(trunks, forwards, strict=True):
                trunk.forward = forward
                stack.callback(delattr, trunk, "forward")  # the class's own method is there again
            yield

    try:
        with compiled():
            for model in models:
                _try(model, device)
    except Exception as error:  # whatever a compiler raises: training goes on without it
        reason = " ".join(str(error).split("\n")[:2])
        print(f"{where}: cannot compile ({type(error).__name__}: {reason}); going on without", file=sys.stderr)
        torch.compiler.reset()
        return nullcontext
    return compiled


def _try(model: PreTrainedModel, device: Device) -> None:
    """Run forward and backward passes of three short sequences; the gradients are taken away."""
    for rows in ([[0], [1]], [[0, 1]], [[0, 2], [1]]):
        batch = collate(TRIAL, rows).to(device.torch_device)
        with device.autocast():
            hidden = hidden_states(model, batch)
        hidden.float().square().mean().backward()
        model.zero_grad()
