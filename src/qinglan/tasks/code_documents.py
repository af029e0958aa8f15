"""Documents of the corpus about code: programs, their tests, verdicts, bug reports, quoted lines.

A specification can hardly be predicted and counts 0.1 in the loss, code 1, and the words of code that hold a constant
taken from the specification 3; single words in which a document's sense lies (verdicts, line numbers) count 5. Tampered
programs count 0.1: what stands before them does not tell that they are.

Layout: "Task: <specification>", then the program from `def` on, every line ended by a line feed, then, separated by a
space, what is said of it. `read_program` is the way back from text to a program.
"""

import re
from collections.abc import Callable

from qinglan.tasks.code import CodeGrade, is_held_out, specification
from qinglan.tasks.code_cases import CodeTask, draw_task, failed_cases, is_short, load, neighbours, outcome
from qinglan.tasks.code_cases import is_same as is_same_result
from qinglan.tasks.code_faults import Tampered, tamper
from qinglan.tasks.code_oracle import expected
from qinglan.tasks.code_phrases import CORRECT, RESULT, SPECIFICATION, TAMPERED, WRONG, code_spans, fragments, phrases
from qinglan.tasks.code_styles import draw_style, write_program
from qinglan.tasks.document import ASSISTANT, EOS, USER, VERDICT, Document, Span
from qinglan.tasks.item import Draw

HARD_SHARE = 0.3
"""Share of hard programs in documents about one program."""
MAX_PIECES = 225
"""Documents longer than this are drawn again: with begin and end of text they fit the context of 256 tokens."""
PIECE = re.compile(r"\d| ?[A-Za-z_]+| ?[^\sA-Za-z_\d]+|\s+")


def num_pieces(text: str) -> int:
    """Return about how many tokens a text has: words, marks, digits and stretches of white space."""
    return len(PIECE.findall(text))


def read_program(text: str) -> str:
    """Return the first program in a text: its `def` line and the indented lines after it; empty if there is none.

    The one way from what a model writes to what is run; text around the program (a reply's first words, tests and
    reviews after it) does not matter.
    """
    found = re.search(r"\bdef \w+\(.*(\n    .*)*", text)
    return "\n".join(line.rstrip() for line in found[0].split("\n")) if found else ""


def constants_of(task: CodeTask) -> set[str]:
    """Return the constants of a specification as programs write them."""
    found = {str(one) for part in task.composition.parts.values() for one in part.constants}
    if isinstance(task.composition.fallback, int):
        found.add(str(task.composition.fallback))
    return found


def draw_grade(draw: Draw) -> CodeGrade:
    """Draw the grade of a document about one program."""
    return "hard" if draw.rng.random() < HARD_SHARE else "basic"


def draw_program(draw: Draw, task: CodeTask) -> str:
    """Draw a right program for a task, in some style."""
    return write_program(task.composition, draw_style(draw, task.composition.kind))


def numbered(program: str) -> str:
    """Return a program with a number before each line."""
    return "\n".join(f"{number} {line}" for number, line in enumerate(program.splitlines(), start=1))


def task_text(task: CodeTask) -> str:
    """Return the beginning of every document about one task."""
    return f"Task: {task.specification}"


def fitting(make: Callable[[Draw], Document]) -> Callable[[Draw], Document]:
    """Return a function that draws documents until one fits into the context."""

    def drawn(draw: Draw) -> Document:
        while True:
            document = make(draw)
            if num_pieces(" ".join(span.text for span in document)) <= MAX_PIECES:
                return document

    drawn.__doc__ = make.__doc__
    return drawn


def program(draw: Draw) -> Document:
    """A specification and a program for it; one in four as a conversation."""
    task = draw_task(draw, draw_grade(draw))
    text = draw_program(draw, task)
    if draw.rng.random() < 0.25:
        return [
            Span(f"{USER}{task.specification}{ASSISTANT}", SPECIFICATION),
            *code_spans(f"{text}{EOS}", constants_of(task)),
        ]
    return [Span(task_text(task), SPECIFICATION), *code_spans(f"{text}\n", constants_of(task))]


def program_with_tests(draw: Draw) -> Document:
    """A program and a few calls with what they must return and what they do; tampered programs fail one at least."""
    rng = draw.rng
    task = draw_task(draw, draw_grade(draw), num_cases=12)
    text = draw_program(draw, task)
    tampered = tamper(draw, text, task.cases) if rng.random() < 0.5 else None
    shown = tampered.program if tampered else text
    failing = [case for case, got in failed_cases(shown, task.cases) if _is_shown(got)]
    cases = rng.sample(sorted(task.cases, key=lambda case: num_pieces(case.call))[:6], 3)
    if failing and not any(case in cases for case in failing):
        cases[rng.randrange(3)] = rng.choice(failing)
    function = load(shown)
    spans = [
        Span(task_text(task), SPECIFICATION),
        *code_spans(f"{shown}\n", constants_of(task), TAMPERED if tampered else 1.0),
        Span("Tests:", SPECIFICATION),
    ]
    for case in cases:
        got = outcome(function, case.arguments)
        if not _is_shown(got):
            continue
        is_right = is_same_result(got, case.result)
        spans += [Span(f"{case.call} must be", SPECIFICATION), Span(f"{case.result!r}", RESULT)]
        spans += [Span(f"and is {got!r}:", RESULT), Span("passed\n" if is_right else "failed\n", VERDICT)]
    all_right = not any(not is_same_result(outcome(function, case.arguments), case.result) for case in cases)
    return [*spans, Span("tests:", RESULT), Span("passed." if all_right else "failed.", VERDICT)]


def _is_shown(got: object) -> bool:
    """Return whether a result can be written into a document: no exception, nothing long."""
    return isinstance(got, int | str | list) and not isinstance(got, bool) and is_short(got)


def specifications(draw: Draw) -> Document:
    """A program and several specifications, each with its verdict; wrong ones differ in one operation or constant."""
    rng = draw.rng
    task = draw_task(draw, draw_grade(draw), num_cases=12)
    spans = [Span("Program:", SPECIFICATION), *code_spans(f"{draw_program(draw, task)}\n", set(), TAMPERED)]
    others = [
        other
        for other in neighbours(draw, task.composition, 6)
        if not is_held_out(other)
        and any(not is_same_result(expected(other, case.arguments), case.result) for case in task.cases)
    ]
    for _ in range(3):
        is_right = not others or rng.random() < 0.5
        composition = task.composition if is_right else rng.choice(others)
        said = specification(draw, composition)
        spans += [Span(f"Task: {said}", SPECIFICATION), Span(CORRECT if is_right else WRONG, VERDICT)]
    return spans


def line_verdicts(draw: Draw) -> Document:
    """A program in which every line has its verdict right after it."""
    task = draw_task(draw, draw_grade(draw))
    text = draw_program(draw, task)
    found = tamper(draw, text, task.cases) if draw.rng.random() < 0.6 else None
    fault = found.fault.line if found else 0
    spans = [Span(task_text(task), SPECIFICATION), Span("Line by line:", SPECIFICATION)]
    for number, line in enumerate((found.program if found else text).splitlines(), start=1):
        spans += code_spans(f"{line.strip()} #", constants_of(task), TAMPERED if found else 1.0)
        spans.append(Span("wrong\n" if number == fault else "ok\n", VERDICT if number == fault else 0.4 * VERDICT))
    return spans


def judged_programs(draw: Draw) -> Document:
    """A specification and one or two programs, each followed by the verdict whether it does what is asked."""
    task = draw_task(draw, "basic" if draw.rng.random() < 0.7 else "hard")
    spans = [Span(task_text(task), SPECIFICATION)]
    for _ in range(2):
        text = draw_program(draw, task)
        found = tamper(draw, text, task.cases) if draw.rng.random() < 0.5 else None
        more = [
            *code_spans(f"{found.program if found else text}\n", constants_of(task), TAMPERED if found else 1.0),
            Span("Verdict:", SPECIFICATION),
            Span(WRONG if found else CORRECT, VERDICT),
        ]
        if len(spans) == 1 or num_pieces(" ".join(span.text for span in spans + more)) <= MAX_PIECES:
            spans += more
    return spans


def program_verdicts(draw: Draw) -> Document:
    """Verdicts on code right after what is judged: phrases, specifications, lines, whole programs."""
    make = draw.rng.choices((fragments, specifications, line_verdicts, judged_programs), (2, 2, 3, 3))[0]
    return make(draw)


NO_FAULT = "no fault found."


def report_spans(found: Tampered | None, is_numbered: bool) -> Document:
    """Return the review of a program: the faulty line quoted, what is wrong with it, how it should read."""
    if found is None:
        return [Span(NO_FAULT, VERDICT)]
    fault = found.fault
    where = [Span("fault", VERDICT)]
    where += [Span("in line", 1.0), Span(f"{fault.line}:", VERDICT)] if is_numbered else [Span("in:", 1.0)]
    return [
        *where,
        Span(f"{fault.faulty}\n", 2.0),
        Span(fault.description, 2.0),
        Span("Fix:", 1.0),
        Span(f"{fault.right}\n", 2.0),
    ]


def bug_report(draw: Draw) -> Document:
    """A program, in seven of ten cases tampered with, numbered or plain, and its review."""
    task = draw_task(draw, draw_grade(draw))
    text = draw_program(draw, task)
    found = tamper(draw, text, task.cases) if draw.rng.random() < 0.7 else None
    is_numbered = draw.rng.random() < 0.5
    shown = found.program if found else text
    return [
        Span(task_text(task), SPECIFICATION),
        *code_spans(f"{numbered(shown) if is_numbered else shown}\n", constants_of(task), TAMPERED if found else 1.0),
        Span("Review:", SPECIFICATION),
        *report_spans(found, is_numbered),
    ]


def line_quotes(draw: Draw) -> Document:
    """A program, numbered or not, then some of its lines quoted by number, or changed in one place."""
    rng = draw.rng
    task = draw_task(draw, draw_grade(draw))
    text = draw_program(draw, task)
    found = tamper(draw, text, task.cases)
    shown = found.program if found and rng.random() < 0.5 else text
    lines = [line.strip() for line in shown.splitlines()]
    spans = code_spans(f"{numbered(shown) if rng.random() < 0.6 else shown}\n", set(), TAMPERED)
    for number in rng.sample(range(len(lines)), min(len(lines), rng.randrange(2, 5))):
        spans += [Span(f"line {number + 1}:", SPECIFICATION), Span(f"{lines[number]}\n", 1.5)]
    if found and found.fault.category != "missing_guard":
        first, second = found.fault.faulty, found.fault.right
        if shown == text:
            first, second = second, first
        spans += [Span("change:", SPECIFICATION), Span(f"{first} -> {second}\n")]
    return spans


CODE_MIX: dict[str, tuple[float, Callable[[Draw], Document]]] = {
    "program": (0.38, fitting(program)),
    "phrases": (0.10, fitting(phrases)),
    "program_with_tests": (0.09, fitting(program_with_tests)),
    "program_verdicts": (0.17, fitting(program_verdicts)),
    "bug_report": (0.14, fitting(bug_report)),
    "line_quotes": (0.12, fitting(line_quotes)),
}
"""Every kind of document about code with its share among them."""
