"""Inputs on which programs are tried, and tasks: a composition with its specification and cases that tell it apart.

Programs that this package wrote itself run in this process; what a model wrote goes through `execute.py`.
"""

import builtins
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qinglan.tasks.code import (
    FALLBACKS,
    CodeGrade,
    Composition,
    Part,
    draw_composition,
    draw_part,
    element_type,
    specification,
    table_of,
    type_after,
)
from qinglan.tasks.code_oracle import expected
from qinglan.tasks.item import Draw

WORDS: tuple[str, ...] = (
    *("a", "an", "ankle", "acorn", "apple", "ape", "bean", "bee", "boat", "bob", "box", "beach", "cat", "cab", "can"),
    *("cup", "cone", "coin", "coco", "eye", "egg", "echo", "hen", "hope", "in", "inn", "ice", "nap", "noon", "nose"),
    *("oboe", "open", "once", "one", "ox", "pen", "pea", "pepper", "peach", "panel"),
)
"""Words in test inputs; none begins as an English contraction does ('s, 't, 'm, 'd, 're, 've, 'll)."""
CALLABLE = ("abs", "len", "list", "max", "min", "range", "set", "sorted", "str", "sum")
BUILTINS = {name: getattr(builtins, name) for name in CALLABLE}
"""Everything that programs of the built-in world may call."""
LARGEST = 99_999
"""Results beyond this make a case useless in a text."""


class Case(NamedTuple):
    """Arguments of `f` and what it must return."""

    arguments: tuple[Any, ...]
    result: Any

    @property
    def call(self) -> str:
        """The call as Python text."""
        return f"f({', '.join(map(repr, self.arguments))})"


class CodeTask(NamedTuple):
    """What to write, said in English, and how to tell whether a program does it."""

    composition: Composition
    specification: str
    cases: tuple[Case, ...]


def draw_arguments(draw: Draw, composition: Composition, max_length: int = 6) -> tuple[list, ...]:
    """Draw arguments: numbers from -4 to 12, those near the composition's constants more often; words, or rows."""
    rng = draw.rng
    near = [k + rng.randrange(-1, 2) for p in composition.parts.values() for k in p.constants if isinstance(k, int)]

    def number() -> int:
        return rng.choice(near) if near and rng.random() < 0.3 else rng.randrange(-4, 13)

    def numbers(limit: int) -> list[int]:
        return [number() for _ in range(rng.randrange(limit + 1))]

    kind = composition.kind
    if kind in ("words", "letters"):
        return ([rng.choice(WORDS) for _ in range(rng.randrange(max_length + 1))],)
    if kind == "rows":
        return ([numbers(min(4, max_length)) for _ in range(rng.randrange(min(5, max_length + 1)))],)
    if kind == "pairs":
        return numbers(min(4, max_length)), numbers(min(4, max_length))
    return (numbers(max_length),)


def load(program: str) -> Callable[..., Any]:
    """Return the function `f` of a program that this package wrote; never give it the text of a model."""
    names: dict[str, Any] = {"__builtins__": BUILTINS}
    exec(compile(program, "program", "exec"), names)
    return names["f"]


def outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Return what a function returns; the name of the exception where it raises one."""
    try:
        return function(*[list(argument) for argument in arguments])
    except Exception as error:
        return type(error)


def is_same(got: Any, right: Any) -> bool:
    """Return whether a result is right; 1 and True, or a list and a tuple, are not the same."""
    return type(got) is type(right) and got == right


def is_short(value: Any) -> bool:
    """Return whether a result fits into a text."""
    if isinstance(value, list):
        return len(value) <= 12 and all(isinstance(one, int | str) and is_short(one) for one in value)
    return len(value) <= 30 if isinstance(value, str) else abs(value) <= LARGEST


def draw_cases(draw: Draw, composition: Composition, count: int, max_length: int = 6) -> list[Case]:
    """Draw `count` different cases, those with different results first, the empty list among them where it may be."""
    chosen: dict[str, Case] = {}
    seen: set[str] = set()
    spare: dict[str, Case] = {}
    empty: tuple[list, ...] = ([], []) if composition.kind == "pairs" else ([],)
    tried = [empty, *(draw_arguments(draw, composition, max_length) for _ in range(3 * count))]
    for arguments in tried:
        case = Case(arguments, expected(composition, arguments))
        if is_short(case.result) and case.call not in chosen:
            is_new = repr(case.result) not in seen
            (chosen if is_new else spare)[case.call] = case
            seen.add(repr(case.result))
    return [*chosen.values(), *spare.values()][:count]


def neighbours(draw: Draw, composition: Composition, count: int) -> list[Composition]:
    """Return compositions that differ in one operation or constant: what a writer may mistake the given one for."""
    found = []
    for _ in range(count):
        parts, operand = dict(composition.parts), element_type(composition.kind)
        changed = draw.rng.choice(sorted(parts))
        for slot, part in composition.parts.items():
            table = table_of(composition.kind, slot, operand)
            after = type_after(table, part.name, operand)
            if slot == changed:
                options = [draw_part(draw, table, slot) for _ in range(4)]
                options += [Part(part.name, table[part.name].draw_constants(draw.rng))]
                fitting = [one for one in options if one != part and type_after(table, one.name, operand) == after]
                parts[slot] = draw.rng.choice(fitting) if fitting else part
            operand = after
        fallback = composition.fallback
        if fallback == "" and parts["guard"].name != "none":
            fallback = FALLBACKS[operand][0]
        if parts != composition.parts:
            found.append(Composition(composition.kind, parts, fallback))
    return found


def separating_cases(draw: Draw, composition: Composition, count: int) -> list[Case]:
    """Return `count` cases of which as many neighbours as possible fail one."""
    pool = draw_cases(draw, composition, 4 * count)
    others = neighbours(draw, composition, 3 * count)
    kills = [
        {i for i, other in enumerate(others) if not is_same(expected(other, case.arguments), case.result)}
        for case in pool
    ]
    chosen: list[int] = []
    alive = set(range(len(others)))
    while len(chosen) < min(count, len(pool)):
        best = max((i for i in range(len(pool)) if i not in chosen), key=lambda i: len(kills[i] & alive))
        if not kills[best] & alive and alive != set(range(len(others))):
            alive = set(range(len(others)))  # everything that can be told apart is: begin again, for a second witness
            continue
        chosen.append(best)
        alive -= kills[best]
        if not kills[best]:
            alive = set()
    return [pool[i] for i in chosen]


def draw_task(
    draw: Draw, grade: CodeGrade = "basic", *, num_cases: int = 8, kind: str | None = None, separating: bool = False
) -> CodeTask:
    """Draw a composition whose results vary, its specification, and cases."""
    choose = separating_cases if separating else draw_cases
    while True:
        composition = draw_composition(draw, grade, kind)
        cases = choose(draw, composition, num_cases)
        if len({repr(case.result) for case in cases}) >= 3:
            return CodeTask(composition, specification(draw, composition), tuple(cases))


def failed_cases(program: str, cases: Sequence[Case]) -> list[tuple[Case, Any]]:
    """Return the cases that a program of this package fails, with what it returns instead (a type of exception)."""
    function = load(program)
    results = [(case, outcome(function, case.arguments)) for case in cases]
    return [(case, got) for case, got in results if not is_same(got, case.result)]
