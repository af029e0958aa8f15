"""Blocks of tokens, read by position, and made ahead of the training loop where making them takes time.

A corpus is a function from a position to blocks. Nothing is shuffled and nothing carried along: batch number `step` is
always blocks `step * size` to `(step + 1) * size`, in whatever process they are made.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qinglan.core.errors import InputError

BlockSource = Callable[[int, int], tuple[Tensor, Tensor]]
"""`(first, count)` -> (token ids [count, context + 1] of an integer type, loss weights [count, context + 1] float) of
blocks number first .. first + count - 1, the same on every call. The weight of a token is that of predicting it, so the
first of a block is never used; 0 leaves a token out of the loss."""

BATCHES_AHEAD = 4
"""Batches that each process may have ready or in work."""


class Blocks(NamedTuple):
    """A batch of rows, [B, context + 1]: row by row `context` inputs and, one place on, their targets."""

    token_ids: Tensor
    """int64"""
    weights: Tensor
    """float32; of the loss of predicting each token"""


def read_blocks(source: BlockSource, first: int, count: int, context: int) -> Blocks:
    """Return `count` blocks from number `first` on. Raises `InputError` if the source gives another shape."""
    token_ids, weights = source(first, count)
    expected = (count, context + 1)
    if tuple(token_ids.shape) != expected or tuple(weights.shape) != expected:
        raise InputError(
            f"pretraining corpus: blocks {first} to {first + count - 1}: token ids {list(token_ids.shape)} and weights "
            f"{list(weights.shape)}; expected {list(expected)} for both, a block being the context and one token more"
        )
    return Blocks(token_ids.long(), weights.float())


def read_batches(
    source: BlockSource, steps: range, batch_size: int, context: int, num_processes: int = 0
) -> Generator[Blocks, None, None]:
    """Yield the batch of each step in order, made here or, with `num_processes`, ahead in processes of their own.

    Processes are spawned, so `source` must be picklable (a function of a module, or a `functools.partial` of one) and
    the program's main file must not start work on import. Close the iterator to end them.
    """
    if num_processes == 0:
        for step in steps:
            yield read_blocks(source, step * batch_size, batch_size, context)
        return
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), initializer=_start_process)
    waiting: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
    to_ask = list(reversed(steps))
    try:
        for _ in steps:
            while to_ask and len(waiting) < num_processes * BATCHES_AHEAD:
                first = to_ask.pop() * batch_size
                waiting.append(pool.submit(_make_blocks, source, first, batch_size, context))
            token_ids, weights = waiting.popleft().result()
            yield Blocks(torch.from_numpy(token_ids), torch.from_numpy(weights))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _make_blocks(source: BlockSource, first: int, count: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks as arrays: tensors would cross through shared memory, which is scarce in containers."""
    blocks = read_blocks(source, first, count, context)
    return blocks.token_ids.numpy(), blocks.weights.numpy()


def _start_process() -> None:
    """Use one thread, and end with the training process even if that one is killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
