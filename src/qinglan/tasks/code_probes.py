"""Capability probes of code: writing programs that pass their tests, quoting a line, judging a program.

All on held-out compositions, decoded greedily; what the model writes runs in the sandbox.
"""

from collections.abc import Callable

from qinglan.tasks.code import CodeGrade
from qinglan.tasks.code_cases import CodeTask, draw_task, is_same
from qinglan.tasks.code_documents import NO_FAULT, draw_program, numbered, read_program, task_text
from qinglan.tasks.code_faults import tamper
from qinglan.tasks.execute import Sandbox, shared_sandbox
from qinglan.tasks.item import Draw
from qinglan.tasks.probes import Probe, begins_with

NUM_CASES = 14
"""Inputs on which a program is tried, chosen so that programs for similar specifications fail."""


def passes_tests(task: CodeTask, text: str, sandbox: Sandbox | None = None) -> bool:
    """Return whether the first program in a text gives the right result for every case of a task.

    Args:
        task: what is asked for.
        text: what a model wrote.
        sandbox: where it runs; default: the process's own.
    """
    program = read_program(text)
    if not program:
        return False
    ran = (sandbox or shared_sandbox()).run(program, [case.arguments for case in task.cases])
    pairs = zip(task.cases, ran.results, strict=ran.status == "ran")
    return ran.status == "ran" and all(is_same(got, case.result) for case, got in pairs)


def _writing(draw: Draw, grade: CodeGrade, max_new_tokens: int) -> Probe:
    task = draw_task(Draw(draw.rng, held_out=True), grade, num_cases=NUM_CASES, separating=True)
    return Probe(task_text(task), lambda text: passes_tests(task, text), max_new_tokens)


def code_pass_rate(draw: Draw) -> Probe:
    """A program of one loop for a held-out composition passes its tests."""
    return _writing(draw, "basic", 130)


def code_pass_rate_hard(draw: Draw) -> Probe:
    """A program of two loops for a held-out composition passes its tests."""
    return _writing(draw, "hard", 180)


def quoting_code_line(draw: Draw) -> Probe:
    """A line of a numbered program, right or tampered with, quoted exactly."""
    task = draw_task(Draw(draw.rng, held_out=True))
    text = draw_program(draw, task)
    found = tamper(draw, text, task.cases) if draw.rng.random() < 0.5 else None
    lines = (found.program if found else text).splitlines()
    number = draw.rng.randrange(len(lines))
    beginning = numbered("\n".join(lines)) + f"\n line {number + 1}:"
    return Probe(beginning, lambda written: written.split("\n")[0].strip() == lines[number].strip())


def _judged(draw: Draw) -> tuple[str, bool]:
    task = draw_task(Draw(draw.rng, held_out=True), num_cases=12)
    text = draw_program(draw, task)
    found = tamper(draw, text, task.cases) if draw.rng.random() < 0.5 else None
    return f"{task_text(task)} {found.program if found else text}\n", found is None


def judging_programs(draw: Draw) -> Probe:
    """Does a program do what its specification says? The verdict must be right, and come at once."""
    beginning, is_right = _judged(draw)
    return Probe(f"{beginning} Verdict:", begins_with("correct" if is_right else "wrong"), 4)


def finding_faults(draw: Draw) -> Probe:
    """A tampered program's faulty line, quoted exactly in a review; none claimed in a right one."""
    task = draw_task(Draw(draw.rng, held_out=True), num_cases=12)
    text = draw_program(draw, task)
    found = tamper(draw, text, task.cases) if draw.rng.random() < 0.5 else None
    beginning = f"{task_text(task)} {found.program if found else text}\n Review:"
    expected = f"fault in: {found.fault.faulty}" if found else NO_FAULT
    return Probe(beginning, lambda written: written.split("\n")[0].strip() == expected)


CODE_PROBES: dict[str, Callable[[Draw], Probe]] = {
    "code_pass_rate": code_pass_rate,
    "code_pass_rate_hard": code_pass_rate_hard,
    "quoting_code_line": quoting_code_line,
    "judging_programs": judging_programs,
    "finding_faults": finding_faults,
}
"""The probes of code, beside those of `probes.py`."""
