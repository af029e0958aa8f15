"""Compiled kernels against the formulas in fp64: attention in runs, decoding, norms and gates, and being compiled."""

import itertools
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from qinglan.models import kernels
from qinglan.models.kernels import Rotation, Runs

# Not by `library`: where there is a compiler that does not make them, these tests are to fail.
pytestmark = pytest.mark.skipif(not kernels.has_compiler(), reason="no compiler for kernels")
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
@pytest.mark.parametrize(("heads", "groups", "units"), [(2, 2, 32), (4, 2, 16), (3, 1, 24), (2, 1, 10), (2, 2, 64)])
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
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize(("heads", "groups", "units"), [(2, 2, 32), (4, 2, 24), (2, 1, 10), (2, 1, 64)])
def test_a_step_of_decoding(heads, groups, units, has_norms, dtype, generator):
    positions, capacity = torch.tensor([[0], [4], [17], [39]]), 40
    buffers = [torch.randn(6, groups, capacity, units, generator=generator).to(dtype) for _ in range(2)]
    before = [buffer.clone() for buffer in buffers]
    sizes = [heads * units, groups * units, groups * units]
    parts = torch.randn(4, 1, sum(sizes), generator=generator).to(dtype).split(sizes, dim=-1)  # slices of one product
    rotation = angles(positions.float(), units)
    norms = (torch.rand(units, generator=generator), torch.rand(units, generator=generator), 1e-6)
    found = kernels.decode(parts, buffers, positions, rotation, norms if has_norms else None, 0.3)
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
        before[0][row, :, position], before[1][row, :, position] = key.to(dtype), value.to(dtype)
        keys, values = (
            buffer[row, :, : position + 1].double().repeat_interleave(heads // groups, 0) for buffer in before
        )
        weights = (torch.einsum("hd,hcd->hc", query, keys) * 0.3).softmax(-1)
        assert near(found[row, 0], torch.einsum("hc,hcd->hd", weights, values).flatten(), dtype)
    for buffer, expected in zip(buffers, before, strict=True):  # and nothing else is written
        torch.testing.assert_close(buffer, expected, atol=2e-6, rtol=2e-6 if dtype == torch.float32 else 2**-7)


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


def test_bf16_rounds_as_pytorch_does():
    ties = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e-40, 3.4e38, 65504.0, 0.1, -0.0]
    )  # fp32 halves of bf16
    numbers = torch.cat([ties, torch.randn(92, generator=torch.Generator().manual_seed(0))]).bfloat16()
    open_gate = torch.full((1, 1, 100), 200.0).bfloat16()  # silu(200) = 200
    found = kernels.gated(open_gate, numbers.view(1, 1, 100))
    assert torch.equal(found[0, 0], (200 * numbers.float()).bfloat16())
    states = torch.randn(4, 36, generator=torch.Generator().manual_seed(1))
    exact, rounded = (kernels.add_normalize(states, None, torch.ones(36), 1e-6, kind)[1] for kind in kernels.DTYPES)
    assert torch.equal(rounded, exact.bfloat16())


def test_what_is_not_a_number_stays_so(generator):
    """Damaged weights must not look whole."""
    runs, rotation = Runs.of([40]), angles(torch.arange(40), 16)
    for damaged in range(3):
        parts = [torch.randn(40, 2, 16, generator=generator) for _ in range(3)]
        parts[damaged][7] = torch.nan
        inputs = [part.requires_grad_() for part in parts]
        mixed = kernels.attend(*inputs, runs, rotation, 0.25)
        assert bool(mixed[7].isnan().all())
        assert any(bool(one.isnan().any()) for one in torch.autograd.grad(mixed.sum(), inputs))
        heads = [part.detach()[7:8].flatten(1)[:, None] for part in parts]
        buffers = [torch.randn(1, 2, 8, 16, generator=generator) for _ in range(2)]
        turn = Rotation(*(part[None, 7:8] for part in rotation))
        assert bool(kernels.decode(heads, buffers, torch.tensor([[5]]), turn, None, 0.25).isnan().all())
    _, normed = kernels.add_normalize(torch.tensor([[1.0, torch.nan]]), None, torch.ones(2), 1.0, torch.bfloat16)
    assert bool(normed.isnan().all())
    assert bool(kernels.gated(torch.full((1, 1, 3), torch.nan), torch.ones(1, 1, 3)).isnan().all())


def test_a_rotation_of_other_units_is_refused():
    parts = [torch.zeros(3, 1, 8)] * 3
    with pytest.raises(ValueError, match="rotation of 4 units, heads of 8"):
        kernels.attend(*parts, Runs.of([3]), angles(torch.arange(3), 4), 1.0)


def test_a_gradient_of_sums_alone_passes_through(generator):
    states, added = (torch.randn(2, 5, generator=generator).requires_grad_() for _ in range(2))
    sums, _ = kernels.add_normalize(states, added.bfloat16(), torch.ones(5), 1e-6, torch.float32)
    assert all(torch.equal(one, torch.ones(2, 5)) for one in torch.autograd.grad(sums.sum(), (states, added)))


CHILD = "from qinglan.models import kernels; print(kernels.library() is not None)"


def run_child(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    child = [sys.executable, *(command or ("-c", CHILD))]
    return subprocess.run(child, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor")
def test_vectors_of_eight_give_the_same(tmp_path):
    """As processors without AVX-512 have them."""
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -mno-avx512f\n')
    compiler.chmod(0o755)
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    names = "attention_in_runs or step_of_decoding or sums or gate or rounds or number"
    found = run_child("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, __file__, **environment)
    assert found.returncode == 0, found.stdout[-3000:]
    assert len(list((tmp_path / "qinglan" / "kernels").iterdir())) == 1


def test_they_are_compiled_once_and_kept(tmp_path):
    folder = tmp_path / "qinglan" / "kernels"
    assert run_child(XDG_CACHE_HOME=str(tmp_path)).stdout == "True\n"
    (file,) = folder.iterdir()  # and no scratch
    made = file.stat().st_mtime_ns
    assert run_child(XDG_CACHE_HOME=str(tmp_path)).stdout == "True\n"
    assert file.stat().st_mtime_ns == made
    file.write_bytes(file.read_bytes()[:100])  # as a full disk leaves it
    found = run_child(XDG_CACHE_HOME=str(tmp_path))
    assert (found.stdout, found.stderr) == ("True\n", "")
    assert list(folder.iterdir()) == [file] and file.stat().st_size > 10_000


def test_a_compiler_that_does_not_end_is_said(monkeypatch, capsys):
    def run(*command, **options):
        raise subprocess.TimeoutExpired("g++", 60, stderr=b"warning\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert kernels.library.__wrapped__() is None
    assert "slower: Command 'g++' timed out after 60 seconds" in capsys.readouterr().err


def test_threads_beside_those_of_pytorch_are_refused(monkeypatch, capsys):
    class Other:
        def num_threads(self):
            return 7

    monkeypatch.setattr(kernels.ctypes, "CDLL", lambda path: Other())
    assert kernels.library.__wrapped__() is None
    assert "an OpenMP of its own" in capsys.readouterr().err
    assert torch.get_num_threads() == 1


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
