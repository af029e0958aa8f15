"""The trunk's step over live rows, as CUDA graphs: one for each shape that comes often enough.

Numbers of rows and of columns change all the time, and a graph has fixed shapes, so both are rounded up. A row beyond
the live ones is a free slot: it feeds token 0 at position 0 of its own slot, which is written over before the slot is
used. A column beyond a row's position is masked, as it is in every step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qinglan.models.cuda_graph import Recorded, Space

ROW_SHAPES = 4
"""Numbers of rows that graphs are made for: each quarter of the slots."""
COLUMN_STEP = 128
"""Numbers of columns that graphs are made for are multiples of this."""

Extend = Callable[[Tensor, Tensor, int], Tensor]
"""(tokens [live, 1], positions [live, 1], width) -> states [live, 1, hidden]"""


class _Step(NamedTuple):
    """One shape: what its graph reads, and the graph."""

    tokens: Tensor
    positions: Tensor
    run: Recorded[Tensor]


class DecodeGraphs:
    """Steps of one `SlotCache`, each recorded when its shape has come a few times."""

    def __init__(self, extend: Extend, num_slots: int, capacity: int, space: Space) -> None:
        """Prepare for up to `num_slots` live rows of `capacity` columns; `extend` runs one step as it is.

        One space for all shapes, as the states of a step are read before the next step.
        """
        self.extend, self.num_slots, self.capacity, self.space = extend, num_slots, capacity, space
        self.row_step = max(1, -(-num_slots // ROW_SHAPES))
        self.steps: dict[tuple[int, int], _Step] = {}

    def __call__(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """Return what `extend` would."""
        if not self.space.can_record:
            return self.extend(tokens, positions, width)
        live = tokens.shape[0]
        rows = min(self.num_slots, -(-live // self.row_step) * self.row_step)
        columns = min(self.capacity, -(-width // COLUMN_STEP) * COLUMN_STEP)
        if (rows, columns) not in self.steps:
            self.steps[rows, columns] = self._make(rows, columns, tokens)
        step = self.steps[rows, columns]
        for kept, new in ((step.tokens, tokens), (step.positions, positions)):
            kept[:live] = new
            kept[live:] = 0
        return step.run()[:live]

    def _make(self, rows: int, columns: int, like: Tensor) -> _Step:
        tokens, positions = (torch.zeros(rows, 1, dtype=torch.long, device=like.device) for _ in range(2))
        extend = self.extend
        return _Step(tokens, positions, Recorded(lambda: extend(tokens, positions, columns), self.space))
