"""Every trainer with micro-batches that run at the same time: the weights of one by one, and equal bits every time."""

from typing import Any

import pytest
import torch
from test_lora import TRAINERS, weights_of
from test_resume import SHORT
from tiny_world import make_lm, make_stage

from qinglan.core import workers
from qinglan.core.device import Device
from qinglan.models import trunk
from qinglan.models.adapters import EVERY_WEIGHT
from qinglan.models.language_model import LanguageModel
from qinglan.models.trunk import num_at_once, share_of_budget


def train(name: str, directory: Any) -> dict[str, torch.Tensor]:
    return weights_of(TRAINERS[name](make_lm(), make_stage(directory, name), EVERY_WEIGHT, **SHORT[name]))


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_give_the_same_weights(name, tmp_path, monkeypatch):
    expected = train(name, tmp_path / "one")
    monkeypatch.setattr(trunk, "MIN_TOKENS", 16)
    numbers = []
    pool = workers.ThreadPoolExecutor
    monkeypatch.setattr(workers, "ThreadPoolExecutor", lambda n, **named: numbers.append(n) or pool(n, **named))
    torch.set_num_threads(3)
    try:
        found, again = train(name, tmp_path / "three"), train(name, tmp_path / "again")
    finally:
        torch.set_num_threads(1)
    assert max(numbers) > 1
    for key, weight in expected.items():
        assert torch.equal(found[key], again[key])
        torch.testing.assert_close(found[key], weight, atol=2e-4, rtol=2e-3)


def test_how_many_run_at_the_same_time(monkeypatch):
    lm: LanguageModel = make_lm()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def number(units: list[int], max_tokens: int, model: Any = lm.model, device: Device = lm.device) -> int:
        return num_at_once([model], device, units, max_tokens)

    assert number([100] * 100, 8192) == 4
    assert number([100] * 100, 2048) == 2  # of 1,024 tokens each
    assert number([100] * 15, 8192) == 1
    assert number([10], 10) == 1 and number([], 10) == 1
    assert number([3000] * 8, 8192) == 2  # three together would hold more than 8,192 tokens
    assert number([6000] * 8, 8192) == number([9000] * 8, 8192) == 1
    size = sum(weights.numel() for weights in lm.model.parameters())
    monkeypatch.setattr(trunk, "MAX_BYTES", 2 * size)
    assert number([100] * 100, 8192) == 1  # 4 bytes a weight
    assert number([100] * 100, 8192, device=lm.device._replace(compute_dtype=torch.bfloat16)) == 4
    monkeypatch.setattr(trunk, "MAX_BYTES", 4 * size)
    assert number([100] * 100, 8192) == 4
    assert number([100] * 100, 8192, make_lm("gpt2").model) == 1
    handle = lm.model.base_model.layers[0].register_forward_hook(lambda *_: None)
    assert number([100] * 100, 8192) == 1
    handle.remove()
    lm.model.base_model.rotary_emb.rope_type = "dynamic"  # its frequencies move with the length of what it saw
    assert number([100] * 100, 8192) == 1


def test_every_worker_has_some_of_what_is_cut_one_after_the_other():
    assert share_of_budget([400] * 8, 8192, at_once=2) == 1600
    assert share_of_budget([400] * 80, 8192, at_once=2) == 4096
    assert share_of_budget([400] * 8, 8192, at_once=1) == 8192
