"""The sandbox: right results come out; loops, bombs, files, imports and escapes do not."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qinglan.tasks.execute import MAX_PROGRAM, Execution, Failure, Sandbox, refusal, shared_sandbox
from qinglan.tasks.execute_worker import SYSTEM_CALLS, encoded, make_filter

SUM = "def f(xs):\n    total = 0\n    for x in xs:\n        total += x\n    return total"

ESCAPE = """
def f(what, *arguments):
    for kind in ().__class__.__base__.__subclasses__():
        if kind.__name__ == '_wrap_close':
            return kind.__init__.__globals__[what](*arguments)
"""
"""The well-known way round restricted builtins: to the functions of `os` by way of the class of its pipes."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(seconds=0.3) as box:
        yield box


def body(*lines: str) -> str:
    return "\n".join(["def f(xs):", *(f"    {line}" for line in lines)])


def test_right_and_wrong_results_come_out_as_they_are(sandbox: Sandbox) -> None:
    assert sandbox.run(SUM, [([1, 2, 3],), ([],)]) == Execution("ran", "", (6, 0))
    found = sandbox.run(body("return (1, [True, None, 'a', 1.5, (2,)])"), [([],)]).results[0]
    assert found == (1, [True, None, "a", 1.5, (2,)]) and type(found[1][0]) is bool
    assert sandbox.run("def g(a, b):\n    return a - b", [(5, 3)], function="g").results == (2,)
    # Arguments are copies: what a program does to them stays in the sandbox.
    given = [3, 1, 2]
    assert sandbox.run(body("xs.sort()", "return xs"), [(given,)]).results == ([1, 2, 3],)
    assert given == [3, 1, 2]


def test_exceptions_are_results_and_other_calls_go_on(sandbox: Sandbox) -> None:
    ran = sandbox.run(body("return 6 // xs[0]"), [([2],), ([0],), ([],)])
    assert ran.results == (3, Failure("ZeroDivisionError"), Failure("IndexError"))
    assert sandbox.run(body("return f(xs)"), [([],)]).results == (Failure("RecursionError"),)
    assert sandbox.run("x = 1 // 0", [([],)]) == Execution("failed", "ZeroDivisionError", ())
    assert sandbox.run("x = 1", [([],)]) == Execution("failed", "KeyError", ())
    for strange in ("{1}", "len", "(x for x in xs)", "10 ** 5000", "[[[[[[[[[[1]]]]]]]]]]"):
        assert sandbox.run(body(f"return {strange}"), [([],)]).results == (Failure("ValueError"),)


@pytest.mark.parametrize(
    "lines",
    [
        ("while True:", "    pass"),
        ("return 9 ** 9 ** 9",),
        ("while True:", "    try:", "        f(xs)", "    except Exception:", "        pass"),
    ],
    ids=["loop", "power", "caught"],
)
def test_endless_programs_end(sandbox: Sandbox, lines: tuple[str, ...]) -> None:
    started = time.monotonic()
    assert sandbox.run(body(*lines), [([],), ([1],)]) == Execution("failed", "timeout", ())
    assert time.monotonic() - started < 10.0  # 0.3 s of CPU time, on a busy machine
    assert sandbox.run(SUM, [([1],)]).results == (1,)


def test_memory_is_limited(sandbox: Sandbox) -> None:
    assert sandbox.run(body("return len('a' * 10 ** 12)"), [([],)]).results == (Failure("MemoryError"),)
    with Sandbox(seconds=20.0) as patient:
        ran = patient.run(body("all = []", "while True:", "    all.append('a' * 1000000)"), [([],)])
    assert ran.results == (Failure("MemoryError"),)


def test_output_is_limited(sandbox: Sandbox) -> None:
    assert sandbox.run(body("return 'a' * 100000"), [([],)]) == Execution("failed", "output", ())
    assert sandbox.run(body("while True:", "    print('a' * 1000)"), [([],)]).results == (Failure("RuntimeError"),)
    assert sandbox.run(body("print('hello')", "return 1"), [([],)]).results == (1,)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os\n" + SUM, "Import"),
        (body("from os import fork", "return fork()"), "ImportFrom"),
        (body("return ().__class__"), "the name __class__"),
        (body("return __builtins__"), "the name __builtins__"),
        (body("return '{0.__class__}'.format(xs)"), "the name format"),
        ("class A:\n    pass", "ClassDef"),
        ("def f(_x):\n    return 1", "the name _x"),
        (body("return 1 +"), "SyntaxError"),
        ("x = " + "-" * 4000 + "1", "RecursionError"),
        ("x = 1\n" * MAX_PROGRAM, f"longer than {MAX_PROGRAM} characters"),
        ("def f(xs):\n    return '\x00'", "SyntaxError"),
    ],
)
def test_programs_are_refused_by_their_text(sandbox: Sandbox, program: str, reason: str) -> None:
    assert sandbox.run(program, [([],)]) == Execution("refused", reason, ())


@pytest.mark.parametrize("name", ["open", "eval", "exec", "getattr", "type", "globals", "input", "vars", "breakpoint"])
def test_dangerous_builtins_are_not_there(sandbox: Sandbox, name: str) -> None:
    assert refusal(body(f"return {name}('x')")) == ""
    assert sandbox.run(body(f"return {name}('x')"), [([],)]).results == (Failure("NameError"),)


def test_who_escapes_from_the_builtins_still_can_do_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    assert sandbox.run(ESCAPE, [("getpid",)]).status == "refused"
    if not sandbox.is_sealed:
        pytest.skip("no seccomp filter on this machine: the escape would succeed, as the documentation says")
    victim = tmp_path / "victim"
    victim.write_text("intact")
    flags = os.O_CREAT | os.O_WRONLY
    attempts = [
        ("listdir", "/"),
        ("open", str(victim), 0),
        ("open", "new", flags, 0o600),
        ("unlink", str(victim)),
        ("fork",),
        ("execv", "/bin/true", ["true"]),
        ("kill", os.getpid(), 9),
        ("kill", os.getppid(), 0),
        ("dup", 3),
    ]
    results = sandbox.run_unread(ESCAPE, [tuple(attempt) for attempt in attempts]).results
    assert results == (Failure("PermissionError"),) * len(attempts)
    assert victim.read_text() == "intact" and not os.listdir(sandbox.folder.name)
    # It sees no environment, but for what the interpreter itself sets.
    environment = ESCAPE.replace("[what](*arguments)", "[what]").replace("return kind", "return list(kind") + ")"
    environment = environment.replace("[what]\n)", "[what])")
    assert set(sandbox.run_unread(environment, [("environ",)]).results[0]) <= {"LC_CTYPE"}


def test_fork_bombs_do_not_go_off(sandbox: Sandbox) -> None:
    if not sandbox.is_sealed:
        pytest.skip("no seccomp filter on this machine")
    bomb = ESCAPE + "\ng = f\n\ndef bomb(n):\n    for i in range(n):\n        g('fork')"
    assert sandbox.run_unread(bomb, [(1000,)], function="bomb").results == (Failure("PermissionError"),)


def test_programs_do_not_see_each_other(sandbox: Sandbox) -> None:
    assert sandbox.run("memory = []\n\ndef f(x):\n    memory.append(x)\n    return memory", [(1,), (2,)]).results[
        1
    ] == [1, 2]
    assert sandbox.run(body("return memory"), [([],)]).results == (Failure("NameError"),)


def test_a_killed_worker_is_replaced(sandbox: Sandbox) -> None:
    sandbox.process.kill()
    assert sandbox.run(SUM, [([1],)]) == Execution("failed", "crash", ())
    assert sandbox.run(SUM, [([1],)]).results == (1,)


def test_an_interrupted_answer_is_not_taken_for_the_next(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    answer = sandbox._answer
    monkeypatch.setattr(
        sandbox, "_start", lambda: (monkeypatch.setattr(sandbox, "_answer", answer), Sandbox._start(sandbox))
    )
    monkeypatch.setattr(sandbox, "_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sandbox.run(SUM, [([1],)])
    assert sandbox.run(SUM, [([2],)]).results == (2,)


def test_a_closed_sandbox_leaves_nothing() -> None:
    with Sandbox() as box:
        pid, folder = box.process.pid, Path(box.folder.name)
        assert folder.is_dir()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_shared_sandbox_for_a_process() -> None:
    assert shared_sandbox() is shared_sandbox()
    assert shared_sandbox().run(SUM, [([4],)]).results == (4,)


def test_the_filter_lists_what_it_allows_on_this_machine() -> None:
    if sys.platform == "linux" and os.uname().machine in SYSTEM_CALLS:
        found = make_filter()
        assert found is not None
        number, allowed = SYSTEM_CALLS[os.uname().machine]
        lines = [found.instructions[i] for i in range(found.length)]
        assert lines[1].k == number and len(lines) == 5 + 2 * len(allowed)
    assert encoded([1, (2,)]) == ["list", 1, ["tuple", 2]]
