"""Decoding by CUDA graphs: rounding shapes up changes nothing (anywhere), and neither does a graph (on a GPU)."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qinglan.core.device import Device
from qinglan.models import decode_graphs, generate
from qinglan.models.decode_graphs import COLUMN_STEP, DecodeGraphs
from qinglan.models.generate import SamplingConfig
from tests.conftest import make_tiny_lm

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def prompts_of(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 20) for _ in range(rng.randrange(1, 9))] for _ in range(count)]


class Unrecorded:
    """Runs what would be recorded."""

    def __init__(self, function: Callable[[], Any], name: str, **_: Any) -> None:
        self.function = function

    def __call__(self) -> Any:
        return self.function()


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(("max_rows", "num_samples"), [(5, 1), (4, 3), (64, 2)])
def test_rounded_shapes_draw_the_same(
    kind: str, max_rows: int, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_tiny_lm(kind)
    config = SamplingConfig(max_new_tokens=12, max_rows=max_rows)
    plain = generate.generate(lm, prompts_of(9), config, seed=1, num_samples=num_samples)

    monkeypatch.setattr(decode_graphs, "Recorded", Unrecorded)
    monkeypatch.setattr(decode_graphs, "COLUMN_STEP", 8)
    monkeypatch.setattr(decode_graphs, "Space", lambda: None)
    shapes = set()

    def record_steps(self: generate.SlotCache, num_slots: int, name: str) -> None:
        def extend(tokens: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
            shapes.add((len(tokens), width))
            return self._extend(tokens, positions, width)

        self.graphs = DecodeGraphs(extend, num_slots, self.slot_layers[0].capacity, name)

    monkeypatch.setattr(generate.SlotCache, "record_steps", record_steps)
    rounded = generate.generate(lm, prompts_of(9), config, seed=1, num_samples=num_samples)
    for before, after in zip(plain, rounded, strict=True):
        assert [one.token_ids for one in before] == [one.token_ids for one in after]
        for one, other in zip(before, after, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    capacity = max(len(prompt) for prompt in prompts_of(9)) + 12
    assert all(width % 8 == 0 or width == capacity for _, width in shapes)


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
    assert COLUMN_STEP % 8 == 0  # attention kernels want masks that are aligned
