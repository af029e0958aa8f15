"""Phrases of specifications and the code that they stand for: the smallest documents about code; spans of code.

A program of a hundred tokens shows four operations; the same tokens hold a dozen phrases.
"""

import ast
import re

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
from qinglan.tasks.code_styles import inverted
from qinglan.tasks.document import VERDICT, Document, Span
from qinglan.tasks.item import Draw

SPECIFICATION, COPIED, TAMPERED, RESULT = 0.1, 3.0, 0.1, 0.3
"""Loss weights: of specifications, constants copied from them, tampered programs (nobody shall learn to write such),
results of calls."""
CORRECT, WRONG = "correct.", "wrong."

CONDITIONS: tuple[tuple[dict[str, Op], str], ...] = (
    (NUMBER_FILTERS, "x"),
    (WORD_FILTERS, "w"),
    (PAIR_FILTERS, "x"),
    (LETTER_FILTERS, "c"),
    (LIMIT_FILTERS, "x"),
)
EXPRESSIONS: tuple[tuple[dict[str, Op], str], ...] = (
    (SOURCES, "xs"),
    (SOURCES, "ws"),
    (NUMBER_MAPS, "x"),
    (WORD_MAPS, "w"),
    (PAIR_MAPS, "x"),
    (LIMIT_MAPS, "x"),
    (NUMBER_POSTS, "out"),
    (LIST_POSTS, "out"),
    (WORD_POSTS, "out"),
)
"""Tables of operations, each with the variable that its phrases are about."""
FOLDS = ((NUMBER_FOLDS, "x"), (WORD_FOLDS, "w"))
GUARDED = ((GUARDS, "xs"), (GUARDS, "ws"))
SPOKEN_OF: tuple[tuple[dict[str, Op] | dict[str, Fold], str], ...] = (*CONDITIONS, *EXPRESSIONS, *FOLDS, *GUARDED)


def code_spans(text: str, constants: set[str], weight: float = 1.0) -> Document:
    """Return code as spans of equal weight; words with a constant from the specification weigh three times as much.

    Spans are parted where the code has a single space, which the tokenizer puts before each span anyway: the tokens are
    those of the undivided text.
    """
    spans: Document = []
    for word in re.split(r" (?=\S)", text):
        is_copied = any(found in constants for found in re.findall(r"\d|(?<=')[a-z]+(?=')", word))
        weighs = weight * (COPIED if is_copied else 1.0)
        if spans and spans[-1].weight == weighs:
            spans[-1] = Span(f"{spans[-1].text} {word}", weighs)
        else:
            spans.append(Span(word, weighs))
    return spans


def expression(op: Op, constants: tuple[Constant, ...], name: str) -> str:
    """Return an operation's expression as programs write it."""
    return ast.unparse(ast.parse(op.code.format(*constants, x=name, y="y")))


def _named(draw: Draw, table: dict[str, Op] | dict[str, Fold]) -> Op | Fold:
    """Draw an operation that is spoken of."""
    return table[draw.rng.choice([name for name in table if table[name].wordings[0]])]


def phrases(draw: Draw) -> Document:
    """Phrases of specifications, each with its code: what every operation is called, without programs around it."""
    rng = draw.rng
    spans: Document = []
    for _ in range(rng.randrange(5, 9)):
        table, name = rng.choice(SPOKEN_OF)
        op = _named(draw, table)
        constants = op.draw_constants(rng)
        if isinstance(op, Fold):
            lines = op.other_step if op.other_step and rng.random() < 0.3 else op.step
            start = f"out = {op.start.format(*constants)}"
            code = "\n".join([start, *(line.format(a="out", v=name, t="step") for line in lines)])
        elif (table, name) in GUARDED:
            code = f"if {expression(op, constants, name)}:"
        elif (table, name) in CONDITIONS:
            holds = expression(op, constants, name)
            code = f"if {holds}:" if rng.random() < 0.7 else f"if {inverted(holds)}: continue"
        else:
            code = expression(op, constants, name)
        spans.append(Span(f"{rng.choice(op.wordings).format(*constants)}:", SPECIFICATION))
        spans += code_spans(f"{code}\n", {str(one) for one in constants})
    return spans


def fragments(draw: Draw) -> Document:
    """Phrases of specifications, each with expressions and their verdicts: judging in its smallest form."""
    rng = draw.rng
    spans: Document = []
    for _ in range(3):
        table, name = rng.choice((*CONDITIONS, *EXPRESSIONS))
        op = _named(draw, table)
        assert isinstance(op, Op)
        constants = op.draw_constants(rng)
        right = expression(op, constants, name)
        spans.append(Span(f"{rng.choice(op.wordings).format(*constants)}:", SPECIFICATION))
        for _ in range(3):
            shown = right if rng.random() < 0.5 else _mistaken(draw, table, op, constants, name)
            spans += [Span(shown, TAMPERED), Span(CORRECT if shown == right else WRONG, VERDICT)]
    return spans


def _mistaken(draw: Draw, table: dict[str, Op], op: Op, constants: tuple[Constant, ...], name: str) -> str:
    """Return an expression of the same table: with another constant, turned around, or another operation."""
    rng = draw.rng
    how = rng.random()
    if how < 0.4 and op.pools:
        return expression(op, op.draw_constants(rng), name)
    if how < 0.6 and (table, name) in CONDITIONS:
        return inverted(expression(op, constants, name))
    other = _named(draw, table)
    assert isinstance(other, Op)
    drawn = other.draw_constants(rng)
    fits = len(drawn) == len(constants) and all(one in pool for one, pool in zip(constants, other.pools, strict=True))
    return expression(other, constants if fits else drawn, name)
