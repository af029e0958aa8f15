"""Attention of one new token in each row, on a CPU: every query reads a bag of places, where keys and values lie.

A matrix product that has one row ends before it has well begun, and there is one for each row and head. What it is made
of are two gathers, for which PyTorch has fast kernels of other names: scores are the entries of Q K^T that a sparse
pattern asks for, and the mixed values are an embedding bag, the weighted sum of rows of a table. Both together take
half the time of products, and nothing behind the end of a short row is fetched from memory.

Letters: B rows, H heads, G heads of keys (each serves H / G queries), C columns of a slot, W columns in use, K units of
a head; P = slots * G * C places.
"""

import platform
import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qinglan.models.attention import last_token_attention

MIN_ROWS = 32
"""With fewer rows making bags takes as long as they save."""


class Bags(NamedTuple):
    """What each query of a step reads; the same for all layers."""

    pattern: Float[Tensor, "BH P"]
    """Sparse by rows (CSR), W places in each: 0 where the query sees one, the lowest number elsewhere."""
    places: Int[Tensor, " BHW"]
    """Numbers in a buffer seen as [P, K]; those of a query stand together."""
    starts: Int[Tensor, " BH"]
    """Where each query's places begin."""


def has_bags(buffer: Float[Tensor, "S G C K"]) -> bool:
    """Return True if there are fast kernels for such a buffer on this processor, and its places have 32-bit numbers."""
    return buffer.device.type == "cpu" and buffer.dtype == torch.float32 and buffer.numel() < 2**31 and _has_kernels()


def is_built() -> bool:
    """Return True for an x86 processor and a build of PyTorch with fbgemm, whose kernels these are."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and "fbgemm" in torch.backends.quantized.supported_engines


@cache
def _has_kernels() -> bool:
    """Try them once: how they take 32-bit numbers and repeated places is not promised by PyTorch."""
    if not is_built():
        return False
    query, buffer = torch.arange(2.0).view(2, 1, 1, 1), torch.arange(4.0).view(2, 1, 2, 1)
    positions, added = torch.tensor([[0], [1]]), torch.tensor([[0.0, torch.finfo(torch.float32).min], [0.0, 0.0]])
    added = added[:, None, None]
    with warnings.catch_warnings():  # PyTorch says once in a process that its sparse tensors may change
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        try:
            found = mix(make_bags(positions, added, 1, buffer), query, buffer, buffer, 1.0)
        except RuntimeError:
            return False
    return torch.allclose(found, last_token_attention(query, buffer, buffer, added, 1.0))


def make_bags(
    positions: Int[Tensor, "B 1"], added: Float[Tensor, "B 1 1 W"], num_heads: int, buffer: Float[Tensor, "S G C K"]
) -> Bags:
    """Return the bags of rows in slots 0 to before B, each of which has come to its position.

    `added` is the mask, `buffer` one like those that will be read. Columns behind a row's position are not read: its
    own newest stands for them, unseen.
    """
    _, num_groups, num_columns, units = buffer.shape
    width = added.shape[-1]
    heads = torch.arange(num_heads, dtype=torch.int32) // (num_heads // num_groups)
    slots = torch.arange(len(positions), dtype=torch.int32)
    firsts = (slots[:, None] * num_groups + heads) * num_columns
    columns = torch.minimum(torch.arange(width, dtype=torch.int32), positions.int())
    places = (firsts[:, :, None] + columns[:, None]).flatten()
    starts = torch.arange(0, len(places) + 1, width, dtype=torch.int32)
    seen = added[:, 0].expand(-1, num_heads, -1).flatten()
    shape = (len(starts) - 1, buffer.numel() // units)
    # Unchecked, since a row may name a place twice, which CSR forbids: the kernel takes each entry by itself.
    pattern = torch.sparse_csr_tensor(starts, places, seen, size=shape, check_invariants=False)
    return Bags(pattern, places, starts[:-1])


def mix(
    bags: Bags,
    query: Float[Tensor, "B H 1 K"],
    keys: Float[Tensor, "S G C K"],
    values: Float[Tensor, "S G C K"],
    scale: float,
) -> Float[Tensor, "B 1 H K"]:
    """Return softmax(scale q K^T + mask) V, in the precision of the buffers."""
    rows, heads, _, units = query.shape
    with torch.autocast("cpu", enabled=False):
        query = query.to(keys.dtype).reshape(-1, units)
        scores = torch.sparse.sampled_addmm(bags.pattern, query, keys.view(-1, units).mT, alpha=scale).values()
        weights = torch.softmax(scores.view(len(query), -1), dim=-1).flatten()
        mixed = F.embedding_bag(
            bags.places, values.view(-1, values.shape[-1]), bags.starts, mode="sum", per_sample_weights=weights
        )
    return mixed.view(rows, 1, heads, -1)
