"""CUDA graphs: rounding shapes up changes nothing, memory goes, a failed recording is survived; on a GPU, exactness."""

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qinglan.core.device import Device
from qinglan.models import cuda_graph, decode_graphs, generate, kv_cache
from qinglan.models.cuda_graph import WARM_UP, Recorded, Space
from qinglan.models.decode_graphs import DecodeGraphs
from qinglan.models.generate import SamplingConfig
from qinglan.models.kv_cache import SlotCache
from tests.conftest import make_tiny_lm, needs_gpu


def prompts_of(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 20) for _ in range(rng.randrange(1, 9))] for _ in range(count)]


class Unrecorded:
    """Runs what would be recorded."""

    def __init__(self, function: Callable[[], Any], space: Any) -> None:
        self.function = function

    def __call__(self) -> Any:
        return self.function()


class FakeSpace:
    """A space without a GPU."""

    can_record = True


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Let models on the CPU decode by rounded shapes; returns (rows, columns, live rows) of every step."""
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(decode_graphs, "Recorded", Unrecorded)
    monkeypatch.setattr(decode_graphs, "COLUMN_STEP", 8)

    class Counting(DecodeGraphs):
        def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
            states = super().__call__(tokens, positions, width)
            seen.append((*next(reversed(self.steps)), len(tokens)))
            return states

    def record_steps(self: SlotCache, num_slots: int, name: str) -> None:
        method = weakref.WeakMethod(self._extend)
        self.graphs = Counting(lambda *step: method()(*step), num_slots, self.slot_layers[0].capacity, FakeSpace())

    monkeypatch.setattr(SlotCache, "record_steps", record_steps)
    return seen


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(("max_rows", "num_samples"), [(6, 1), (6, 4), (64, 2)])
def test_rounded_shapes_draw_the_same(
    kind: str, max_rows: int, num_samples: int, shapes: list[tuple[int, int, int]]
) -> None:
    lm = make_tiny_lm(kind)
    lm = lm._replace(chat=lm.chat._replace(end_ids=frozenset(range(0, 100, 8))))  # rows end at different times
    prompts, config = prompts_of(9), SamplingConfig(max_new_tokens=12, max_rows=max_rows)
    plain_config = config.model_copy(update={"cuda_graphs": False})
    plain = generate.generate(lm, prompts, plain_config, seed=1, num_samples=num_samples)
    assert not shapes
    rounded = generate.generate(lm, prompts, config, seed=1, num_samples=num_samples)
    for before, after in zip(plain, rounded, strict=True):
        assert [one.token_ids for one in before] == [one.token_ids for one in after]
        for one, other in zip(before, after, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    num_slots = min(max_rows, 9 * num_samples)
    quarter, capacity = -(-num_slots // 4), max(map(len, prompts)) + 12
    assert {rows for rows, _, _ in shapes} <= {min(num_slots, quarter * n) for n in range(1, 5)}
    assert all(columns % 8 == 0 or columns == capacity for _, columns, _ in shapes)
    assert any(rows > live for rows, _, live in shapes)


def test_a_call_leaves_no_memory_behind(shapes: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    lm, caches = make_tiny_lm("llama"), []
    make = generate.make_row_memory

    def watched(*args: Any) -> Any:
        memory = make(*args)
        caches.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(generate, "make_row_memory", watched)
    gc.disable()  # what only a collection frees would keep a GPU's memory for as long as it likes
    try:
        generate.generate(lm, prompts_of(3), SamplingConfig(max_new_tokens=4), seed=1)
        assert shapes
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


class Context:
    """A device or stream that does nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, _: Any) -> None: ...


class Graph:
    """A graph that counts its replays."""

    replays = 0

    def capture_begin(self, pool: Any) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None:
        self.replays += 1


class BrokenGraph(Graph):
    def capture_end(self) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def fake_cuda(monkeypatch: pytest.MonkeyPatch, graph: type[Graph]) -> None:
    fakes = {
        "device": lambda _: Context(),
        "stream": lambda _: Context(),
        "Stream": Context,
        "current_stream": Context,
        "graph_pool_handle": lambda: None,
        "CUDAGraph": graph,
        "synchronize": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(cuda_graph.torch.cuda, name, fake)


def test_a_function_runs_a_few_times_is_recorded_once_and_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, Graph)
    calls: list[int] = []

    def work() -> list[int]:
        calls.append(1)
        return calls

    recorded = Recorded(work, Space(torch.device("cuda"), "work"))
    for _ in range(WARM_UP + 5):
        assert recorded() is calls
    assert len(calls) == WARM_UP + 1  # the last of them while it was being recorded
    assert recorded.graph is not None
    assert recorded.graph.replays == 5  # recording runs nothing, so the call that records replays too


def test_what_cannot_be_recorded_runs_as_it_is_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_cuda(monkeypatch, BrokenGraph)
    calls, failures = [], []

    def work() -> int:
        calls.append(len(calls))
        if len(calls) == WARM_UP + 1:  # the first call that is being recorded
            raise RuntimeError("cannot look at a value while recording")
        return len(calls)

    space = Space(torch.device("cuda"), "decoding with tiny", lambda: failures.append(1))
    one, other = Recorded(work, space), Recorded(lambda: "as it is", space)
    assert [one() for _ in range(WARM_UP + 2)] == [1, 2, 3, 5, 6]
    assert [other() for _ in range(WARM_UP + 2)] == ["as it is"] * (WARM_UP + 2)
    assert failures == [1]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "decoding with tiny" in said
    assert "cannot look at a value" in said  # the cause, and not what the end of the capture made of it


def test_a_model_on_the_cpu_decodes_without_graphs() -> None:
    lm = make_tiny_lm("llama")
    cache = SlotCache(lm.model, kv_cache.attention_plan(lm.model), 2, 8, None)
    cache.record_steps(2, "tiny")
    assert cache.graphs is None  # a model on the CPU has no kernels to launch


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_draw_what_plain_steps_draw(dtype: str) -> None:
    device = Device.detect("cuda", dtype)
    lm = make_tiny_lm("llama")
    lm = lm._replace(model=lm.model.to(device.torch_device), device=device)
    draws = []
    for graphs in (False, True):
        config = SamplingConfig(max_new_tokens=40, max_rows=6, temperature=0, cuda_graphs=graphs)
        draws.append(generate.generate(lm, prompts_of(12), config, seed=1))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for (before,), (after,) in zip(*draws, strict=True):
        if dtype == "float32":
            assert before.token_ids == after.token_ids
        assert before.logprobs[:8] == pytest.approx(after.logprobs[:8], abs=tolerance)
