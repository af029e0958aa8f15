"""Options of a prompt are scored as a plain forward pass over prompt and option scores them."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from qinglan.core.errors import InputError
from qinglan.core.records import Message, Prompt
from qinglan.models.kv_cache import SlotCache
from qinglan.models.options import option_logprobs, score_options
from tests.conftest import ARCHITECTURES

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [40], [60, 61, 62, 63]]
OPTIONS = [[[20, 21, 22], [23], [20, 21, 22, 24, 25, 26, 27, 28]], [[5], [6]], [[9, 9, 9, 9]]]  # one beyond the window


def plain(lm, prompt, option, temperature=1.0):
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*prompt, *option]]), use_cache=False).logits[0].float()
    logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(option)[:, None])[:, 0]


def flat(found):
    return [one for row in found for one in row]


def check(lm, found, temperature=1.0):
    for prompt, options, row in zip(PROMPTS, OPTIONS, found, strict=True):
        for option, logprobs in zip(options, row, strict=True):
            torch.testing.assert_close(logprobs, plain(lm, prompt, option, temperature), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_options_score_as_a_plain_forward_pass(tiny_lm, architecture):
    lm = tiny_lm(architecture)
    check(lm, option_logprobs(lm, PROMPTS, OPTIONS))
    check(lm, option_logprobs(lm, PROMPTS, OPTIONS, temperature=0.7), 0.7)


def test_options_of_a_model_without_keys_and_values(tiny_lm):
    lm = tiny_lm()
    sizes = MambaConfig(
        vocab_size=len(lm.tokenizer), hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=2
    )
    torch.manual_seed(0)
    lm = lm._replace(model=MambaForCausalLM(sizes).eval(), name="mamba")
    check(lm, option_logprobs(lm, PROMPTS, OPTIONS))


def test_a_prompt_is_computed_once_and_batches_change_nothing(tiny_lm, monkeypatch):
    lm = tiny_lm("gemma3")
    whole = option_logprobs(lm, PROMPTS, OPTIONS)
    prefilled = []
    prefill = SlotCache.prefill
    monkeypatch.setattr(
        SlotCache, "prefill", lambda self, prompts, *to: prefilled.extend(prompts) or prefill(self, prompts, *to)
    )
    again = option_logprobs(lm, PROMPTS, OPTIONS)
    assert prefilled == [PROMPTS[0][:-1], PROMPTS[2][:-1], []]
    monkeypatch.setattr("qinglan.models.options.MAX_FORWARD_TOKENS", 16)  # two rows at a time
    monkeypatch.setattr("qinglan.models.language_model._CHUNK_ELEMENTS", 3 * 267)  # logits of three tokens at a time
    few = option_logprobs(lm, PROMPTS[::-1], OPTIONS[::-1])[::-1]
    for other in (again, few):
        for one, two in zip(flat(whole), flat(other), strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_at_the_end_of_the_context_only_padding_goes_beyond(tiny_lm):
    lm = tiny_lm("gpt2")  # learned positions: one more is an error, not a number
    prompt = list(range(5, 105)) * 2 + [3] * 53
    found = option_logprobs(lm, [prompt], [[[1, 2, 3], [4]]])[0]
    torch.testing.assert_close(found[0], plain(lm, prompt, [1, 2, 3]), atol=1e-5, rtol=0)
    longer, shorter = [prompt, PROMPTS[0]], [[[4]], [[1] * 60]]
    found = option_logprobs(lm, longer, shorter)
    torch.testing.assert_close(found[0][0], plain(lm, prompt, [4]), atol=1e-5, rtol=0)


def test_texts_of_options_are_written_as_completions(tiny_lm):
    lm = tiny_lm("qwen2")
    prompt = Prompt(
        id="p",
        source="human",
        producer_id="me",
        prompt_group_id="p",
        messages=(Message(role="user", content="A or B?"),),
    )
    found = score_options(lm, [prompt], [["A", "B", "both"]])[0]
    ids = lm.chat.prompt_ids(prompt.messages)
    for text, score in zip(("A", "B", "both"), found, strict=True):
        expected = plain(lm, ids, lm.tokenizer.encode(text, add_special_tokens=False)).sum()
        assert score == pytest.approx(float(expected), abs=1e-5)


def test_options_that_make_no_sense_are_refused(tiny_lm):
    lm = tiny_lm()
    with pytest.raises(InputError, match="option 1 of prompt 0: has no tokens"):
        option_logprobs(lm, [[1]], [[[2], []]])
    with pytest.raises(InputError, match="prompt 1: has no tokens"):
        option_logprobs(lm, [[1], []], [[[2]], []])
    with pytest.raises(InputError, match="options: got 1 lists for 2 prompts"):
        option_logprobs(lm, [[1], [2]], [[[2]]])
    with pytest.raises(InputError, match="option 0 of prompt 0: 258 tokens with its prompt exceed the context"):
        option_logprobs(lm, [[1] * 200], [[[2] * 58]])
    with pytest.raises(InputError, match="temperature: 0"):
        option_logprobs(lm, [[1]], [[[2]]], temperature=0)
    lm.model.config.max_position_embeddings = 10**6
    with pytest.raises(InputError, match="memory_budget_mib: 1 MiB hold no row; a row of 20001 tokens takes 3 MiB"):
        option_logprobs(lm, [[1] * 20_000], [[[2]]], memory_budget_mib=1)
    assert option_logprobs(lm, [], []) == []
