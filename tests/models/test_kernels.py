"""Compiled kernels against the formulas in fp64: attention in runs, decoding, norms and gates, and being compiled."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from qinglan.models import kernels
from qinglan.models.kernels import Rotation, Runs

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler for kernels")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Of the largest number. bf16 keeps 8 bits: half a unit in the last place is 0.4 percent."""


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    error = (found.detach().double() - expected.detach()).abs().max()
    return bool(error <= TOLERANCE[dtype] * expected.detach().abs().max())


def exact_copies(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [one.detach().double().requires_grad_() for one in tensors]


def angles(positions: torch.Tensor, units: int) -> Rotation:
    turns = positions[..., None] * 0.7 ** torch.arange(units // 2)
    return Rotation(torch.cat([turns.cos()] * 2, -1), torch.cat([turns.sin()] * 2, -1))


def rotated(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """[N, H, D], each half against the other."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (part.double()[:, None] for part in rotation)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def seen_by(runs: Runs) -> torch.Tensor:
    """[N, N], from the words of `Runs`."""
    may_see = torch.zeros(len(runs.own), len(runs.own), dtype=torch.bool)
    for start, end in itertools.pairwise(runs.starts.tolist()):
        for token in range(end - start):
            own, shared = int(runs.own[start + token]), int(runs.shared[start + token])
            may_see[start + token, start : start + shared] = True
            may_see[start + token, start + own : start + token + 1] = True
    return may_see


def plain_attention(query, key, value, runs, rotation, scale):
    sharing = query.shape[1] // key.shape[1]
    query, key = rotated(query, rotation), rotated(key, rotation)
    key, value = (states.repeat_interleave(sharing, 1) for states in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key) * scale
    weights = scores.masked_fill(~seen_by(runs), -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, value)


def tree(prompt: int, completions: list[int]) -> tuple[list[int], list[int]]:
    """Return the own starts and shared ends of one run."""
    own, shared = [0] * prompt, [0] * prompt
    for length in completions:
        own, shared = [*own, *[len(own)] * length], [*shared, *[prompt] * length]
    return own, shared


def tree_runs(trees: list[tuple[int, list[int]]]) -> Runs:
    parts = [tree(*one) for one in trees]
    runs = Runs.of([len(own) for own, _ in parts])
    own, shared = (torch.tensor(list(itertools.chain(*part)), dtype=torch.int32) for part in zip(*parts, strict=True))
    return runs._replace(own=own, shared=shared)


RUNS = {
    "texts": Runs.of([1, 31, 32, 33, 100, 7]),
    "filled up": Runs.of([40, 3]).with_filler(9),
    "trees": tree_runs([(5, [3, 1, 40]), (33, [32, 31, 64, 2]), (64, [1])]),
    "no shared prompt": tree_runs([(0, [20, 45])]),
}


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize(("heads", "groups", "units"), [(2, 2, 32), (4, 2, 16), (3, 1, 24), (2, 2, 64)])
@pytest.mark.parametrize("name", RUNS)
def test_attention_in_runs_and_its_gradients(name, heads, groups, units, dtype, generator):
    runs = RUNS[name]
    shapes = [(len(runs.own), number, units) for number in (heads, groups, groups, heads)]
    query, key, value, slope = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    inputs = [states.requires_grad_() for states in (query, key, value)]
    rotation = angles(torch.arange(len(runs.own)) % 50, units)
    found = kernels.attend(*inputs, runs, rotation, units**-0.5)
    exact = exact_copies(*inputs)
    expected = plain_attention(*exact, runs, rotation, units**-0.5)
    assert found.dtype == dtype and near(found, expected, dtype)
    gradients = torch.autograd.grad(found, inputs, slope)
    for one, other in zip(gradients, torch.autograd.grad(expected, exact, slope.double()), strict=True):
        assert near(one, other, dtype)
    with torch.no_grad():
        assert torch.equal(found, kernels.attend(*inputs, runs, rotation, units**-0.5))


def test_threads_change_no_bit(generator):
    runs = RUNS["trees"]
    parts = [torch.randn(len(runs.own), 4, 32, generator=generator).requires_grad_() for _ in range(3)]
    rotation, weight = angles(torch.arange(len(runs.own)), 32), torch.rand(128, generator=generator).requires_grad_()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            mixed = kernels.attend(*parts, runs, rotation, 0.2).flatten(1)
            sums, normed = kernels.add_normalize(mixed, mixed, weight, 1e-6, torch.float32)
            opened = kernels.gated(normed, sums)
            results.append((opened, *torch.autograd.grad(opened.sum(), [*parts, weight])))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize(("heads", "groups", "units"), [(2, 2, 32), (4, 2, 24), (2, 1, 64)])
def test_a_step_of_decoding(heads, groups, units, has_norms, window, dtype, generator):
    positions, capacity = torch.tensor([[0], [4], [17], [39]]), 40
    buffers = [torch.randn(6, groups, capacity, units, generator=generator) for _ in range(2)]
    before = [buffer.clone() for buffer in buffers]
    sizes = [heads * units, groups * units, groups * units]
    parts = torch.randn(4, 1, sum(sizes), generator=generator).to(dtype).split(sizes, dim=-1)  # slices of one product
    rotation = angles(positions.float(), units)
    norms = (torch.rand(units, generator=generator), torch.rand(units, generator=generator), 1e-6)
    found = kernels.decode(parts, buffers, positions, rotation, norms if has_norms else None, 0.3, window)
    assert found.shape == (4, 1, heads * units) and found.dtype == dtype
    for row, position in enumerate(positions[:, 0].tolist()):
        query, key, value = (part[row].double().view(-1, units) for part in parts)
        if has_norms:
            query, key = (
                F.rms_norm(states, (units,), weight.double(), norms[2])
                for states, weight in ((query, norms[0]), (key, norms[1]))
            )
        turn = Rotation(*(part[row] for part in rotation))
        query, key = (rotated(states[None], turn)[0] for states in (query, key))
        before[0][row, :, position], before[1][row, :, position] = key.float(), value.float()
        first = 0 if window is None else max(0, position - window + 1)
        keys, values = (
            buffer[row, :, first : position + 1].double().repeat_interleave(heads // groups, 0) for buffer in before
        )
        weights = (torch.einsum("hd,hcd->hc", query, keys) * 0.3).softmax(-1)
        assert near(found[row, 0], torch.einsum("hc,hcd->hd", weights, values).flatten(), dtype)
    for buffer, expected in zip(buffers, before, strict=True):  # and nothing else is written
        torch.testing.assert_close(buffer, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("added_dtype", kernels.DTYPES)
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("shape", [(1, 130, 40), (3, 1, 256)])
def test_sums_and_their_norms(shape, dtype, added_dtype, generator):
    states, slope = (torch.randn(shape, generator=generator) for _ in range(2))
    added, slope_of_normed = torch.randn(shape, generator=generator).to(added_dtype), slope.flip(0).to(dtype)
    inputs = [one.requires_grad_() for one in (states, added, torch.rand(shape[-1], generator=generator))]
    sums, normed = kernels.add_normalize(*inputs, 1e-5, dtype)
    exact = exact_copies(*inputs)
    expected = exact[0] + exact[1]
    expected_norm = F.rms_norm(expected, shape[-1:], exact[2], 1e-5)
    assert sums.dtype == torch.float32 and near(sums, expected, torch.float32)
    assert normed.dtype == dtype and near(normed, expected_norm, dtype)
    found = torch.autograd.grad((sums, normed), inputs, (slope, slope_of_normed), retain_graph=True)
    wanted = torch.autograd.grad(
        (expected, expected_norm), exact, (slope.double(), slope_of_normed.double()), retain_graph=True
    )
    kinds = (torch.float32, added_dtype, torch.float32)
    assert all(near(one, other, kind) for one, other, kind in zip(found, wanted, kinds, strict=True))
    (alone,) = torch.autograd.grad(normed, inputs[:1], slope_of_normed)  # nothing reads the sums
    (other,) = torch.autograd.grad(expected_norm, exact[:1], slope_of_normed.double())
    assert near(alone, other, torch.float32)


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_a_norm_of_states_alone(dtype, generator):
    states = torch.randn(5, 7, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.rand(24, generator=generator).requires_grad_()
    same, normed = kernels.add_normalize(states, None, weight, 1e-6, dtype)
    assert same is states
    exact = exact_copies(states, weight)
    expected = F.rms_norm(exact[0], (24,), exact[1], 1e-6)
    slope = torch.randn(5, 7, 24, generator=generator).to(dtype)
    assert near(normed, expected, dtype)
    found = torch.autograd.grad(normed, (states, weight), slope)
    wanted = torch.autograd.grad(expected, exact, slope.double())
    assert near(found[0], wanted[0], dtype) and near(found[1], wanted[1], torch.float32)


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("units", [3, 16, 4100])
def test_the_gate_of_an_mlp(units, dtype, generator):
    both = (torch.randn(5, 1, 2 * units, generator=generator) * 30).to(dtype)  # logistic functions near 0 and 1
    gate, up = (half.requires_grad_() for half in both.chunk(2, dim=-1))
    found, slope = kernels.gated(gate, up), torch.randn(5, 1, units, generator=generator).to(dtype)
    exact = exact_copies(gate, up)
    expected = F.silu(exact[0]) * exact[1]
    assert near(found, expected, dtype)
    gradients = torch.autograd.grad(found, (gate, up), slope)
    wanted = torch.autograd.grad(expected, exact, slope.double())
    assert all(near(one, other, dtype) for one, other in zip(gradients, wanted, strict=True))


def test_bf16_rounds_as_pytorch_does_and_keeps_what_is_not_a_number():
    numbers = torch.tensor([[[1.0, 1.00390625, 1.01171875, -3.1415927, 1e-40, 3.4e38, torch.nan, 65504.0]]])
    _, normed = kernels.add_normalize(torch.zeros_like(numbers), numbers.bfloat16(), torch.ones(8), 1.0, torch.bfloat16)
    assert bool(normed.isnan().all())  # one spoils the norm of its row, and is seen
    opened = kernels.gated(numbers.expand(2, 1, 8).contiguous(), torch.ones(2, 1, 8))
    assert bool(opened[..., 6].isnan().all()) and int(opened.isnan().sum()) == 2


CHILD = "from qinglan.models import kernels; print(kernels.library() is not None)"


def run_child(**environment: str) -> subprocess.CompletedProcess[str]:
    import os

    child = [sys.executable, "-c", CHILD]
    return subprocess.run(child, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_they_are_compiled_once_and_kept(tmp_path):
    folder = tmp_path / "qinglan" / "kernels"
    assert run_child(XDG_CACHE_HOME=str(tmp_path)).stdout == "True\n"
    (file,) = folder.iterdir()  # and no scratch
    made = file.stat().st_mtime_ns
    assert run_child(XDG_CACHE_HOME=str(tmp_path)).stdout == "True\n"
    assert file.stat().st_mtime_ns == made


def test_a_compiler_that_fails_is_said_in_one_line_and_none_is_no_fault(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: no such thing" >&2\nexit 1\n')
    compiler.chmod(0o755)
    found = run_child(XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=f"{tmp_path}:/bin")
    assert (found.stdout, found.returncode) == ("False\n", 0)
    assert found.stderr == "models run without compiled kernels, slower: error: no such thing\n"
    assert list((tmp_path / "cache" / "qinglan" / "kernels").iterdir()) == []
    compiler.unlink()
    found = run_child(PATH=str(tmp_path))
    assert (found.stdout, found.stderr) == ("False\n", "")


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    found = run_child(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert found.stdout == "False\n" and len(found.stderr.splitlines()) == 1
