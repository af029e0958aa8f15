"""One update of pretraining: the weighted loss of a batch, clipped gradients, a step of Muon and AdamW.

Both halves of an update work on tensors that stay in place, so that a GPU can record them once and replay them
(`models/cuda_graph.py`).
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qinglan.learn.blocks import Blocks
from qinglan.learn.muon import Muon
from qinglan.learn.optimize import check_finite, set_lr
from qinglan.learn.pretrain_config import PretrainConfig
from qinglan.models.attention import NAME as ATTENTION
from qinglan.models.cuda_graph import Recorded, Space
from qinglan.models.language_model import LanguageModel

TINY = 1e-9
"""Keeps a batch whose weights are all 0 from dividing by 0; its loss is 0."""


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


class Work(NamedTuple):
    """The two halves of an update, on tensors that stay in place, so that a GPU can record and replay them."""

    batch: Blocks
    """What `gradients` reads."""
    gradients: Callable[[], Tensor]
    """Sets the clipped gradients of the batch; returns its loss and their norm before, [2]."""
    step: Callable[[], None]
    """Moves both optimizers."""
    optimizers: Optimizers


def make_work(lm: LanguageModel, optimizers: Optimizers, config: PretrainConfig) -> Work:
    """Return the work of one model; on a GPU it is recorded after a few updates, unless the settings say otherwise."""
    shape, device = (config.batch_size, config.context + 1), lm.device.torch_device
    batch = Blocks(
        torch.zeros(shape, dtype=torch.long, device=device), torch.zeros(shape, dtype=torch.float32, device=device)
    )

    def plain_loss() -> Tensor:
        return block_loss(lm, batch)

    loss_of = compiled(plain_loss, lm) if config.compile else plain_loss

    def gradients() -> Tensor:
        # On a GPU they stay in place: the step is recorded with their addresses.
        lm.model.zero_grad(set_to_none=device.type == "cpu")
        loss = loss_of()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(lm.model.parameters(), config.max_grad_norm)
        return torch.stack([loss.detach(), norm])

    def step() -> None:
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.step()

    if not config.cuda_graphs or device.type != "cuda":
        return Work(batch, gradients, step, optimizers)
    # A space each: the loss is read before the step, but gradients must outlive its replay.
    name = f"pretraining of {lm.name}"
    return Work(
        batch, Recorded(gradients, Space(device, name)), Recorded(step, Space(device, f"{name}, step")), optimizers
    )


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
    model_config = lm.model.config
    kinds = set(getattr(model_config, "layer_types", None) or ())
    # Rows are whole, which transformers would find out by looking at positions: a GPU would have to wait. Without a
    # mask these two are causal, others see everything.
    is_causal = model_config._attn_implementation in ("sdpa", ATTENTION)
    mask: Any = {"full_attention": None} if is_causal and kinds == {"full_attention"} else None
    with lm.device.autocast():
        logits = lm.model(input_ids=token_ids[:, :-1], attention_mask=mask, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), token_ids[:, 1:].flatten(), reduction="none")
    return losses @ weights / weights.sum().clamp_min(TINY)
