"""A toy corpus by position, in a module of its own so that a data process has little to import."""

import os
import signal

import torch
from torch import Tensor

from qinglan.core.rng import numpy_stream

CONTEXT = 12
NUM_SPECIAL, NUM_LETTERS = 4, 60


def copies(first: int, count: int, num_letters: int = NUM_LETTERS) -> tuple[Tensor, Tensor]:
    """Blocks of one letter repeated; the second half counts double in the loss."""
    streams = [numpy_stream(0, "copies", number) for number in range(first, first + count)]
    letters = torch.tensor([int(stream.integers(NUM_SPECIAL, NUM_SPECIAL + num_letters)) for stream in streams])
    token_ids = letters.int()[:, None].expand(count, CONTEXT + 1)
    weights = torch.ones(count, CONTEXT + 1)
    weights[:, CONTEXT // 2 :] = 2.0
    return token_ids, weights


def copies_until_killed(first: int, count: int, last: int) -> tuple[Tensor, Tensor]:
    """`copies`, but asking for the blocks from number `last` on ends the process as `kill -9` does."""
    if first == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return copies(first, count)
