"""Dropout drawn by position, residual or of adapters, so that a resumed run equals an uninterrupted one.

InstructGPT trains its supervised baseline with residual dropout 0.2 (appendix C.1): dropout on what each attention and
each MLP block adds to the residual stream. GPT-2 has such layers of its own (`resid_pdrop`), Llama, Qwen and Gemma have
none, and all of PyTorch's dropout draws from one global generator, whose state a resumed run would have to restore.
So one mechanism serves all: hooks on the blocks' outputs, with a generator named by seed, step and micro-batch. The
models' own dropout layers stay off (evaluation mode).
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qinglan.core.errors import InputError

BLOCK_NAME = re.compile(r"(^|\.)(layers|h)\.\d+\.(self_attn|attn|mlp)$")
"""Attention and MLP blocks in the architectures of `transformers`: `layers.3.self_attn`, `h.3.attn`, `layers.3.mlp`."""


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the attention and MLP blocks of a decoder, in order. Raises `InputError` for an unknown architecture."""
    blocks = [module for name, module in model.named_modules() if BLOCK_NAME.search(name)]
    if not blocks:
        raise InputError(
            f"dropout: {type(model).__name__} has no attention and MLP blocks by the usual names (layers.N.self_attn, "
            "h.N.attn, layers.N.mlp); expected a decoder such as Llama, Qwen, Gemma or GPT-2; set dropout to 0"
        )
    return blocks


@contextmanager
def residual_dropout(model: nn.Module, rate: float, seed: int) -> Iterator[None]:
    """Within the context, each forward pass drops a share `rate` of the blocks' outputs and scales up the rest.

    Args:
        model: decoder in evaluation mode.
        rate: probability that one element is set to 0; with 0 nothing happens.
        seed: names the masks (`core.rng.stream_seed`); equal seeds and inputs give equal masks.
    """
    with position_dropout(residual_blocks(model) if rate else [], rate, seed):
        yield


@contextmanager
def adapter_dropout(model: nn.Module, rate: float, seed: int) -> Iterator[None]:
    """Within the context, each forward pass drops a share `rate` of what enters the LoRA updates of `model`."""
    layers = [m for name, m in model.named_modules() if name.endswith(".lora_dropout.default")]
    with position_dropout(layers if rate else [], rate, seed):
        yield


@contextmanager
def position_dropout(modules: Sequence[nn.Module], rate: float, seed: int) -> Iterator[None]:
    """Within the context, drop a share `rate` of the outputs of `modules`, by masks that `seed` names."""
    if not modules:
        yield
        return
    generators: dict[torch.device, torch.Generator] = {}

    def drop(values: Tensor) -> Tensor:
        if values.device not in generators:
            generators[values.device] = torch.Generator(values.device).manual_seed(seed)
        keep = torch.empty_like(values).bernoulli_(1.0 - rate, generator=generators[values.device])
        return values * keep / (1.0 - rate)

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        # Attention blocks return (output, attention weights or None), the others the output alone.
        return (drop(output[0]), *output[1:]) if isinstance(output, tuple) else drop(output)

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
