"""What a composition computes, told a second time without its program: small functions put together.

Shares no text with `code_operations.py` and `code_styles.py`; tests compare the two on thousands of compositions.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, combinations, product
from math import prod
from typing import Any

from qinglan.tasks.code import Composition, Part

Value = int | str | list
Function = Callable[..., Any]

SOURCE: dict[str, Function] = {
    "all": lambda xs: list(xs),
    "drop": lambda xs, k: [x for i, x in enumerate(xs) if i >= k],
    "front": lambda xs: [x for i, x in enumerate(xs) if i + 1 < len(xs)],
    "take": lambda xs, k: [x for i, x in enumerate(xs) if i < k],
    "second": lambda xs: [x for i, x in enumerate(xs) if not i & 1],
    "backward": lambda xs: list(reversed(xs)),
    "sorted": lambda xs: sorted(xs),
    "distinct": lambda xs: sorted(dict.fromkeys(xs)),
}
FILTER: dict[str, Function] = {
    "none": lambda x: True,
    "even": lambda x: not x & 1,
    "odd": lambda x: bool(x & 1),
    "above": lambda x, k: k < x,
    "below": lambda x, k: k > x,
    "at_least": lambda x, k: not x < k,
    "at_most": lambda x, k: not x > k,
    "other": lambda x, k: x != k,
    "multiple": lambda x, k: divmod(x, k)[1] == 0,
    "no_multiple": lambda x, k: divmod(x, k)[1] > 0,
    "large": lambda x, k: x > k or x < -k,
    "longer": lambda x, k: len(x) > k,
    "shorter": lambda x, k: len(x) < k,
    "length": lambda x, k: len(x) == k,
    "even_length": lambda x: not len(x) & 1,
    "starts": lambda x, c: x[:1] == c,
    "ends": lambda x, c: x[-1:] == c,
    "has": lambda x, c: x.find(c) >= 0,
    "lacks": lambda x, c: x.find(c) < 0,
    "is": lambda x, c: x == c,
    "is_not": lambda x, c: x != c,
    "before": lambda x, c: ord(x) < ord(c),
    "after": lambda x, c: ord(x) > ord(c),
    "among": lambda x, c: x in list(c),
}
PAIR_FILTER: dict[str, Function] = {
    "none": lambda x, y: True,
    "greater": lambda x, y: x - y > 0,
    "less": lambda x, y: x - y < 0,
    "unequal": lambda x, y: x - y != 0,
    "even_sum": lambda x, y: x & 1 == y & 1,
    "sum_above": lambda x, y, k: x > k - y,
    "sum_below": lambda x, y, k: x < k - y,
    "above": lambda x, y: x - y > 0,
    "below": lambda x, y: x - y < 0,
    "other": lambda x, y: x - y != 0,
    "near": lambda x, y, k: -k < x - y < k,
    "below_times": lambda x, y, k: k * x - y < 0,
}
MAP: dict[str, Function] = {
    "same": lambda x: x,
    "plus": lambda x, k: k + x,
    "minus": lambda x, k: -k + x,
    "times": lambda x, k: k * x,
    "square": lambda x: x**2,
    "size": lambda x: x if x > 0 else -x,
    "negate": lambda x: 0 - x,
    "divide": lambda x, k: divmod(x, k)[0],
    "modulo": lambda x, k: divmod(x, k)[1],
    "from": lambda x, k: -(x - k),
    "distance": lambda x, k: x - k if x > k else k - x,
    "raise": lambda x, k: k if x < k else x,
    "cap": lambda x, k: k if x > k else x,
    "length": lambda x: sum(1 for _ in x),
    "count": lambda x, c: sum(letter == c for letter in x),
    "upper": lambda x: "".join(chr(ord(letter) - 32) if "a" <= letter <= "z" else letter for letter in x),
    "mirror": lambda x: "".join(reversed(x)),
    "initial": lambda x: x[:1],
    "final": lambda x: x[-1:],
    "suffix": lambda x, c: f"{x}{c}",
    "prefix": lambda x, c: f"{c}{x}",
    "double": lambda x: f"{x}{x}",
    "rest": lambda x: x.removeprefix(x[:1]),
}
PAIR_MAP: dict[str, Function] = {
    "sum": lambda x, y: y + x,
    "product": lambda x, y: y * x,
    "difference": lambda x, y: -y + x,
    "gap": lambda x, y: x - y if x > y else y - x,
    "higher": lambda x, y: x if x > y else y,
    "lower": lambda x, y: y if x > y else x,
    "weighted": lambda x, y, k: y + k * x,
    "same": lambda x, y: x,
    "plus": lambda x, y: y + x,
    "minus": lambda x, y: -y + x,
    "times": lambda x, y, k: k * x,
    "square": lambda x, y: x**2,
}
FOLD: dict[str, Function] = {
    "sum": sum,
    "product": prod,
    "count": len,
    "largest": lambda xs, k: sorted([*xs, k])[-1],
    "smallest": lambda xs, k: sorted([*xs, k])[0],
    "subtract": lambda xs, k: k - sum(xs),
    "distinct": lambda xs: len(dict.fromkeys(xs)),
    "collect": lambda xs: list(xs),
    "unique": lambda xs: list(dict.fromkeys(xs)),
    "running": lambda xs: list(accumulate(xs)),
    "join": lambda xs: "".join(xs),
    "longest": lambda xs: max(xs, key=len, default=""),
    "letters": lambda xs: sum(map(len, xs)),
}
POST: dict[str, Function] = {
    "none": lambda x: x,
    "text": lambda x: f"{x}",
    "reverse": lambda x: list(reversed(x)),
    "sort": lambda x: sorted(x),
    "descend": lambda x: sorted(x, reverse=True),
    "take": lambda x, k: x[: min(k, len(x))],
    "last": lambda x, k: x[max(0, len(x) - k) :],
    "drop": lambda x, k: x[min(k, len(x)) :],
    "twice": lambda x: [*x, *x],
}
WORD_POST: dict[str, Function] = {
    "plus": lambda x, c: f"{x}{c}",
    "times": lambda x, k: "".join([x] * k),
}
GUARD: dict[str, Function] = {
    "none": lambda xs: False,
    "empty": lambda xs: list(xs) == [],
    "short": lambda xs, k: len(xs) < k,
    "long": lambda xs, k: len(xs) > k,
    "single": lambda xs, k: len(xs) == k,
}
FALLBACK: dict[object, Value] = {"''": "", "[]": []}


def _folded(part: Part, values: Sequence[Any], empty: object) -> Any:
    if part.name == "first":
        return values[0] if values else empty
    if part.name == "last":
        return values[-1] if values else empty
    return FOLD[part.name](values, *part.constants)


def _posted(part: Part, value: Any) -> Any:
    if isinstance(value, str) and part.name in WORD_POST:
        return WORD_POST[part.name](value, *part.constants)
    return {**MAP, **POST}[part.name](value, *part.constants)


def expected(composition: Composition, arguments: Sequence[Any]) -> Any:
    """Return what the function must return for these arguments (one list, or two)."""
    parts = composition.parts
    if GUARD[parts["guard"].name](arguments[0], *parts["guard"].constants):
        return FALLBACK.get(composition.fallback, composition.fallback)
    values = _VALUES[composition.kind](parts, *arguments)
    is_text = composition.kind == "words" and parts["map"].name not in ("length", "count")
    return _posted(parts["post"], _folded(parts["fold"], values, "" if is_text or _joins(parts) else 0))


def _joins(parts: dict[str, Part]) -> bool:
    return "inner_fold" in parts and parts["inner_fold"].name == "join"


def _passing(part: Part, values: Sequence[Any]) -> list[Any]:
    return [x for x in values if FILTER[part.name](x, *part.constants)]


def _mapped(part: Part, values: Sequence[Any]) -> list[Any]:
    return [MAP[part.name](x, *part.constants) for x in values]


def _flat_values(parts: dict[str, Part], xs: list) -> list:
    chosen = SOURCE[parts["source"].name](xs, *parts["source"].constants)
    return _mapped(parts["map"], _passing(parts["filter"], chosen))


def _row_values(parts: dict[str, Part], rows: list) -> list:
    mapping = parts.get("inner_map", Part("same"))
    inner = [_folded(parts["inner_fold"], _mapped(mapping, _passing(parts["inner_filter"], row)), 0) for row in rows]
    return _passing(parts["filter"], inner)


def _pair_values(parts: dict[str, Part], pairs: Sequence[tuple[int, int]]) -> list:
    kept = [pair for pair in pairs if PAIR_FILTER[parts["filter"].name](*pair, *parts["filter"].constants)]
    return [PAIR_MAP[parts["map"].name](*pair, *parts["map"].constants) for pair in kept]


def _limit_values(parts: dict[str, Part], xs: list) -> list:
    chosen = SOURCE[parts["source"].name](xs, *parts["source"].constants)
    limit = _folded(parts["inner_fold"], _passing(parts["inner_filter"], chosen), 0)
    return _pair_values(parts, [(x, limit) for x in xs])


_VALUES: dict[str, Callable[..., list]] = {
    "numbers": _flat_values,
    "words": _flat_values,
    "rows": _row_values,
    "letters": _row_values,
    "pairs": lambda parts, xs, ys: _pair_values(parts, list(product(xs, ys))),
    "own_pairs": lambda parts, xs: _pair_values(parts, list(combinations(xs, 2))),
    "limit": _limit_values,
}
