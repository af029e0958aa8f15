"""Programs for a composition in many styles: loops of three kinds, comprehensions, negated conditions, early returns.

Every program passes `ast.unparse`, and so does every tampered one (`code_faults.py`): formatting betrays nothing.
"""

import ast
from functools import lru_cache
from typing import NamedTuple

from qinglan.tasks.code import Composition, Part, operations_of
from qinglan.tasks.code_operations import Fold, Op
from qinglan.tasks.item import Draw

INVERSE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
"""Comparisons and their opposites."""


class Style(NamedTuple):
    """How a program is written."""

    loop: str
    """for, index, while; whole where the aggregate has a usual expression."""
    inner_whole: bool
    """The inner or first loop as one expression."""
    negated: bool
    """A condition is turned around and followed by `continue`."""
    early: bool
    """The first match is returned out of the loop."""
    named: bool
    """The value is named before it is used."""
    final: bool
    """The post step has a line of its own."""
    other_step: bool
    """The second usual way of an aggregate's step."""
    list_name: str
    element: str
    result: str


def draw_style(draw: Draw, kind: str) -> Style:
    """Draw a style, the result's name included.

    Names are few: with three names a choice, a small net spent a fifth of its loss on them.
    """
    rng = draw.rng
    words = kind in ("words", "letters")
    return Style(
        loop=rng.choices(("for", "index", "while", "whole"), (5, 1, 1, 2))[0],
        inner_whole=rng.random() < 0.4,
        negated=rng.random() < 0.3,
        early=rng.random() < 0.5,
        named=rng.random() < 0.3,
        final=rng.random() < 0.3,
        other_step=rng.random() < 0.3,
        list_name="rows" if kind == "rows" else "ws" if words else "xs",
        element="w" if words else "x",
        result=rng.choice(("out", "total")),
    )


def write_program(composition: Composition, style: Style) -> str:
    """Return the program text: one function `f`, without a line feed at the end."""
    writer = _Writer(composition, style, operations_of(composition))
    arguments = f"{style.list_name}, ys" if composition.kind == "pairs" else style.list_name
    lines = [f"def f({arguments}):", *_indented(writer.body())]
    return ast.unparse(ast.parse("\n".join(lines)))


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


@lru_cache(maxsize=4096)
def inverted(condition: str) -> str:
    """Return the opposite of a condition."""
    node = ast.parse(condition, mode="eval").body
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        node.ops[0] = INVERSE[type(node.ops[0])]()
        return ast.unparse(node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ast.unparse(node.operand)
    return f"not {condition}"


class _Writer(NamedTuple):
    composition: Composition
    style: Style
    operations: dict[str, Op | Fold]

    def code(self, slot: str, **names: str) -> str:
        """Return an operation's expression."""
        op = self.operations[slot]
        assert isinstance(op, Op)
        return op.code.format(*self.composition.parts[slot].constants, **names)

    def fold(self, slot: str) -> tuple[Fold, Part]:
        """Return an aggregate with its constants."""
        fold = self.operations[slot]
        assert isinstance(fold, Fold)
        return fold, self.composition.parts[slot]

    def body(self) -> list[str]:
        """Return the lines of the function."""
        guard = self.code("guard", x=self.style.list_name)
        lines = [f"if {guard}:", f"    return {self.composition.fallback}"] if guard else []
        writers = {"rows": self.nested, "letters": self.nested, "pairs": self.pairs, "own_pairs": self.pairs}
        return lines + (writers | {"limit": self.two_stages}).get(self.composition.kind, self.flat)()

    # ---------------------------------------------------------------------------------------------- kinds

    def flat(self) -> list[str]:
        """One loop over the list."""
        style, x = self.style, self.style.element
        source = self.code("source", x=style.list_name)
        condition, value = self.code("filter", x=x), self.code("map", x=x)
        fold, part = self.fold("fold")
        if style.loop == "whole" and fold.whole:
            return self.finish(_whole(fold, part, source, x, condition, value))
        is_early = style.early and part.name == "first" and self.composition.parts["post"].name == "none"
        if is_early:
            start = fold.start
            return [*self.loop(source, x, self.when(condition, [f"return {value}"])), f"return {start}"]
        start_lines, step, result = self.step("fold", style.result, value)
        return [*start_lines, *self.loop(source, x, self.when(condition, step)), *self.finish(result)]

    def nested(self) -> list[str]:
        """A loop over rows or words, with one in it over numbers or letters."""
        style, x = self.style, self.style.element
        letters = self.composition.kind == "letters"
        outer, x = ("w", "c") if letters else ("row", x)
        fold, part = self.fold("inner_fold")
        condition = self.code("inner_filter", x=x)
        value = x if letters else self.code("inner_map", x=x)
        inner: list[str]
        if style.inner_whole and fold.whole:
            inner, amount = [f"part = {_whole(fold, part, outer, x, condition, value)}"], "part"
        else:
            start, step, amount = self.step("inner_fold", "part", value)
            inner = [*start, f"for {x} in {outer}:", *_indented(self.when(condition, step))]
        lines, step, result = self.step("fold", style.result, amount)
        outer_condition = self.code("filter", x=amount)
        body = [*inner, *self.when(outer_condition, step)]
        return [*lines, *self.loop(style.list_name, outer, body), *self.finish(result)]

    def pairs(self) -> list[str]:
        """Two nested loops over two lists, or over the pairs of one."""
        style, xs = self.style, self.style.list_name
        is_own = self.composition.kind == "own_pairs"
        x, y = (f"{xs}[i]", f"{xs}[j]") if is_own and not style.named else ("x", "y")
        condition, value = self.code("filter", x=x, y=y), self.code("map", x=x, y=y)
        lines, step, result = self.step("fold", style.result, value)
        body = self.when(condition, step)
        if not is_own:
            loops = [f"for x in {xs}:", *_indented(["for y in ys:", *_indented(body)])]
        else:
            if style.named:
                body = [f"x, y = {xs}[i], {xs}[j]", *body]
            inner = [f"for j in range(i + 1, len({xs})):", *_indented(body)]
            loops = [f"for i in range(len({xs})):", *_indented(inner)]
        return [*lines, *loops, *self.finish(result)]

    def two_stages(self) -> list[str]:
        """A loop that finds a number, then one that uses it."""
        style, x = self.style, self.style.element
        source = self.code("source", x=style.list_name)
        fold, part = self.fold("inner_fold")
        condition = self.code("inner_filter", x=x)
        if style.inner_whole and fold.whole:
            first = [f"limit = {_whole(fold, part, source, x, condition, x)}"]
        else:
            start, step, _ = self.step("inner_fold", "limit", x)
            first = [*start, f"for {x} in {source}:", *_indented(self.when(condition, step))]
        condition, value = self.code("filter", x=x, y="limit"), self.code("map", x=x, y="limit")
        fold, part = self.fold("fold")
        if style.loop == "whole" and fold.whole:
            return [*first, *self.finish(_whole(fold, part, style.list_name, x, condition, value))]
        lines, step, result = self.step("fold", style.result, value)
        return [*first, *lines, *self.loop(style.list_name, x, self.when(condition, step)), *self.finish(result)]

    # ------------------------------------------------------------------------------------------- building blocks

    def step(self, slot: str, name: str, value: str) -> tuple[list[str], list[str], str]:
        """Return the lines before a loop, those for one value, and the expression of the result."""
        fold, part = self.fold(slot)
        steps = fold.other_step if self.style.other_step and fold.other_step else fold.step
        lines = []
        times = sum(line.count("{v}") for line in steps)
        if times and not value.isidentifier() and (times > 1 or self.style.named):
            lines, value = [f"v = {value}"], "v"
        lines += [line.format(a=name, v=value, t="step") for line in steps]
        start = [f"{name} = {fold.start.format(*part.constants)}"]
        if part.name == "running":
            start = ["step = 0", *start]
        return start, lines, fold.result.format(a=name)

    def when(self, condition: str, lines: list[str]) -> list[str]:
        """Return lines that run only where a condition holds."""
        if not condition:
            return lines
        if self.style.negated:
            return [f"if {inverted(condition)}:", "    continue", *lines]
        return [f"if {condition}:", *_indented(lines)]

    def loop(self, source: str, element: str, body: list[str]) -> list[str]:
        """Return a loop over a list in the style's manner."""
        if self.style.loop not in ("index", "while"):
            return [f"for {element} in {source}:", *_indented(body)]
        before, name = ([], source) if source.isidentifier() else ([f"ys = {source}"], "ys")
        if self.style.loop == "index":
            return [*before, f"for i in range(len({name})):", *_indented([f"{element} = {name}[i]", *body])]
        lines = [f"{element} = {name}[i]", "i += 1", *body]
        return [*before, "i = 0", f"while i < len({name}):", *_indented(lines)]

    def finish(self, result: str) -> list[str]:
        """Return the post step and the return."""
        name, is_idle = self.style.result, self.composition.parts["post"].name == "none"
        op = self.operations["post"]
        assert isinstance(op, Op)
        lines = []
        is_long = not result.isidentifier() and not is_idle
        if is_long and (self.style.named or op.code.count("{x}") > 1):
            lines, result = [f"{name} = {result}"], name
        answer = self.code("post", x=result if result.isidentifier() else f"({result})")
        if self.style.final and answer != name:
            return [*lines, f"{name} = {answer}", f"return {name}"]
        return [*lines, f"return {answer}"]


def _whole(fold: Fold, part: Part, source: str, element: str, condition: str, value: str) -> str:
    """Return an aggregate as one expression."""
    if value == element and not condition:
        members = source
    else:
        members = f"[{value} for {element} in {source}{f' if {condition}' if condition else ''}]"
    return fold.whole.format(*part.constants, l=members)
