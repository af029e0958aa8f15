"""A decoder's arithmetic between its matrix products on a CPU, by kernels of our own (`kernels_cpp/`).

They are compiled where they run, once, and kept in the user's cache. They need Linux and g++, since their threads are
to be PyTorch's own. Anywhere else the same numbers, up to rounding, come from PyTorch's operations (`attention.py`).

Letters: N tokens, R runs, B rows, S slots, C columns of a slot, H heads, G heads of keys, D units of a head or a row.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ctypes import c_float, c_long, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.autograd.function import once_differentiable

SOURCES = Path(__file__).with_name("kernels_cpp")
COMMAND = ("g++", "-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
ROWS_OF_A_PART = 64
"""As in layers.cpp."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class _Attention(ctypes.Structure):
    _fields_ = [*((name, c_long) for name in ("runs", "heads", "groups", "units")), ("scale", c_float)]


class _Decoding(ctypes.Structure):
    _fields_ = [
        *((name, c_long) for name in ("rows", "heads", "groups", "units", "capacity")),
        *((name, c_long) for name in ("query_row", "key_row", "value_row")),
        ("scale", c_float),
        ("epsilon", c_float),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [*((name, c_long) for name in ("rows", "units", "bf16_added", "bf16_output")), ("epsilon", c_float)]


class _Gate(ctypes.Structure):
    _fields_ = [(name, c_long) for name in ("rows", "units", "gate_row", "up_row")]


class Runs(NamedTuple):
    """Tokens in one list: runs, outside of which no token sees any. Numbers count from the start of a token's run.

    A token sees the run's first `shared` tokens, and those from `own` to itself: in a text of its own nothing is
    shared; several completions behind one prompt share that, and each begins its own.
    """

    starts: Int32[Tensor, " R+1"]
    """Where each run begins, and the end of the last."""
    own: Int32[Tensor, " N"]
    shared: Int32[Tensor, " N"]

    @staticmethod
    def of(lengths: Sequence[int]) -> "Runs":
        """Return texts of these lengths one after the other."""
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        nothing = torch.zeros(sum(lengths), dtype=torch.int32)
        return Runs(starts, nothing, nothing)

    def with_filler(self, num_tokens: int) -> "Runs":
        """Return the runs with one more, of tokens that only fill up the list."""
        if num_tokens == 0:
            return self
        starts = torch.cat([self.starts, self.starts[-1:] + num_tokens])
        alone = torch.arange(num_tokens, dtype=torch.int32)  # each sees itself, which costs least
        return Runs(starts, torch.cat([self.own, alone]), F.pad(self.shared, (0, num_tokens)))


class Rotation(NamedTuple):
    """Cosines and sines of each token's position."""

    cos: Float[Tensor, "*n D"]
    sin: Float[Tensor, "*n D"]

    def of_units(self, units: int) -> "Rotation":
        """Return them as kernels read them. Raises `ValueError` if they are not of as many units as a head."""
        if self.cos.shape[-1] != units or self.sin.shape != self.cos.shape:
            raise ValueError(f"rotation of {self.cos.shape[-1]} units, heads of {units}")
        return Rotation(*(part.contiguous().float() for part in self))


def has_compiler() -> bool:
    """Return True where kernels are to be had: on Linux with g++."""
    return sys.platform == "linux" and shutil.which(COMMAND[0]) is not None


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where there is no compiler, or where it fails, which is said."""
    if not has_compiler():
        return None
    try:
        path = _path()
        if path.is_file():
            with contextlib.suppress(OSError):  # damaged: compiled anew
                return _loaded(path)
        _compile(path)
        return _loaded(path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        lines = (said if isinstance(said, str) else str(error)).strip().splitlines() or [repr(error)]
        reason = next((line for line in lines if "error" in line), lines[0])
        print(f"models run without compiled kernels, slower: {reason}", file=sys.stderr)
        return None


def _path() -> Path:
    """Return where the kernels are kept that this source, compiler and processor make."""
    version = subprocess.run([COMMAND[0], "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    features = sorted({line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features", "model name"))})
    key = [*(source.read_text(encoding="utf-8") for source in _sources("*")), *COMMAND, version, *features]
    name = hashlib.sha256("\n".join([*key, platform.machine()]).encode()).hexdigest()[:20]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qinglan" / "kernels" / f"{name}.so"


def _sources(kind: str) -> list[Path]:
    return sorted(path for path in SOURCES.glob(kind) if path.suffix in (".cpp", ".h"))


def _compile(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as scratch:  # others may compile too
        made = Path(scratch) / path.name
        command = [*COMMAND, "-o", str(made), *map(str, _sources("*.cpp"))]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        made.replace(path)


def _loaded(path: Path) -> ctypes.CDLL:
    """Return the file's functions. Raises `RuntimeError` if they would start threads beside PyTorch's."""
    kernels, num_threads = ctypes.CDLL(str(path)), torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads + 1)
        if kernels.num_threads() != num_threads + 1:
            raise RuntimeError("PyTorch has an OpenMP of its own here, whose threads they could not share")
    finally:
        torch.set_num_threads(num_threads)
    return kernels


def are_there() -> bool:
    """Return True if kernels may be called: they are compiled, and no graph is being made, which cannot hold them."""
    return library() is not None and not torch.compiler.is_compiling()


def attend(
    query: Float[Tensor, "N H D"],
    key: Float[Tensor, "N G D"],
    value: Float[Tensor, "N G D"],
    runs: Runs,
    rotation: Rotation,
    scale: float,
) -> Float[Tensor, "N H D"]:
    """Return softmax(scale Q K^T + mask) V with queries and keys turned by their positions."""
    mixed: Tensor = _run(_Attend, query, key, value, runs, rotation, scale)
    return mixed


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: Runs, rotation: Rotation, scale: float
    ) -> Tensor:
        query, key, value = (states.contiguous().to(query.dtype) for states in (query, key, value))
        rotation = rotation.of_units(query.shape[-1])
        call = _Attention(len(runs.starts) - 1, *query.shape[1:2], *key.shape[1:], scale)
        output, log_sums = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        _call(f"attend_{DTYPES[query.dtype]}", call, *runs, *rotation, query, key, value, output, log_sums)
        if ctx is not None:
            ctx.save_for_backward(query, key, value, log_sums)
            ctx.call, ctx.shared = call, (*runs, *rotation)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_sums = ctx.saved_tensors
        found = [torch.empty_like(states) for states in (query, key, value)]
        arguments = (query, key, value, gradient.contiguous(), log_sums, *found)
        _call(f"attend_backward_{DTYPES[query.dtype]}", ctx.call, *ctx.shared, *arguments)
        return *found, None, None, None


def decode(
    heads: Sequence[Float[Tensor, "B 1 _"]],
    buffers: Sequence[Float[Tensor, "S G C D"]],
    positions: Int[Tensor, "B 1"],
    rotation: Rotation,
    norms: tuple[Tensor, Tensor, float] | None,
    scale: float,
) -> Float[Tensor, "B 1 HD"]:
    """Store the keys and values of each row's new token, and return what its queries read of its row.

    Args:
        heads: queries, keys and values of the new tokens as the matrices give them.
        buffers: keys and values of all slots, as precise as `heads`; row b is slot b, written at its position.
        positions: columns that the rows have come to.
        rotation: of these positions, [B 1 D].
        norms: weights of queries' and keys' norms, and their epsilon.
        scale: of scores.
    """
    query, key, value = (_rows_of(states[:, 0].to(buffers[0].dtype)) for states in heads)
    groups, capacity, units = buffers[0].shape[1:]
    output = query.new_empty(len(query), 1, query.shape[1])
    query_norm, key_norm, epsilon = norms or (None, None, 0.0)
    call = _Decoding(
        *(len(query), query.shape[1] // units, groups, units, capacity),
        *(states.stride(0) for states in (query, key, value)),
        scale,
        epsilon,
    )
    weights = (None if norm is None else norm.float() for norm in (query_norm, key_norm))
    arguments = (positions.contiguous(), query, key, value, *weights, *rotation.of_units(units), *buffers, output)
    _call(f"decode_{DTYPES[query.dtype]}", call, *arguments)
    return output


def _rows_of(states: Tensor) -> Tensor:
    """Return states whose rows may stand apart, but not the numbers of a row."""
    return states if states.stride(-1) == 1 else states.contiguous()


def add_normalize(
    states: Float[Tensor, "*n D"], added: Float[Tensor, "*n D"] | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "*n D"], Float[Tensor, "*n D"]]:
    """Return states + added, in fp32, and their RMS norm in `dtype`; without `added` the states as they are."""
    weight = weight.float()
    if added is None:
        return states, _run(_Normalize, states, weight, eps, dtype)
    found: tuple[Tensor, Tensor] = _run(_AddNormalize, states, added, weight, eps, dtype)
    return found


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        states = states.contiguous()
        scales, normed = states.new_empty(states.shape[:-1], dtype=torch.float32), torch.empty_like(states, dtype=dtype)
        call = _norm_call(states, states.dtype, dtype, eps)
        _call("norm", call, None, states, weight, None, scales, normed)
        if ctx is not None:
            ctx.save_for_backward(states, weight, scales)
            ctx.call = call
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, scales = ctx.saved_tensors
        to_states, to_weight = torch.empty_like(states), _parts_of(weight, scales, ctx.needs_input_grad[1])
        given = (states, ctx.call.bf16_added, weight, scales, gradient.contiguous(), None)
        _call("norm_backward", ctx.call, *given, None, to_states, to_weight)
        return to_states, None if to_weight is None else to_weight.sum(0), None, None


class _AddNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, added: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        states, added = states.contiguous(), added.contiguous()
        scales, normed = states.new_empty(states.shape[:-1]), torch.empty_like(states, dtype=dtype)
        sums, call = torch.empty_like(states), _norm_call(states, added.dtype, dtype, eps)
        _call("norm", call, states, added, weight, sums, scales, normed)
        if ctx is not None:
            ctx.save_for_backward(sums, weight, scales)
            ctx.call, ctx.added_dtype = call, added.dtype
            ctx.set_materialize_grads(False)
        return sums, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sums: Tensor | None, of_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        if of_normed is None:
            return of_sums, None if of_sums is None else of_sums.to(ctx.added_dtype), None, None, None
        sums, weight, scales = ctx.saved_tensors
        to_states, to_weight = torch.empty_like(sums), _parts_of(weight, scales, ctx.needs_input_grad[2])
        to_added = None if ctx.added_dtype == sums.dtype else torch.empty_like(sums, dtype=ctx.added_dtype)
        slopes = (of_normed.contiguous(), None if of_sums is None else of_sums.contiguous())
        _call("norm_backward", ctx.call, sums, 0, weight, scales, *slopes, to_states, to_added, to_weight)
        found = to_states if to_added is None else to_added
        return to_states, found, None if to_weight is None else to_weight.sum(0), None, None


def _norm_call(states: Tensor, added: torch.dtype, output: torch.dtype, eps: float) -> _Norm:
    units, bf16 = states.shape[-1], [DTYPES[dtype] == "bfloat16" for dtype in (added, output)]
    return _Norm(states.numel() // units, units, *bf16, eps)


def _parts_of(weight: Tensor, scales: Tensor, is_wanted: bool) -> Tensor | None:
    """Return room for the gradient of a norm's weight, in parts that are summed in order."""
    return weight.new_empty(-(-scales.numel() // ROWS_OF_A_PART), len(weight)) if is_wanted else None


def gated(gate: Float[Tensor, "*n D"], up: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
    """Return silu(gate) up."""
    product: Tensor = _run(_Gated, gate, up)
    return product


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = _rows_of(gate), _rows_of(up)
        units, output = gate.shape[-1], gate.new_empty(gate.shape)
        call = _Gate(output.numel() // units, units, gate.stride(-2), up.stride(-2))
        _call(f"gated_{DTYPES[gate.dtype]}", call, gate, up, output)
        if ctx is not None:
            ctx.save_for_backward(gate, up)
            ctx.call = call
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
        _call(f"gated_backward_{DTYPES[gate.dtype]}", ctx.call, gate, up, gradient.contiguous(), to_gate, to_up)
        return to_gate, to_up


def _run(function: Any, *arguments: Any) -> Any:
    """Apply a function with a gradient; where none is recorded without what autograd costs, half of a small call."""
    return function.apply(*arguments) if torch.is_grad_enabled() else function.forward(None, *arguments)


def _call(name: str, call: ctypes.Structure, *arguments: Tensor | int | None) -> None:
    """Run a kernel; tensors are passed as addresses, and must stand in one piece unless `call` holds their steps."""
    kernels = library()
    assert kernels is not None
    addresses = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
    _function(name, len(addresses))(ctypes.byref(call), *addresses)


@cache
def _function(name: str, num_arguments: int) -> Any:
    function = getattr(library(), name)
    function.argtypes, function.restype = [c_void_p] * (1 + num_arguments), None
    return function
