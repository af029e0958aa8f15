"""The one error that a user can fix. Everything else is a defect and propagates with its traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Bad input or configuration: what was wrong, where, what was expected, what to do. The command exits with 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the valid name nearest to a mistyped one, or an empty string."""
    matches = get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
