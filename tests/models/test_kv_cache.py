"""Live rows that are filled up on a CPU change nothing: neither the states of live rows nor the slot that is parked."""

from typing import Any

import pytest
import torch
from conftest import make_tiny_lm

from qinglan.models import kv_cache
from qinglan.models.kv_cache import SlotCache, attention_plan

LIVE, SLOTS, LENGTH = 5, 18, 6


def run(architecture: str, num_queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill 5 live slots and the last one, decode; return the live rows' states and the last slot's keys."""
    lm = make_tiny_lm(architecture)
    cache = SlotCache(lm.model, attention_plan(lm.model), SLOTS, 12, None)
    prompts = [[(3 * row + column) % 40 for column in range(LENGTH)] for row in range(LIVE + 1)]
    with torch.no_grad():
        cache.prefill(prompts, [*range(LIVE), SLOTS - 1], list(range(LIVE + 1)))
        tokens = torch.arange(LIVE * num_queries).view(LIVE, num_queries)
        positions = LENGTH + torch.arange(num_queries).expand(LIVE, -1)
        states = cache.extend(tokens, positions, LENGTH + num_queries)
    return states, torch.stack([layer.keys[SLOTS - 1] for layer in cache.slot_layers])


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gemma3"])
def test_filled_up_rows_leave_states_and_the_parked_slot_as_they_are(architecture, num_queries, monkeypatch):
    filled, parked = run(architecture, num_queries)
    monkeypatch.setattr(kv_cache, "ROW_STEP", 1)
    plain, parked_before = run(architecture, num_queries)
    assert (len(filled), len(plain)) == (16, LIVE)
    torch.testing.assert_close(filled[:LIVE], plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(parked, parked_before)


def test_rows_are_not_filled_up_into_the_last_slot(monkeypatch):
    lm = make_tiny_lm("llama")
    seen: list[int] = []
    inner = SlotCache._extend

    def spy(self: SlotCache, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(tokens))
        return inner(self, tokens, *rest)

    monkeypatch.setattr(SlotCache, "_extend", spy)
    for num_slots, live in ((18, 5), (17, 16), (16, 5), (17, 17)):
        cache = SlotCache(lm.model, attention_plan(lm.model), num_slots, 4, None)
        with torch.no_grad():
            cache.extend(torch.zeros(live, 1, dtype=torch.long), torch.zeros(live, 1, dtype=torch.long), 1)
    assert seen == [16, 16, 5, 17]


@pytest.mark.parametrize(
    ("num_prompts", "longest", "shape"),
    [
        (1, 1, (1, 1)),
        (5, 9, (6, 10)),  # 101 to 110 and 1001 to 1010, in two and three binary digits
        (3, 58, (3, 58)),  # three digits would be 64: the context is shorter
        (1, 57, (1, 58)),
    ],
)
def test_prompts_are_filled_up_to_few_shapes_within_the_context(num_prompts, longest, shape, monkeypatch):
    lm = make_tiny_lm("llama")
    lm.model.config.max_position_embeddings = 58
    seen = []
    inner = SlotCache._forward
    monkeypatch.setattr(
        SlotCache, "_forward", lambda self, ids, *rest: seen.append(ids.shape) or inner(self, ids, *rest)
    )
    cache = SlotCache(lm.model, attention_plan(lm.model), num_prompts + 2, 70, None)
    with torch.no_grad():
        cache.prefill([[1] * longest] * num_prompts, [1], [0])
    assert seen == [shape]
    for layer in cache.slot_layers:  # only slot 1 was asked for
        for buffer in layer.buffers():
            assert buffer[1, :, 0].any() and not buffer[0].any() and not buffer[2:].any()
