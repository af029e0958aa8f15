"""How numbers and untrusted texts are written for people: on the report page, in its figures and on the terminal.

A number keeps about three digits, an interval has as many decimals as its value, and what was not measured says so.
Measures whose unit is a rate are written in percent; `report.json` keeps them between 0 and 1.
"""

import math
from typing import TypeGuard
from unicodedata import category

from qinglan.core.run import Measure

NOT_MEASURED = "not measured"
PERCENT_UNITS = frozenset(
    {"rate", "win rate", "share", "fraction", "probability", "accuracy", "agreement", "performance gap recovered"}
)


def is_finite(value: float | None) -> TypeGuard[float]:
    """Return True for a number that can be written; None, NaN and the infinities are not."""
    return value is not None and math.isfinite(value)


def is_percent(unit: str) -> bool:
    """Return True if values of this unit are written in percent."""
    return unit in PERCENT_UNITS


def decimals_for(*values: float | None) -> int:
    """Return the decimals at which the largest of the values shows about three digits."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    return 0 if largest >= 100 else 1 if largest >= 10 else 2 if largest >= 1 else 3


def write_number(value: float | None, unit: str = "", decimals: int | None = None) -> str:
    """Return one value as text: "0.731", "73.1%" for a rate, "1,234" for a count, or "not measured"."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    if is_percent(unit):
        return f"{_plain(100 * value, 1 if decimals is None else decimals)}%"
    if isinstance(value, int):
        return _plain(value, 0)
    if decimals is None and 0 < abs(value) < 0.001:
        return f"{value:.1e}".replace("-", "−")
    return _plain(value, decimals_for(value) if decimals is None else decimals)


def _plain(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    is_zero = float(text.replace(",", "")) == 0  # no "−0.000"
    return text.lstrip("-") if is_zero else text.replace("-", "−")


def write_value(measure: Measure) -> str:
    """Return a measure's value as text, with the decimals that its interval needs."""
    return write_number(measure.value, measure.unit, _decimals(measure))


def write_interval(measure: Measure) -> str:
    """Return "[0.702, 0.759]", or an empty string where the value or its interval is not known."""
    if not (is_finite(measure.value) and is_finite(measure.low) and is_finite(measure.high)):
        return ""
    decimals = _decimals(measure)
    low, high = (write_number(end, measure.unit, decimals) for end in (measure.low, measure.high))
    return f"[{low}, {high}]".replace("%,", ",").replace("%]", "]")


def visible(text: str) -> str:
    """Return the text with control characters, reading-direction marks and lone surrogates replaced by visible symbols.

    Newlines and tabs stay. Such characters would break the file, or change what readers see of an untrusted text.
    """
    return "".join(c if c in "\n\t" or category(c) not in ("Cc", "Cf", "Cs") else _symbol(c) for c in text)


def _symbol(character: str) -> str:
    code = ord(character)
    if code in (0x200C, 0x200D):  # joiners, needed by scripts and emoji
        return character
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def _decimals(measure: Measure) -> int | None:
    if is_percent(measure.unit):
        return 1
    if isinstance(measure.value, int) and measure.low is None and measure.high is None:
        return None
    largest = max((abs(v) for v in measure[:3] if isinstance(v, int | float) and math.isfinite(v)), default=0.0)
    return None if 0 < largest < 0.001 else decimals_for(largest)
