"""Compositional Python functions: what one computes, drawn at random, and its specification in one English sentence.

A basic function is source x filter x map x fold x post step x guard over a list of numbers or words; a hard one has two
loops, nested or one after the other. One composition in eight, chosen by a hash of its operations, is held out: it
never occurs in the corpus, with whatever constants. Programs are written by `code_styles.py`, results computed
independently by `code_oracle.py`.
"""

import hashlib
from functools import cache
from typing import Literal, NamedTuple

from qinglan.tasks.code_operations import (
    GUARDS,
    LETTER_FILTERS,
    LIMIT_FILTERS,
    LIMIT_MAPS,
    LIST_POSTS,
    NUMBER_FILTERS,
    NUMBER_FOLDS,
    NUMBER_MAPS,
    NUMBER_POSTS,
    PAIR_FILTERS,
    PAIR_MAPS,
    SOURCES,
    WORD_FILTERS,
    WORD_FOLDS,
    WORD_MAPS,
    WORD_POSTS,
    Constant,
    Fold,
    Op,
)
from qinglan.tasks.item import Draw

CodeGrade = Literal["basic", "hard"]
Table = dict[str, Op] | dict[str, Fold]

BASIC, HARD = ("numbers", "words"), ("rows", "letters", "pairs", "own_pairs", "limit")
LISTS = {
    "numbers": "a list of numbers",
    "words": "a list of words",
    "rows": "a list of rows of numbers",
    "letters": "a list of words",
    "pairs": "two lists of numbers",
    "own_pairs": "a list of numbers",
    "limit": "a list of numbers",
}
"""What a function of each kind takes, in words."""
HELD_OUT_ONE_IN = 8
FALLBACKS: dict[str, tuple[Constant, ...]] = {"n": (0, 1, 2, 3), "w": ("''",), "N": ("[]",), "W": ("[]",)}
FALLBACK_WORDS = {"''": "an empty text", "[]": "an empty list"}
TRIVIAL = {"all": 0.4, "none": 0.4, "same": 0.25}
"""Share of the operations that do nothing, where a slot has one (a third of it for filters)."""

INNER_FOLDS = {
    name: NUMBER_FOLDS[name]
    for name in ("sum", "product", "count", "largest", "smallest", "last", "subtract", "distinct")
}
PAIR_FOLDS = {name: fold for name, fold in NUMBER_FOLDS.items() if name != "first"}
LIMIT_FOLDS = {name: NUMBER_FOLDS[name] for name in ("sum", "count", "largest", "smallest", "first", "last")}
LETTER_FOLDS = {name: WORD_FOLDS[name] for name in ("count", "join")}


class Part(NamedTuple):
    """One operation of a composition with its constants."""

    name: str
    constants: tuple[Constant, ...] = ()


class Composition(NamedTuple):
    """What a function computes: its kind, and an operation for every slot of the kind."""

    kind: str
    parts: dict[str, Part]
    fallback: Constant
    """What is returned where the guard holds, as Python text."""

    @property
    def grade(self) -> CodeGrade:
        """Basic or hard."""
        return "basic" if self.kind in BASIC else "hard"

    @property
    def operations(self) -> str:
        """The composition without its constants."""
        return "/".join((self.kind, *(f"{slot}={part.name}" for slot, part in self.parts.items())))


def table_of(kind: str, slot: str, operand: str) -> Table:
    """Return the operations that fit a slot, given the type that it works on ("n", "w", "N", "W")."""
    if slot in ("source", "guard"):
        return SOURCES if slot == "source" else GUARDS
    if slot == "post":
        return NUMBER_POSTS if operand == "n" else WORD_POSTS if operand == "w" else LIST_POSTS
    if kind in ("pairs", "own_pairs") and slot != "fold":
        return PAIR_FILTERS if slot == "filter" else PAIR_MAPS
    if kind == "limit" and slot in ("filter", "map"):
        return LIMIT_FILTERS if slot == "filter" else LIMIT_MAPS
    if kind == "letters" and slot in ("inner_filter", "inner_fold"):
        return LETTER_FILTERS if slot == "inner_filter" else LETTER_FOLDS
    if slot in ("filter", "inner_filter"):
        return NUMBER_FILTERS if operand == "n" else WORD_FILTERS
    if slot in ("map", "inner_map"):
        return NUMBER_MAPS if operand == "n" else WORD_MAPS
    if slot == "inner_fold":
        return LIMIT_FOLDS if kind == "limit" else INNER_FOLDS
    if kind in ("pairs", "own_pairs"):
        return PAIR_FOLDS
    return NUMBER_FOLDS if operand == "n" else WORD_FOLDS


SLOTS: dict[str, tuple[str, ...]] = {
    "numbers": ("source", "filter", "map", "fold", "post", "guard"),
    "words": ("source", "filter", "map", "fold", "post", "guard"),
    "rows": ("inner_filter", "inner_map", "inner_fold", "filter", "fold", "post", "guard"),
    "letters": ("inner_filter", "inner_fold", "filter", "fold", "post", "guard"),
    "pairs": ("filter", "map", "fold", "post", "guard"),
    "own_pairs": ("filter", "map", "fold", "post", "guard"),
    "limit": ("source", "inner_filter", "inner_fold", "filter", "map", "fold", "post", "guard"),
}
"""The slots of every kind in the order in which values flow; `inner_` ones belong to the inner or the first loop."""


def element_type(kind: str) -> str:
    """Return the type of what the first operations of a kind work on."""
    return "w" if kind in ("words", "letters") else "n"


def type_after(table: Table, name: str, operand: str) -> str:
    """Return the type that an operation gives."""
    return table[name].gives or operand


def num_compositions(kind: str) -> int:
    """Return how many compositions a kind has, constants, wordings and styles not counted."""

    @cache
    def count(slots: tuple[str, ...], operand: str) -> int:
        if not slots:
            return 1
        table = table_of(kind, slots[0], operand)
        return sum(count(slots[1:], type_after(table, name, operand)) for name in table)

    return count(SLOTS[kind], element_type(kind))


def is_held_out(composition: Composition) -> bool:
    """Return whether a composition is kept out of the corpus."""
    digest = hashlib.blake2b(composition.operations.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def draw_part(draw: Draw, table: Table, slot: str) -> Part:
    """Draw an operation with its constants; those that do nothing have a share of their own."""
    rng = draw.rng
    trivial = next((name for name in TRIVIAL if name in table), None)
    share = 0.0 if trivial is None else TRIVIAL[trivial] / (3 if slot.endswith("filter") else 1)
    if trivial is not None and rng.random() < share:
        return Part(trivial)
    name = rng.choice([name for name in table if name != trivial])
    return Part(name, table[name].draw_constants(rng))


def draw_composition(draw: Draw, grade: CodeGrade = "basic", kind: str | None = None) -> Composition:
    """Draw what a function computes, held out or not as `draw` says."""
    while True:
        chosen = kind or draw.rng.choice(BASIC if grade == "basic" else HARD)
        parts, operand = {}, element_type(chosen)
        for slot in SLOTS[chosen]:
            table = table_of(chosen, slot, operand)
            parts[slot] = draw_part(draw, table, slot)
            operand = type_after(table, parts[slot].name, operand)
        if parts["guard"].name == "none":
            fallback: Constant = ""
        else:
            fallback = draw.rng.choice(FALLBACKS[operand])
        made = Composition(chosen, parts, fallback)
        num_idle = sum(part.name in TRIVIAL for part in parts.values())
        if num_idle < 4 and is_held_out(made) == draw.held_out:
            return made


def operations_of(composition: Composition) -> dict[str, Op | Fold]:
    """Return the operation of every slot."""
    found: dict[str, Op | Fold] = {}
    operand = element_type(composition.kind)
    for slot, part in composition.parts.items():
        table = table_of(composition.kind, slot, operand)
        found[slot] = table[part.name]
        operand = type_after(table, part.name, operand)
    return found


def specification(draw: Draw, composition: Composition) -> str:
    """Return one sentence that says what the function `f` does, in one of its wordings."""
    rng = draw.rng
    said = {
        slot: rng.choice(op.wordings).format(*composition.parts[slot].constants)
        for slot, op in operations_of(composition).items()
    }
    guard = ""
    if said["guard"]:
        fallback = FALLBACK_WORDS.get(str(composition.fallback), str(composition.fallback))
        where = said["guard"].replace("the list", "the first list") if composition.kind == "pairs" else said["guard"]
        guard = f"{where} return {fallback}"
    result = said["fold"] + (f", {said['post']}" if said["post"] else "")
    before, steps = _steps(composition.kind, said)
    steps = [step for step in steps if step]
    head = rng.choice(("For {0}", "Given {0}", "Write f for {0}")).format(LISTS[composition.kind])
    text = f"{head}: {before}{', '.join(steps)}{' and ' if steps else ''}{result}"
    if not guard:
        return f"{text}."
    return f"{text}; {guard}." if rng.random() < 0.6 else f"{guard[0].upper()}{guard[1:]}. {text}."


def _steps(kind: str, said: dict[str, str]) -> tuple[str, list[str]]:
    """Return what comes first, and the clauses before the result (some empty)."""
    inner = said.get("inner_fold", "").replace("return", "take")
    if kind in BASIC:
        return "", [said["source"], said["filter"], said["map"]]
    if kind in ("pairs", "own_pairs"):
        pairs = "of all pairs" if kind == "pairs" else "of all pairs in order"
        return "", [f"{pairs} {said['filter']}".strip(), said["map"]]
    if kind == "letters":
        verb = "join" if "join" in inner else "count"
        return f"in each word {verb} the letters {said['inner_filter']}".strip() + "; then ", [said["filter"]]
    steps = [said["inner_filter"], said["inner_map"]] if kind == "rows" else [said["source"], said["inner_filter"]]
    first = ", ".join([*(step for step in steps if step), inner])
    if kind == "rows":
        return f"in each row {first}; then ", [said["filter"]]
    return f"{first}; then of all ", [said["filter"], said["map"]]
