"""Numbers of rows and columns filled up to few different sizes: on a CPU products are compiled for each.

Letters: N rows, M those that are filled up, D units.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def filled_up(number: int, num_digits: int = 6) -> int:
    """Return the next number of at most `num_digits` binary digits, then zeros: with 6 less than 1/32 more."""
    step = 1 << max(0, number.bit_length() - num_digits)
    return -(-number // step) * step


def with_filled_rows(states: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
    """Return states with rows of zeros behind them on a CPU, so that their products have few different sizes.

    oneDNN keeps what it compiles for a size, some 300 KB: with ever new numbers of targets that grows with the run.
    """
    more = filled_up(len(states), 5) - len(states) if states.device.type == "cpu" else 0
    return F.pad(states, (0, 0, 0, more)) if more else states
