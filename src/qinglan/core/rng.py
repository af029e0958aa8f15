"""Randomness by position: every draw comes from a generator named by seed, purpose and step.

A generator is made where it is used, from `(seed, "rollout", step, rank)`, and never carried along, so that resuming at
step k, or drawing more somewhere else, leaves every other draw as it was.
"""

import hashlib

import numpy as np
import torch


def stream_seed(seed: int, *keys: str | int) -> int:
    """Return a 63-bit seed for the stream named by `seed` and `keys`; equal names give equal seeds on every machine."""
    name = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, *keys: str | int) -> torch.Generator:
    """Return a CPU `torch.Generator` for the stream named by `seed` and `keys`."""
    return torch.Generator().manual_seed(stream_seed(seed, *keys))


def numpy_stream(seed: int, *keys: str | int) -> np.random.Generator:
    """Return a `numpy.random.Generator` (Philox) for the stream named by `seed` and `keys`."""
    return np.random.Generator(np.random.Philox(stream_seed(seed, *keys)))


def permutation(length: int, seed: int, *keys: str | int) -> list[int]:
    """Return a random order of `range(length)` that depends on the stream's name only."""
    return numpy_stream(seed, *keys).permutation(length).tolist()
