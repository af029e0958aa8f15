"""Tampering: one fault put into a right program, of a category chosen first, so that tests fail.

A language model tells many inserted faults by their looks (`evals/bug_surprisal.py` measures how many), so categories
are weighted towards the slips that nets make themselves: a wrong name or method, comparison, operator or constant.
Every change sets one field of one node of the syntax tree; loop counters are left alone, so that no tampered program
runs for ever.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from qinglan.tasks.code_cases import Case, failed_cases
from qinglan.tasks.code_operations import DIGITS, LETTERS
from qinglan.tasks.code_styles import INVERSE
from qinglan.tasks.item import Draw


class Fault(NamedTuple):
    """A fault in a program: where it is, how the line reads and how it should read, in one sentence what is wrong."""

    category: str
    line: int
    """From 1, in the tampered program."""
    faulty: str
    """The line without its indentation, to be quoted exactly."""
    right: str
    """What should stand there; more lines where a check is missing after it."""
    description: str


class Tampered(NamedTuple):
    """A program with one fault."""

    program: str
    fault: Fault


class Change(NamedTuple):
    """A field of a node set to another value, which makes the line wrong."""

    node: ast.AST
    field: str
    value: Any
    line: int
    description: str
    right: str | None = None
    """Where it is not the line of the right program with the same number."""


SYMBOLS: dict[type[ast.AST], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
    ast.Mod: "%",
}
MISTAKEN_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.GtE, ast.LtE),
    ast.NotEq: (ast.Gt, ast.Lt),
}
MISTAKEN_OPERATORS: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add, ast.Mult),
    ast.Mult: (ast.Add, ast.Sub),
    ast.FloorDiv: (ast.Mod, ast.Mult),
    ast.Mod: (ast.FloorDiv, ast.Mult),
}
MISTAKEN_NAMES = {
    "max": ("min",),
    "min": ("max",),
    "sum": ("len", "max"),
    "len": ("sum", "max"),
    "abs": ("str", "len"),
    "sorted": ("list", "set"),
    "startswith": ("endswith",),
    "endswith": ("startswith",),
    "upper": ("lower",),
    "append": ("extend",),
    "count": ("find",),
    "add": ("update",),
    "set": ("sorted",),
    "str": ("abs",),
}
"""What each function or method is mistaken for."""


def _nodes(tree: ast.Module) -> Iterator[Any]:
    """Yield all nodes but those that count or end a loop."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id == "i":
            continue
        yield node
        waiting += [
            child
            for child in ast.iter_child_nodes(node)
            if not (isinstance(node, ast.While) and child is node.test)
            and not (isinstance(child, ast.Name) and isinstance(node, ast.Attribute) and node.attr in ("append", "add"))
        ]


def wrong_comparison(tree: ast.Module) -> Iterator[Change]:
    """A comparison with a neighbour of the right sign."""
    for node in _nodes(tree):
        if isinstance(node, ast.Compare):
            right = SYMBOLS[type(node.ops[0])]
            for other in MISTAKEN_COMPARISONS.get(type(node.ops[0]), ()):
                yield Change(node, "ops", [other()], node.lineno, f"The comparison should be {right}.")


def inverted_condition(tree: ast.Module) -> Iterator[Change]:
    """The opposite of a condition."""
    for node in _nodes(tree):
        if isinstance(node, ast.Compare):
            opposite = INVERSE[type(node.ops[0])]()
            yield Change(node, "ops", [opposite], node.lineno, "The condition is the wrong way round.")
        elif isinstance(node, ast.If) and isinstance(node.test, ast.UnaryOp):
            yield Change(node, "test", node.test.operand, node.lineno, "The condition is the wrong way round.")


def wrong_constant(tree: ast.Module) -> Iterator[Change]:
    """A number off by one or another digit, or another letter."""
    starts = {id(node.value) for node in _nodes(tree) if isinstance(node, ast.Assign)}
    limits = {id(node.comparators[0]): _remainders(node) for node in _nodes(tree) if isinstance(node, ast.Compare)}
    signed = {id(node.operand) for node in _nodes(tree) if isinstance(node, ast.UnaryOp)}
    for node in _nodes(tree):
        if not isinstance(node, ast.Constant) or id(node) in starts:
            continue
        for value in _other_constants(node, 1 if id(node) in signed else 0, limits.get(id(node), 10)):
            description = f"The constant should be {ast.unparse(node)}."
            yield Change(node, "value", value, node.lineno, description)


def _other_constants(node: ast.Constant, lowest: int, limit: int) -> list[int] | list[str]:
    """Return the neighbours of a number in a range and one digit more, or other letters."""
    if node.value in LETTERS:
        return [letter for letter in LETTERS if letter != node.value]
    if type(node.value) is not int:
        return []
    others = {node.value - 1, node.value + 1}
    if node.value > 1:
        others.add(DIGITS[(node.value * 5 + node.lineno) % len(DIGITS)])
    return sorted(value for value in others - {node.value} if lowest <= value < limit)


def _remainders(node: ast.Compare) -> int:
    """Return how many values the left side can take: that many of a remainder, else ten digits."""
    match node.left:
        case ast.BinOp(op=ast.Mod(), right=ast.Constant(value=int(modulus))):
            return modulus
    return 10


def wrong_operator(tree: ast.Module) -> Iterator[Change]:
    """Another arithmetic operator."""
    for node in _nodes(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign):
            right = SYMBOLS[type(node.op)] + ("=" if isinstance(node, ast.AugAssign) else "")
            for other in MISTAKEN_OPERATORS[type(node.op)]:
                yield Change(node, "op", other(), node.lineno, f"The operator should be {right}.")


def _variables(tree: ast.Module) -> list[str]:
    names = [arg.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for arg in node.args]
    names += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return list(dict.fromkeys(names))


def wrong_variable(tree: ast.Module) -> Iterator[Change]:
    """Another variable of the program."""
    names = _variables(tree)
    in_returns = {id(inner) for node in _nodes(tree) if isinstance(node, ast.Return) for inner in ast.walk(node)}
    for node in _nodes(tree):
        is_read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names
        if is_read and id(node) not in in_returns:
            for other in names:
                if other != node.id:
                    yield Change(node, "id", other, node.lineno, f"The variable should be {node.id}.")


def wrong_method(tree: ast.Module) -> Iterator[Change]:
    """Another function or method."""
    for node in _nodes(tree):
        if isinstance(node, ast.Call):
            field = "id" if isinstance(node.func, ast.Name) else "attr"
            right = getattr(node.func, field)
            for other in MISTAKEN_NAMES.get(right, ()):
                yield Change(node.func, field, other, node.lineno, f"The call should be {right}.")


def wrong_return(tree: ast.Module) -> Iterator[Change]:
    """Another variable or constant returned."""
    names = _variables(tree)
    for node in _nodes(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant | ast.Name | ast.List):
            right = ast.unparse(node.value)
            others: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names if name != right]
            if isinstance(node.value, ast.Constant) and type(node.value.value) is int:
                others = [ast.Constant(value) for value in (0, 1, 2, 3) if value != node.value.value]
            for other in others:
                yield Change(node, "value", other, node.lineno, f"It should return {right}.")


def missing_guard(tree: ast.Module) -> Iterator[Change]:
    """The check at the beginning left out; the line before it is quoted."""
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    first = function.body[0]
    if isinstance(first, ast.If) and isinstance(first.body[0], ast.Return):
        head = ast.unparse(function).splitlines()[0]
        check = "\n".join(f"    {line}" for line in ast.unparse(first).splitlines())
        right = f"{head}\n{check}"
        yield Change(function, "body", function.body[1:], 1, "The check at the beginning is missing.", right)


def missing_post(tree: ast.Module) -> Iterator[Change]:
    """The last step left out: of the returned expression, or the line before the return."""
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    last, before = function.body[-1], function.body[-2] if len(function.body) > 1 else None
    assert isinstance(last, ast.Return) and last.value is not None
    description = "The last step is missing."
    for inner in ast.iter_child_nodes(last.value):
        if isinstance(inner, ast.expr) and not isinstance(inner, ast.Constant) and not isinstance(last.value, ast.List):
            is_function = isinstance(last.value, ast.Call) and inner is last.value.func
            if not is_function and not isinstance(inner, ast.Slice):
                yield Change(last, "value", inner, last.lineno, description)
    if isinstance(before, ast.Assign) and isinstance(last.value, ast.Name):
        right = f"return {ast.unparse(before.value)}"
        if last.value.id in {node.id for node in ast.walk(before.value) if isinstance(node, ast.Name)}:
            body = [*function.body[:-2], last]
            yield Change(function, "body", body, last.lineno - 1, description, right)


def wrong_start(tree: ast.Module) -> Iterator[Change]:
    """Another value at the beginning."""
    for node in _nodes(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            value = node.value.value
            if type(value) is int:
                for other in (value - 1, value + 1, 0, 1):
                    if other != value and other >= 0:
                        yield Change(node.value, "value", other, node.lineno, f"It should start from {value}.")


def wrong_slice(tree: ast.Module) -> Iterator[Change]:
    """Another part of a list, or another range."""
    description = "It takes the wrong part."
    for node in _nodes(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
            right = ast.unparse(node.slice)
            bare = right.replace(":", "")
            for text in ("1:", "2:", ":-1", "::2", "1::2", "::-1", f"{bare}:", f":{bare}"):
                if text != right:
                    other = ast.parse(f"x[{text}]", mode="eval").body
                    assert isinstance(other, ast.Subscript)
                    yield Change(node, "slice", other.slice, node.lineno, description)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            if len(node.args) == 2:
                yield Change(node, "args", [ast.Name("i", ast.Load()), node.args[1]], node.lineno, description)
                yield Change(node, "args", node.args[1:], node.lineno, description)
            else:
                yield Change(node, "args", [ast.Constant(1), node.args[0]], node.lineno, description)


def wrong_step(tree: ast.Module) -> Iterator[Change]:
    """A value that replaces the sum instead of going into it, or 1 added for the value and the other way round."""
    names = _variables(tree)
    for parent in _nodes(tree):
        body: list[ast.stmt] = parent.body if isinstance(getattr(parent, "body", None), list) else []
        for place, node in enumerate(body):
            if not isinstance(node, ast.AugAssign) or (isinstance(node.target, ast.Name) and node.target.id == "i"):
                continue
            symbol = SYMBOLS[type(node.op)]
            replaced = ast.Assign([node.target], node.value, lineno=node.lineno)
            changed = [*body[:place], replaced, *body[place + 1 :]]
            yield Change(parent, "body", changed, node.lineno, f"The step should be {symbol}=.")
            if isinstance(node.value, ast.Constant):
                for name in names:
                    yield Change(node, "value", ast.Name(name, ast.Load()), node.lineno, "The step should add 1.")
            else:
                right = ast.unparse(node.value)
                yield Change(node, "value", ast.Constant(1), node.lineno, f"The step should use {right}.")


CATEGORIES: dict[str, tuple[float, Callable[[ast.Module], Iterator[Change]]]] = {
    "wrong_comparison": (3.0, wrong_comparison),
    "wrong_constant": (4.0, wrong_constant),
    "wrong_operator": (3.0, wrong_operator),
    "wrong_variable": (3.0, wrong_variable),
    "wrong_method": (3.0, wrong_method),
    "wrong_return": (1.0, wrong_return),
    "wrong_start": (1.5, wrong_start),
    "wrong_slice": (1.5, wrong_slice),
    "wrong_step": (1.0, wrong_step),
    "inverted_condition": (1.5, inverted_condition),
    "missing_guard": (1.0, missing_guard),
    "missing_post": (1.0, missing_post),
}
"""Every category of faults with its weight."""
CRASHING = 0.1
"""Share of the changes that raise an exception which are taken all the same: most of them look odd."""


def tamper(draw: Draw, program: str, cases: Sequence[Case], category: str | None = None) -> Tampered | None:
    """Return the program with one fault that fails at least one case; None where no change of the category does.

    Args:
        draw: chooses the category, then the change.
        program: a right program as `code_styles.write_program` gives it.
        cases: of which the fault must change at least one result.
        category: in place of a drawn one.
    """
    rng = draw.rng
    tree = ast.parse(program)
    names = [category] if category else _in_drawn_order(draw)
    for name in names:
        changes = list(CATEGORIES[name][1](tree))
        rng.shuffle(changes)
        for change in changes:
            text = changed_program(tree, change)
            if text != program and _is_plausible(draw, failed_cases(text, cases)):
                return Tampered(text, _fault(name, change, program, text))
    return None


def _is_plausible(draw: Draw, failed: Sequence[tuple[Case, Any]]) -> bool:
    """Return whether a program fails, and by wrong results; one in ten may raise exceptions, as nets' programs do."""
    return bool(failed) and (not any(isinstance(got, type) for _, got in failed) or draw.rng.random() < CRASHING)


def _in_drawn_order(draw: Draw) -> list[str]:
    """Return the categories in an order in which each comes first with its share."""
    return sorted(CATEGORIES, key=lambda name: draw.rng.random() ** (1.0 / CATEGORIES[name][0]), reverse=True)


def changed_program(tree: ast.Module, change: Change) -> str:
    """Return the program text with a change; the tree stays as it was."""
    before = getattr(change.node, change.field)
    setattr(change.node, change.field, change.value)
    text = ast.unparse(tree)
    setattr(change.node, change.field, before)
    return text


def _fault(category: str, change: Change, program: str, tampered: str) -> Fault:
    right = change.right or program.splitlines()[change.line - 1].strip()
    return Fault(category, change.line, tampered.splitlines()[change.line - 1].strip(), right, change.description)


def repaired(tampered: str, fault: Fault) -> str:
    """Return the program with the faulty line replaced by the right one, its indentation kept."""
    lines = tampered.splitlines()
    line = lines[fault.line - 1]
    indentation = line[: len(line) - len(line.lstrip())]
    lines[fault.line - 1] = indentation + fault.right
    return "\n".join(lines)
