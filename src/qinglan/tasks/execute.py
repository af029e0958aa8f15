"""The sandbox for model-written programs: results come out, and a program can neither harm, nor hang, nor peek.

Four layers, the first two in any case and everywhere:

1. The text is refused before it runs if it imports, names anything private (`_x`, `__class__`), formats by attribute
   or defines a class; it sees a short list of harmless builtins, without `open`, `eval`, `getattr` or `type`.
2. It runs in another process (`python -I -S`, empty environment, an empty folder of its own), forked anew for each
   program, with limits on CPU time, address space, size of files, processes and what it returns, and is killed after
   a time by the clock, whatever it does.
3. On Linux (x86-64, arm64) a seccomp filter leaves the fork no system calls but those for memory, for writing to its
   one open file, the pipe of results, and for its end: no file can be opened, no socket, no process, nobody signalled.
4. What must come out never goes in: a program that got round the rest could return what it likes, not a verdict.

What it does not protect from: holes in the kernel or in the interpreter, side channels, and, where there is no filter
(`Sandbox.is_sealed` says so; other systems, some containers), a program that breaks out of the restricted builtins;
it then has the rights of the user, within the limits. Run programs of strangers in a container or a machine of their
own.
"""

import ast
import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from qinglan.core.errors import InputError

WORKER = Path(__file__).with_name("execute_worker.py")
MAX_PROGRAM = 5_000
"""Characters of a program; longer ones are refused unread."""
FORMATTING = ("format", "format_map")
"""Methods that reach attributes by their names in a text."""
FORBIDDEN = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.AsyncFunctionDef, ast.Await, ast.Global, ast.Nonlocal)
MAX_OUTPUT = 65_536
"""Bytes of results."""


class Failure(NamedTuple):
    """What a call gives that does not return: the exception's name, or why the whole program failed."""

    reason: str


class Execution(NamedTuple):
    """What became of a program."""

    status: Literal["ran", "refused", "failed"]
    """ran: every call has a result; refused: by its text; failed: its text or a call broke off the whole program."""
    reason: str
    """What refused or broke it off: a name, "timeout", "output", "crash", or an exception."""
    results: tuple[Any, ...]
    """Of every call what it returned, or a `Failure`; empty unless it ran."""


def refusal(program: str) -> str:
    """Return why a program is refused by its text; empty if it is not."""
    if len(program) > MAX_PROGRAM:
        return f"longer than {MAX_PROGRAM} characters"
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return type(error).__name__
    for node in ast.walk(tree):
        if isinstance(node, FORBIDDEN):
            return type(node).__name__
        for field in ("id", "attr", "arg", "name", "kwd_attrs"):
            name = getattr(node, field, None)
            if isinstance(name, str) and (name.startswith("_") or (field == "attr" and name in FORMATTING)):
                return f"the name {name}"
    return ""


class Sandbox:
    """A process that runs programs one after the other; use it in a `with` block.

    Args:
        seconds: CPU time of one program with all its calls.
        max_bytes: address space of a program, the interpreter's own 20 MB or so included.
    """

    def __init__(self, seconds: float = 0.5, max_bytes: int = 256 * 2**20) -> None:
        self.seconds, self.max_bytes = seconds, max_bytes
        self.folder = tempfile.TemporaryDirectory(prefix="qinglan-sandbox-")
        self.buffer = b""
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and remove its folder."""
        self._stop()
        self.folder.cleanup()

    def run(self, program: str, calls: Sequence[tuple[Any, ...]], function: str = "f") -> Execution:
        """Run a program and call its function with each tuple of arguments.

        Arguments and results are None, numbers, texts and lists; results may be tuples too. Never raises for anything
        that a program does.
        """
        reason = refusal(program)
        return Execution("refused", reason, ()) if reason else self.run_unread(program, calls, function)

    def run_unread(self, program: str, calls: Sequence[tuple[Any, ...]], function: str = "f") -> Execution:
        """Run a program whose text was not looked at: the first layer left out, as tests of the others need it."""
        request = {
            "program": program,
            "function": function,
            "calls": [list(arguments) for arguments in calls],
            "seconds": self.seconds,
            "max_bytes": self.max_bytes,
            "max_output": MAX_OUTPUT,
        }
        try:
            answer = self._ask(json.dumps(request))
        except BaseException:  # interrupted: the answer to this request must not be taken for that to the next
            self._restart()
            raise
        if answer is None:  # the worker itself is gone or silent: nothing of it is trusted any more
            self._restart()
            return Execution("failed", "crash", ())
        results = tuple(_decoded(value) if ok else Failure(str(value)) for ok, value in answer["results"])
        if answer["status"] == "ran" and len(results) == len(calls):
            return Execution("ran", "", results)
        return Execution("failed", str(answer["reason"]) or "crash", ())

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.folder.name,
            env={},
            start_new_session=True,
        )
        self.buffer = b""
        hello = self._answer(30.0)
        if hello is None:
            self._stop()
            raise InputError(f"sandbox: {sys.executable} did not start {WORKER.name}; programs can not be run here")
        self.is_sealed = bool(hello["sealed"])

    def _restart(self) -> None:
        self._stop()
        self._start()

    def _stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of what a dead worker did not read
                    pipe.close()

    def _ask(self, line: str) -> dict[str, Any] | None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None
        return self._answer(20.0 * self.seconds + 10.0)

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """Return the next line of the worker; None if it ended or takes longer."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            part = os.read(self.process.stdout.fileno(), 65_536)
            if not part:
                return None
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            return None
        return found


def _decoded(value: Any) -> Any:
    """Return a result from its JSON, where lists and tuples carry their kind in front."""
    if not isinstance(value, list):
        return value
    members = [_decoded(one) for one in value[1:]]
    return tuple(members) if value[0] == "tuple" else members


def shared_sandbox() -> Sandbox:
    """Return the sandbox of this process, started at its first use and ended with it; a fork gets one of its own."""
    return _sandbox_of(os.getpid())


@cache
def _sandbox_of(process: int) -> Sandbox:
    sandbox = Sandbox()
    atexit.register(lambda: sandbox.close() if os.getpid() == process else None)
    return sandbox
