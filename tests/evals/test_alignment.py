"""KL of a policy to its reference, estimated on what the policy sampled."""

import math

import pytest

from qinglan.core.records import Message, Prompt
from qinglan.evals.alignment import kl_to
from qinglan.learn.encode import encode_completion
from qinglan.models.generate import SamplingConfig, sample_completions
from qinglan.models.language_model import completion_logprobs


def prompt(number: int) -> Prompt:
    return Prompt(
        id=f"p{number}", source="human", producer_id="u", prompt_group_id=f"g{number // 2}",
        messages=(Message(role="user", content=f"Say {number}"),),
    )  # fmt: skip


def test_kl_to_itself_is_zero_and_to_another_the_mean_sum_of_log_ratios(tiny_lm):
    policy, reference, prompts = tiny_lm(seed=0), tiny_lm(seed=1), [prompt(n) for n in range(6)]
    sampled = [row[0] for row in sample_completions(policy, prompts, SamplingConfig(max_new_tokens=6), seed=0)]
    itself = kl_to(policy, policy, prompts, sampled, seed=0)
    assert itself.value == pytest.approx(0.0, abs=1e-6) and itself.n == 6

    found = kl_to(reference, policy, prompts, sampled, seed=0)
    by_hand = 0.0
    for one, completion in zip(prompts, sampled, strict=True):
        sequence = encode_completion(policy.chat, one, completion)
        own, other = completion_logprobs(policy, [sequence])[0], completion_logprobs(reference, [sequence])[0]
        by_hand += sum((a - b) / len(prompts) for a, b in zip(own.tolist(), other.tolist(), strict=True))
    assert found.value == pytest.approx(by_hand, rel=1e-4) and found.value > 0
    assert found.low is not None and found.low <= found.value <= found.high  # three groups of two prompts
    assert math.isfinite(found.low) and found.unit == "nats per completion"
