"""Probes of code: right programs, quotes and verdicts pass, near misses do not."""

import random

import pytest

from qinglan.tasks.code import is_held_out
from qinglan.tasks.code_cases import draw_cases, draw_task
from qinglan.tasks.code_documents import draw_program, read_program
from qinglan.tasks.code_faults import tamper
from qinglan.tasks.code_probes import CODE_PROBES, NUM_CASES, passes_tests
from qinglan.tasks.item import Draw
from qinglan.tasks.probes import Probe


def drawing(seed: object) -> Draw:
    return Draw(random.Random(repr(seed)), held_out=False)


def probes_of(name: str, count: int = 20, seed: int = 0) -> list[Probe]:
    draw = drawing((name, seed))
    return [CODE_PROBES[name](draw) for _ in range(count)]


@pytest.mark.parametrize("name", CODE_PROBES)
def test_probes_repeat_and_reject_unrelated_text(name: str) -> None:
    probes = probes_of(name)
    assert [probe.beginning for probe in probes] == [probe.beginning for probe in probes_of(name)]
    assert len({probe.beginning for probe in probes}) > 15
    for probe in probes:
        for text in ("", " I do not know.", " def f(a):\n    return None\n", "???"):
            assert not probe.passes(text)
        assert 0 < probe.max_new_tokens <= 200


@pytest.mark.parametrize("grade", ["basic", "hard"])
def test_right_programs_pass_and_tampered_ones_do_not(grade: str) -> None:
    draw = Draw(random.Random(grade), held_out=True)
    missed = 0
    for _ in range(25):
        task = draw_task(draw, grade, num_cases=NUM_CASES, separating=True)  # type: ignore[arg-type]
        assert is_held_out(task.composition) and len(task.cases) >= 10
        text = draw_program(draw, task)
        assert passes_tests(task, f" {text}\n Tests: f([]) must be")
        found = tamper(draw, text, task.cases)
        assert found is not None and not passes_tests(task, found.program)
        # Faults that show on any of forty other inputs show on the chosen ones too, nearly always.
        other = tamper(draw, text, draw_cases(draw, task.composition, 40))
        missed += other is not None and passes_tests(task, other.program)
    assert missed <= 2


def test_programs_that_do_harm_fail_and_nothing_hangs() -> None:
    task = draw_task(drawing(0), num_cases=NUM_CASES, separating=True)
    for text in (
        "def f(xs):\n    while True:\n        pass",
        "def f(xs):\n    import os",
        "def f(xs)\n    return 1",
        "f",
    ):
        assert not passes_tests(task, text)


def test_writing_probes_accept_a_right_program_only() -> None:
    for name, grade in (("code_pass_rate", "basic"), ("code_pass_rate_hard", "hard")):
        draw, again = drawing(name), drawing(name)
        probe = CODE_PROBES[name](draw)
        task = draw_task(Draw(again.rng, True), grade, num_cases=NUM_CASES, separating=True)  # type: ignore[arg-type]
        assert probe.beginning == f"Task: {task.specification}"
        assert probe.passes(f" {draw_program(draw, task)}\n")
        assert not probe.passes(f" {draw_program(draw, draw_task(draw))}\n")


def test_quotes_are_of_the_line_asked_for() -> None:
    for probe in probes_of("quoting_code_line"):
        program, number = probe.beginning.removesuffix(":").rsplit("\n line ", 1)
        lines = [line.split(" ", 1)[1].strip() for line in program.splitlines()]
        right = lines[int(number) - 1]
        assert probe.passes(f" {right}\n line 2:") and probe.passes(right)
        assert not probe.passes(f" {right} ...") and not any(probe.passes(line) for line in lines if line != right)


def test_verdicts_must_be_right_and_come_at_once() -> None:
    rights = []
    for probe in probes_of("judging_programs", 40):
        assert probe.beginning.endswith("\n Verdict:") and read_program(probe.beginning)
        rights.append(probe.passes(" correct."))
        assert probe.passes(" wrong.") != rights[-1] and not probe.passes(" It is correct.")
    assert 10 < sum(rights) < 30


def test_faults_must_be_quoted_exactly_and_none_claimed_in_right_programs() -> None:
    clean = 0
    for probe in probes_of("finding_faults", 40):
        lines = [line.strip() for line in read_program(probe.beginning).splitlines()]
        accepted = [line for line in lines if probe.passes(f" fault in: {line}\n It should")]
        assert len(accepted) + probe.passes(" no fault found.") >= 1 and len(set(accepted)) <= 1
        clean += not accepted
    assert 10 < clean < 30
