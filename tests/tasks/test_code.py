"""Programs of the built-in world: they agree with an oracle of their own, in every style; faults change results."""

import ast
import random
from collections import Counter
from itertools import pairwise

import pytest

from qinglan.tasks.code import (
    BASIC,
    HARD,
    HELD_OUT_ONE_IN,
    SLOTS,
    Composition,
    Part,
    draw_composition,
    is_held_out,
    num_compositions,
    operations_of,
    specification,
)
from qinglan.tasks.code_cases import (
    BUILTINS,
    WORDS,
    draw_arguments,
    draw_cases,
    draw_task,
    failed_cases,
    is_same,
    load,
    neighbours,
    outcome,
    separating_cases,
)
from qinglan.tasks.code_faults import CATEGORIES, repaired, tamper
from qinglan.tasks.code_oracle import expected
from qinglan.tasks.code_styles import draw_style, inverted, write_program
from qinglan.tasks.item import Draw

KINDS = (*BASIC, *HARD)
LARGE_INPUTS = 5


def drawing(seed: object, held_out: bool = False) -> Draw:
    return Draw(random.Random(repr(seed)), held_out)


def program_of(draw: Draw, composition: Composition) -> str:
    return write_program(composition, draw_style(draw, composition.kind))


def test_there_are_more_than_a_million_basic_compositions_and_far_more_hard_ones() -> None:
    assert sum(num_compositions(kind) for kind in BASIC) > 1_000_000
    assert sum(num_compositions(kind) for kind in HARD) > 10_000_000
    # pairs: 7 filters x 7 maps x 120 ends: of 11 folds 8 give a number (12 post steps), 3 a list (8), and 5 guards.
    assert num_compositions("pairs") == 7 * 7 * (8 * 12 + 3 * 8) * 5


@pytest.mark.parametrize("kind", KINDS)
def test_programs_agree_with_the_oracle_in_every_style(kind: str) -> None:
    draw = drawing(kind)
    for number in range(500):
        composition = draw_composition(Draw(draw.rng, number % 8 == 0), kind=kind)
        text = program_of(draw, composition)
        function = load(text)
        for _ in range(LARGE_INPUTS):
            arguments = draw_arguments(draw, composition)
            assert is_same(outcome(function, arguments), expected(composition, arguments)), (text, arguments)


def test_a_worked_example() -> None:
    parts = {
        "source": Part("drop", (1,)),
        "filter": Part("above", (3,)),
        "map": Part("times", (2,)),
        "fold": Part("sum"),
        "post": Part("plus", (5,)),
        "guard": Part("short", (2,)),
    }
    composition = Composition("numbers", parts, 7)
    # [9, 3, 4, 6]: without the first 3, 4, 6; above 3: 4, 6; twice: 8, 12; their sum and 5: 25. One number: 7.
    assert expected(composition, ([9, 3, 4, 6],)) == 25 and expected(composition, ([9],)) == 7
    said = specification(drawing(0), composition)
    assert all(text in said for text in ("first 1", "3", "times 2" if "times 2" in said else "by 2", "5", "return 7"))
    style = draw_style(drawing(0), "numbers")._replace(
        loop="for", negated=False, named=False, final=False, other_step=False, list_name="xs", element="x", result="out"
    )
    assert write_program(composition, style) == (
        "def f(xs):\n    if len(xs) < 2:\n        return 7\n    out = 0\n    for x in xs[1:]:\n"
        "        if x > 3:\n            out += x * 2\n    return out + 5"
    )
    assert "while i < len(ys):" in write_program(composition, style._replace(loop="while"))
    assert "if x <= 3:\n            continue" in write_program(composition, style._replace(negated=True))
    assert "return sum([x * 2 for x in xs[1:] if x > 3]) + 5" in write_program(
        composition, style._replace(loop="whole")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_programs_are_as_ast_unparse_writes_them_and_use_few_names(kind: str) -> None:
    draw = drawing(kind)
    styles = set()
    for _ in range(100):
        text = program_of(draw, draw_composition(draw, kind=kind))
        assert ast.unparse(ast.parse(text)) == text
        called = {node.func.id for node in ast.walk(ast.parse(text)) if getattr(getattr(node, "func", 0), "id", "")}
        assert called <= set(BUILTINS)
        assert not any(
            len(token) > 1 and token != "99" for token in "".join(c if c.isdigit() else " " for c in text).split()
        )
        styles |= {word for word in ("while", "continue", "range", "[") if word in text}
    assert {"continue", "["} <= styles


def test_opposites_of_conditions() -> None:
    assert inverted("x > 3") == "x <= 3" and inverted("'a' in w") == "'a' not in w"
    assert inverted("not xs") == "xs" and inverted("w.startswith('a')") == "not w.startswith('a')"


def test_held_out_compositions_are_one_in_eight_whatever_their_constants() -> None:
    draw = drawing(0)
    for held_out in (False, True):
        for _ in range(200):
            composition = draw_composition(Draw(draw.rng, held_out), draw.rng.choice(("basic", "hard")))
            assert is_held_out(composition) == held_out
            other = {
                slot: part._replace(constants=tuple(9 for _ in part.constants))
                for slot, part in composition.parts.items()
            }
            assert is_held_out(composition._replace(parts=other)) == held_out
    found = Counter(
        is_held_out(Composition("numbers", dict(zip(SLOTS["numbers"], map(Part, names), strict=True)), ""))
        for names in ((a, b, c, "sum", "none", "none") for a in "abcdefgh" for b in "abcdefgh" for c in "abcdefghijkl")
    )
    assert found[True] / sum(found.values()) == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.03)


def test_specifications_name_every_constant_and_every_step() -> None:
    draw = drawing(0)
    for number in range(400):
        composition = draw_composition(draw, "hard" if number % 2 else "basic")
        said = specification(draw, composition)
        assert said.endswith(".") and "{" not in said and "  " not in said and " ." not in said and " ," not in said
        for part in composition.parts.values():
            assert all(str(constant) in said for constant in part.constants)
        for slot, op in operations_of(composition).items():
            written = [w.format(*composition.parts[slot].constants).removeprefix("return ") for w in op.wordings]
            if slot != "inner_fold" and slot != "guard":
                assert any(wording in said for wording in written), (said, slot)


@pytest.mark.parametrize("grade", ["basic", "hard"])
def test_cases_vary_and_neighbours_fail_them(grade: str) -> None:
    draw = drawing(grade)
    told_apart = []
    for _ in range(25):
        task = draw_task(draw, grade, num_cases=12, separating=True)  # type: ignore[arg-type]
        assert 10 <= len(task.cases) <= 12 and len({case.call for case in task.cases}) == len(task.cases)
        assert len({repr(case.result) for case in task.cases}) >= 3
        for other in neighbours(draw, task.composition, 10):
            differs = any(not is_same(expected(other, case.arguments), case.result) for case in task.cases)
            told_apart.append(differs)
    assert sum(told_apart) / len(told_apart) > 0.85


def test_separating_cases_are_better_than_any() -> None:
    draw = drawing(0)
    caught = Counter()
    for _ in range(40):
        composition = draw_task(draw).composition
        others = neighbours(draw, composition, 20)
        for name, cases in (
            ("any", draw_cases(draw, composition, 5)),
            ("chosen", separating_cases(draw, composition, 5)),
        ):
            caught[name] += sum(any(not is_same(expected(o, c.arguments), c.result) for c in cases) for o in others)
    assert caught["chosen"] > caught["any"]


def test_results_are_compared_with_their_type() -> None:
    assert is_same(1, 1) and not is_same(True, 1) and not is_same((1,), [1]) and not is_same(ValueError, 0)
    assert not any(word.startswith(("s", "t", "m", "d", "re", "ve", "ll")) for word in WORDS)


@pytest.mark.parametrize("category", CATEGORIES)
def test_faults_of_every_category_fail_a_case_and_quote_their_line(category: str) -> None:
    draw = drawing(category)
    found = 0
    while found < 15:
        task = draw_task(draw, draw.rng.choice(("basic", "hard")))
        text = program_of(draw, task.composition)
        tampered = tamper(draw, text, task.cases, category)
        if tampered is None:
            continue
        found += 1
        fault = tampered.fault
        assert fault.category == category and fault.description.endswith(".")
        assert tampered.program != text and ast.unparse(ast.parse(tampered.program)) == tampered.program
        assert tampered.program.splitlines()[fault.line - 1].strip() == fault.faulty
        assert failed_cases(tampered.program, task.cases) and not failed_cases(text, task.cases)
        fixed = repaired(tampered.program, fault)
        assert not failed_cases(fixed, task.cases)
        assert fixed == text or category == "missing_post"


def test_a_fault_changes_one_place_only() -> None:
    draw = drawing(1)
    for _ in range(60):
        task = draw_task(draw)
        text = program_of(draw, task.composition)
        tampered = tamper(draw, text, task.cases)
        assert tampered is not None
        if not tampered.fault.category.startswith("missing"):
            pairs = list(zip(text.splitlines(), tampered.program.splitlines(), strict=True))
            changed = [number for number, (old, new) in enumerate(pairs, start=1) if old != new]
            assert changed == [tampered.fault.line]


def test_shares_of_categories_follow_their_weights() -> None:
    draw = drawing(2)
    names = Counter()
    for _ in range(400):
        task = draw_task(draw)
        tampered = tamper(draw, program_of(draw, task.composition), task.cases)
        names[tampered.fault.category if tampered else "none"] += 1
    ours = sum(
        names[name]
        for name in ("wrong_comparison", "wrong_constant", "wrong_operator", "wrong_variable", "wrong_method")
    )
    assert ours / 400 > 0.6 and names["none"] < 20 and len(names) >= 10


def test_nothing_of_a_draw_depends_on_anything_but_its_generator() -> None:
    tasks = [draw_task(drawing("same")) for _ in range(2)]
    assert tasks[0] == tasks[1]
    programs = [program_of(drawing("style"), tasks[0].composition) for _ in range(2)]
    assert programs[0] == programs[1]
    assert all(len(set(pair)) > 1 for pair in pairwise([draw_task(drawing(seed)).specification for seed in range(5)]))
