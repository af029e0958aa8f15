"""Tokens in one list, set into rows for attention alone: matrices see each token once, and no padding.

    tokens   p p p a a a b b       a prompt and two completions
    rows     p p p a a a           what attention sees: each completion behind the prompt, padded on the right
             p p p b b -

The numbers are those of separate rows, for the work of the tokens that there are. Causal attention is enough, since no
token sees one on its right.

Letters: N tokens, R rows, W columns, H heads, K units of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class AttentionRows(NamedTuple):
    """Which token stands where."""

    tokens: Int[Tensor, "R W"]
    """Their numbers; padding shows any."""
    homes: Int[Tensor, " N"]
    """The place, row * W + column, from which each token takes its result."""
    copies: Int[Tensor, " C"]
    """Places that show a token which is at home elsewhere."""
    indices: dict[int, tuple[Tensor, Tensor]]
    """Number of heads -> `tokens` and `homes` for lists of heads, worked out when first wanted."""

    def spread(self, states: Float[Tensor, "1 N H K"]) -> Float[Tensor, "R W H K"]:
        """Return states of tokens in rows; in memory heads come before columns, as attention wants them."""
        rows: Tensor = _Spread.apply(states[0], self)
        return rows.transpose(1, 2)

    def collect(self, states: Float[Tensor, "R W H K"], num_tokens: int) -> Float[Tensor, "1 M HK"]:
        """Return states of rows token by token; `num_tokens` may be more than there are, for lists that are filled."""
        found: Tensor = _Collect.apply(states.transpose(1, 2), self, num_tokens)
        return found[None]

    def for_heads(self, num_heads: int) -> tuple[Tensor, Tensor]:
        """Return `tokens` and `homes` of every head, for lists [N * H, K] and [R * H * W, K]."""
        if num_heads not in self.indices:
            heads, width = torch.arange(num_heads), self.tokens.shape[1]
            shown = self.tokens[:, None] * num_heads + heads[:, None]
            row, column = self.homes // width, self.homes % width
            homes = (row[:, None] * num_heads + heads) * width + column[:, None]
            self.indices[num_heads] = shown.flatten(), homes.flatten()
        return self.indices[num_heads]


def attention_rows(paths: Sequence[np.ndarray], num_places: int, width: int) -> tuple[AttentionRows, np.ndarray]:
    """Return the rows of `paths`, and for each of `num_places` places the number of its token, -1 for none.

    Args:
        paths: for each row the places of its tokens, from left to right; some may share places.
        num_places: in a rectangle of tokens, where places are row * columns + column.
        width: columns of the rows, at least as many as the longest path has.
    """
    places = np.full((len(paths), width), -1)
    for row, path in zip(places, paths, strict=True):
        row[: len(path)] = path
    taken = np.flatnonzero(places >= 0)
    shown, first = np.unique(places.flat[taken], return_index=True)
    numbers = np.full(num_places, -1)
    numbers[shown] = np.arange(len(shown))
    homes = taken[first]
    copies = np.setdiff1d(taken, homes)
    tokens = numbers[np.where(places >= 0, places, shown[0])]
    return AttentionRows(torch.from_numpy(tokens), torch.from_numpy(homes), torch.from_numpy(copies), {}), numbers


class _Spread(torch.autograd.Function):
    """[N, H, K] to [R, H, W, K]; backwards a token gets the sum over its places."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: AttentionRows) -> Tensor:
        num_tokens, heads, units = states.shape
        ctx.rows, ctx.shape = rows, states.shape
        shown, _ = rows.for_heads(heads)
        found = states.reshape(num_tokens * heads, units).index_select(0, shown)
        return found.view(len(rows.tokens), heads, -1, units)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows, (num_tokens, heads, units) = ctx.rows, ctx.shape
        _, homes = rows.for_heads(heads)
        # Sums over many places are fp32, as inside products.
        exact = torch.promote_types(gradient.dtype, torch.float32) if len(rows.copies) else gradient.dtype
        found = gradient.new_zeros(num_tokens, heads * units, dtype=exact)
        at_home = gradient.reshape(-1, units).index_select(0, homes)
        found[: len(rows.homes)] = at_home.view(-1, heads * units)
        if len(rows.copies):
            width = rows.tokens.shape[1]
            more = gradient.transpose(1, 2)[rows.copies // width, rows.copies % width]
            found.index_add_(0, rows.tokens.flatten()[rows.copies], more.flatten(1).to(exact))
        return found.to(gradient.dtype).view(ctx.shape), None


class _Collect(torch.autograd.Function):
    """[R, H, W, K] to [num_tokens, H K], zeros behind the tokens that there are."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: AttentionRows, num_tokens: int) -> Tensor:
        heads, units = states.shape[1], states.shape[3]
        ctx.rows, ctx.shape = rows, states.shape
        _, homes = rows.for_heads(heads)
        found = states.new_zeros(num_tokens, heads * units)
        found[: len(rows.homes)] = states.reshape(-1, units).index_select(0, homes).view(-1, heads * units)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        heads, units = ctx.shape[1], ctx.shape[3]
        _, homes = ctx.rows.for_heads(heads)
        found = gradient.new_zeros(ctx.shape)
        known = gradient[: len(ctx.rows.homes)].reshape(-1, units)
        found.view(-1, units).index_copy_(0, homes, known)
        return found, None, None
