"""The gradient of an optimizer batch from its micro-batches: computed one by one or several at a time, added in order.

The sum is the same to the last bit, whichever micro-batch is ready first: a gradient waits for those before it.
"""

from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor, nn

from qinglan.core.workers import in_order

Backward = Callable[[Tensor], None]
"""Adds the gradient of a loss to the weights'."""
Gradients = Sequence[Tensor | None]
"""One for each weight, None where the loss does not depend on it."""
Batch = TypeVar("Batch")
Result = TypeVar("Result")


def accumulate(
    models: Sequence[nn.Module], batches: Iterable[Batch], of_batch: Callable[[Batch, Backward], Result], at_once: int
) -> list[Result]:
    """Add the gradients of all micro-batches to the `.grad` of `models`; return what `of_batch` returns, in order.

    Args:
        models: whose weights learn.
        batches: the micro-batches.
        of_batch: computes losses of one micro-batch and hands each to its second argument in place of `backward()`.
        at_once: micro-batches that are computed at the same time (`models.trunk.num_at_once`).
    """
    if at_once == 1:
        return [of_batch(batch, lambda loss: loss.backward()) for batch in batches]
    weights = list({id(one): one for model in models for one in model.parameters() if one.requires_grad}.values())
    sums = _Sums(weights)

    def of_numbered(numbered: tuple[int, Batch]) -> Result:
        number, batch = numbered
        found: list[Gradients] = []
        result = of_batch(batch, lambda loss: found.append(torch.autograd.grad(loss, weights, allow_unused=True)))
        sums.add(number, found)
        return result

    return in_order(of_numbered, enumerate(batches), at_once)


class _Sums:
    """Gradients of numbered micro-batches, which come in any order and are added in theirs."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights, self.next, self.lock = weights, 0, Lock()
        self.waiting: dict[int, list[Gradients]] = {}

    def add(self, number: int, found: list[Gradients]) -> None:
        """Take the gradients of a micro-batch, one for each of its losses, and add those whose turn has come."""
        with self.lock:
            self.waiting[number] = found
            while self.next in self.waiting:
                for gradients in self.waiting.pop(self.next):
                    for weight, gradient in zip(self.weights, gradients, strict=True):
                        if gradient is not None:  # a tensor of its own: no weight here is only added to another
                            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
                self.next += 1
