"""Agreement between two labels of the same items, whoever gave them (InstructGPT, section 3.4: 72.6 +/- 1.5%)."""

import math
from typing import NamedTuple

from qinglan.core.records import Comparison, pairs_of


class PairAgreement(NamedTuple):
    """How often two labels order the same two items alike, among pairs that both decide."""

    num_agreeing: int
    num_decided: int

    @property
    def rate(self) -> float:
        """Share of decided pairs that are ordered alike; NaN without any."""
        return self.num_agreeing / self.num_decided if self.num_decided else math.nan


def count_agreement(first: Comparison, second: Comparison) -> PairAgreement:
    """Count the pairs of items that both comparisons decide, and those that they order alike; ties decide nothing."""
    decided, other = decided_pairs(first), decided_pairs(second)
    num_agreeing = len(decided & other)
    num_opposed = len(decided & {(worse, better) for better, worse in other})
    return PairAgreement(num_agreeing, num_agreeing + num_opposed)


def decided_pairs(comparison: Comparison) -> set[tuple[str, str]]:
    """Return (better item, worse item) for each pair that the label decides."""
    items, decided = comparison.items, set()
    for pair in pairs_of(comparison.label):
        if pair.p_first_better != 0.5:
            better, worse = (pair.first, pair.second) if pair.p_first_better > 0.5 else (pair.second, pair.first)
            decided.add((items[better], items[worse]))
    return decided
