"""The process in which model-written programs run (see `execute.py`): one fork for each program, limited and sealed.

Started as `python -I -S execute_worker.py` with an empty environment in an empty folder; imports nothing of Qinglan.
Reads one JSON request a line from standard input and answers each with one JSON line. In the fork, limits are set
and, on Linux, a seccomp filter (https://docs.kernel.org/userspace-api/seccomp_filter.html) is laid over it before the
program is compiled: of some 300 system calls it allows those that manage memory, write to open files and end.
"""

import builtins
import ctypes
import json
import os
import platform
import resource
import select
import signal
import sys
import time
from typing import Any, NoReturn

SAFE = (
    *("abs", "all", "any", "bool", "chr", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "int"),
    *("isinstance", "iter", "len", "list", "map", "max", "min", "next", "ord", "pow", "range", "repr", "reversed"),
    *("round", "set", "slice", "sorted", "str", "sum", "tuple", "zip", "True", "False", "None"),
    *("Exception", "ArithmeticError", "AssertionError", "AttributeError", "IndexError", "KeyError", "LookupError"),
    *("NameError", "NotImplementedError", "OverflowError", "RuntimeError", "StopIteration", "TypeError", "ValueError"),
    "ZeroDivisionError",
)
"""What a program may call, beside `print`, whose output is counted and thrown away."""
MAX_DEPTH = 8
"""Of lists within lists in a result."""
MAX_BITS = 4096
"""Of a number in a result."""
WALL_FACTOR, WALL_EXTRA = 10.0, 2.0
"""The time by the clock after which a fork is killed: CPU seconds times this, and this much more."""

SYSTEM_CALLS: dict[str, tuple[int, tuple[int, ...]]] = {
    # write mmap mprotect munmap brk rt_sigprocmask rt_sigreturn mremap madvise futex exit exit_group clock_gettime
    # getrandom
    "x86_64": (0xC000003E, (1, 9, 10, 11, 12, 14, 15, 25, 28, 202, 60, 231, 228, 318)),
    "aarch64": (0xC00000B7, (64, 222, 226, 215, 214, 135, 139, 216, 233, 98, 93, 94, 113, 278)),
}
"""For each machine its audit number and the numbers of the system calls that the filter allows."""
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER_MODE = 38, 22, 2
LOAD_WORD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000


class Instruction(ctypes.Structure):
    """One instruction of the filter (struct sock_filter)."""

    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class Filter(ctypes.Structure):
    """The filter (struct sock_fprog)."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction)))


def make_filter() -> Filter | None:
    """Return the filter of this machine: other system calls fail with "not permitted"; None where there is none."""
    if sys.platform != "linux" or platform.machine() not in SYSTEM_CALLS:
        return None
    machine, allowed = SYSTEM_CALLS[platform.machine()]
    lines = [(LOAD_WORD, 0, 0, 4), (JUMP_EQUAL, 1, 0, machine), (RETURN, 0, 0, KILL), (LOAD_WORD, 0, 0, 0)]
    for number in allowed:
        lines += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    lines.append((RETURN, 0, 0, REFUSE))
    instructions = (Instruction * len(lines))(*(Instruction(*line) for line in lines))
    return Filter(len(lines), instructions)


def seal(libc: Any, seccomp: Filter | None) -> bool:
    """Lay the filter over this process for good; return whether that worked."""
    if seccomp is None or libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(SET_SECCOMP, FILTER_MODE, ctypes.byref(seccomp), 0, 0) == 0)


def limit(seconds: float, max_bytes: int) -> None:
    """Limit CPU time, address space, files and processes of this process; signals that end it are left to do so."""
    for signal_number in (signal.SIGPROF, signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_DFL)
    for kind, most in (
        (resource.RLIMIT_AS, max_bytes),
        (resource.RLIMIT_CPU, int(seconds) + 2),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    signal.setitimer(signal.ITIMER_PROF, seconds)


def encoded(value: Any, depth: int = 0) -> Any:
    """Return a result as JSON that keeps lists and tuples apart. Raises `ValueError` for other types."""
    if type(value) is int and value.bit_length() > MAX_BITS:
        raise ValueError("a very large number")
    if value is None or type(value) in (bool, int, str, float):
        return value
    if type(value) in (list, tuple) and depth < MAX_DEPTH:
        return [type(value).__name__, *(encoded(one, depth + 1) for one in value)]
    raise ValueError(f"a {type(value).__name__}")


def counting_print(max_output: int) -> Any:
    """Return a `print` that throws its text away and raises once it has been given too much."""
    printed = 0

    def count(*values: Any, **_: Any) -> None:
        nonlocal printed
        printed += sum(len(str(value)) + 1 for value in values) + 1
        if printed > max_output:
            raise RuntimeError("too much output")

    return count


def run_program(request: dict[str, Any]) -> dict[str, Any]:
    """Run a program and the calls of a request; an exception is a result like others."""
    names: dict[str, Any] = {name: getattr(builtins, name) for name in SAFE}
    space: dict[str, Any] = {"__builtins__": names | {"print": counting_print(request["max_output"])}}
    try:
        exec(compile(request["program"], "program", "exec"), space)
        function = space[request["function"]]
    except BaseException as error:
        return {"status": "failed", "reason": type(error).__name__, "results": []}
    results = []
    for arguments in request["calls"]:
        try:
            results.append([True, encoded(function(*arguments))])
        except BaseException as error:
            results.append([False, type(error).__name__])
    return {"status": "ran", "reason": "", "results": results}


def in_fork(request: dict[str, Any], pipe: int, libc: Any, seccomp: Filter | None) -> NoReturn:
    """Be the process of one program: give up everything but a pipe, run, write the results, end."""
    os.dup2(pipe, 3)
    os.closerange(4, 256)
    for number in (0, 1, 2):
        os.close(number)
    limit(request["seconds"], request["max_bytes"])
    seal(libc, seccomp)
    answer = json.dumps(run_program(request)).encode()
    done = 0
    while done < len(answer):
        done += os.write(3, answer[done : done + 65536])
    os._exit(0)


def attend(child: int, pipe: int, request: dict[str, Any]) -> dict[str, Any]:
    """Wait for a fork, but not for ever; return its answer, or why there is none."""
    deadline = time.monotonic() + WALL_FACTOR * request["seconds"] + WALL_EXTRA
    answer, reason = b"", ""
    while not reason:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            reason = "timeout"
            break
        part = os.read(pipe, 65536)
        if not part:
            break
        answer += part
        if len(answer) > request["max_output"]:
            reason = "output"
    if reason:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not reason and os.WIFSIGNALED(status):
        reason = "timeout" if os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU) else "crash"
    if not reason and os.WEXITSTATUS(status) != 0:
        reason = "crash"
    if reason:
        return {"status": "failed", "reason": reason, "results": []}
    found: dict[str, Any] = json.loads(answer)
    return found


def main() -> None:
    """Answer requests until standard input ends; the first line says whether forks are sealed."""
    libc = ctypes.CDLL(None, use_errno=True)
    seccomp = make_filter()
    tried = os.fork()
    if tried == 0:
        os._exit(0 if seal(libc, seccomp) else 1)
    print(json.dumps({"sealed": os.waitpid(tried, 0)[1] == 0}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                in_fork(request, writer, libc, seccomp)
            except BaseException:
                os._exit(1)
        os.close(writer)
        answer = attend(child, reader, request)
        os.close(reader)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
