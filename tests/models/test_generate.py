"""The sampler against slow, obvious computations: plain forward passes, transformers' generate, enumeration."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from scipy.stats import chisquare
from transformers import MambaConfig, MambaForCausalLM

from qinglan.core.device import Device
from qinglan.core.errors import InputError
from qinglan.core.records import Message, Prompt
from qinglan.models import row_memory
from qinglan.models.engine import Engine, decode_text
from qinglan.models.generate import Sample, SamplingConfig, forced_prefix, generate, sample_completions
from qinglan.models.kv_cache import SlotCache
from qinglan.models.language_model import LanguageModel, TokenSequence, completion_logprobs
from qinglan.models.sampling import draw, filtered
from tests.conftest import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("both_ways")
MakeLM = Callable[..., LanguageModel]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [40], [60, 61, 62, 63], [80, 81], [5, 6, 7, 99, 100, 101, 102]]


def end_early(lm: LanguageModel, every: int = 8) -> LanguageModel:
    """Let every `every`-th token end a completion, so that rows of a random model finish at different times."""
    vocab = lm.model.get_input_embeddings().weight.shape[0]
    return lm._replace(chat=lm.chat._replace(end_ids=frozenset(range(0, vocab, every))))


def never_end(lm: LanguageModel) -> LanguageModel:
    return lm._replace(chat=lm.chat._replace(end_ids=frozenset()))


def flat(samples: list[list[Sample]]) -> list[Sample]:
    return [sample for row in samples for sample in row]


def plain_logits(lm: LanguageModel, token_ids: list[int]) -> torch.Tensor:
    """Logits after the last token, by the library's own forward pass over the whole text, one row, no cache."""
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1].float()


def plain_logprobs(lm: LanguageModel, prompt: Sequence[int], completion: list[int], temperature: float) -> torch.Tensor:
    """By a plain forward pass in fp64: in fp32 its own rounding, which these steep little models amplify, adds up."""
    whole, exact = [*prompt, *completion], copy.deepcopy(lm.model).double()
    with torch.no_grad():
        logits = exact(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0].float()


@pytest.mark.parametrize(("architecture", "temperature"), [("llama", 1.0), *((name, 0.7) for name in ARCHITECTURES)])
def test_logprobs_equal_a_plain_forward_pass(tiny_lm: MakeLM, architecture: str, temperature: float) -> None:
    lm = end_early(tiny_lm(architecture))
    config = SamplingConfig(max_new_tokens=20, temperature=temperature, max_rows=4)
    samples = generate(lm, PROMPTS, config, seed=0, num_samples=2)
    assert "eos" in {sample.finish_reason for sample in flat(samples)}
    for prompt, row in zip(PROMPTS, samples, strict=True):
        for sample in row:
            expected = plain_logprobs(lm, prompt, sample.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "pad_is_eos"), [("llama", False), ("gpt2", True), ("gemma2", True)])
def test_logprobs_equal_those_of_training(tiny_lm: MakeLM, architecture: str, pad_is_eos: bool) -> None:
    lm = end_early(tiny_lm(architecture, pad_is_eos=pad_is_eos))
    drawn = generate(lm, PROMPTS, SamplingConfig(max_new_tokens=12, temperature=0.7), seed=1, num_samples=2)
    sequences = [
        TokenSequence([*prompt, *sample.token_ids], len(prompt))
        for prompt, row in zip(PROMPTS, drawn, strict=True)
        for sample in row
    ]
    for sample, expected in zip(flat(drawn), completion_logprobs(lm, sequences, temperature=0.7), strict=True):
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers_generate(tiny_lm: MakeLM, architecture: str) -> None:
    lm = end_early(tiny_lm(architecture), every=16)
    config = SamplingConfig(temperature=0, max_new_tokens=10)
    for prompt, (sample,) in zip(PROMPTS[:3], generate(lm, PROMPTS[:3], config, seed=0), strict=True):
        with torch.no_grad():
            output = lm.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=10,
                eos_token_id=sorted(lm.chat.end_ids),
                pad_token_id=lm.chat.pad_id,
            )
        assert sample.token_ids == output[0, len(prompt) :].tolist()
        expected = plain_logprobs(lm, prompt, sample.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_samples_do_not_depend_on_slots_order_or_neighbours(tiny_lm: MakeLM, architecture: str) -> None:
    lm = end_early(tiny_lm(architecture), every=6)
    keys = ["a", "b", "c", "d", "e"]
    drawn = {
        rows: generate(lm, PROMPTS, SamplingConfig(max_new_tokens=12, max_rows=rows), seed=3, num_samples=3, keys=keys)
        for rows in (1, 3, 16, 512)
    }
    config = SamplingConfig(max_new_tokens=12)
    backwards = generate(lm, PROMPTS[::-1], config, seed=3, num_samples=3, keys=keys[::-1])[::-1]
    alone = [generate(lm, [p], config, seed=3, num_samples=3, keys=[k])[0] for p, k in zip(PROMPTS, keys, strict=True)]
    fewer = generate(lm, PROMPTS, SamplingConfig(max_new_tokens=12), seed=3, num_samples=1, keys=keys)
    for other in (drawn[1], drawn[3], drawn[16], backwards, alone):
        for one, two in zip(flat(drawn[512]), flat(other), strict=True):
            assert (one.token_ids, one.finish_reason, one.text) == (two.token_ids, two.finish_reason, two.text)
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
    assert [[s.token_ids for s in row] for row in fewer] == [[s.token_ids for s in row[:1]] for row in drawn[512]]


def test_a_longer_limit_continues_the_same_completion(tiny_lm: MakeLM) -> None:
    lm = never_end(tiny_lm())
    short, long = (
        generate(lm, PROMPTS, SamplingConfig(max_new_tokens=limit), seed=5, num_samples=2) for limit in (5, 11)
    )
    for one, two in zip(flat(short), flat(long), strict=True):
        assert one.token_ids == two.token_ids[:5]


def test_seeds_keys_and_samples_differ(tiny_lm: MakeLM) -> None:
    lm = never_end(tiny_lm())
    config = SamplingConfig(max_new_tokens=12)
    one = generate(lm, [[1, 2]] * 2, config, seed=0, num_samples=2)
    two = generate(lm, [[1, 2]] * 2, config, seed=1, num_samples=2)
    assert len({tuple(sample.token_ids) for sample in flat(one) + flat(two)}) == 8
    again = generate(lm, [[1, 2]] * 2, config, seed=0, num_samples=2, keys=["same", "same"])
    assert again[0] == again[1]


def test_prompts_are_prefilled_once_and_slots_refilled(tiny_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = end_early(tiny_lm())
    generate(lm, [[1]], SamplingConfig(max_new_tokens=1), seed=0)  # the trial of the model's slots is over
    prefilled: list[list[int]] = []
    live: list[int] = []
    prefill, step = SlotCache.prefill, Engine.step

    def counting_prefill(
        self: SlotCache, prompts: list[list[int]], targets: list[int], sources: list[int]
    ) -> torch.Tensor:
        prefilled.extend(prompts)
        return prefill(self, prompts, targets, sources)

    def counting_step(self: Engine) -> None:
        live.append(len(self.live))
        step(self)

    monkeypatch.setattr(SlotCache, "prefill", counting_prefill)
    monkeypatch.setattr(Engine, "step", counting_step)
    samples = generate(lm, PROMPTS, SamplingConfig(max_new_tokens=16, max_rows=5), seed=0, num_samples=4)
    assert sorted(prefilled) == sorted(prompt[:-1] for prompt in PROMPTS)
    assert max(live) == 5
    assert sum(live) == sum(len(sample.token_ids) for sample in flat(samples))  # no row is stepped after its end


def test_prefill_is_split_by_its_token_limit(tiny_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = end_early(tiny_lm())
    whole = generate(lm, PROMPTS, SamplingConfig(max_new_tokens=8), seed=0)
    monkeypatch.setattr("qinglan.models.engine.MAX_PREFILL_TOKENS", 9)
    assert [[s.token_ids for s in row] for row in generate(lm, PROMPTS, SamplingConfig(max_new_tokens=8), seed=0)] == [
        [s.token_ids for s in row] for row in whole
    ]


def test_end_token_is_kept_and_the_longest_row_is_judged_by_its_own_end(tiny_lm: MakeLM) -> None:
    lm = tiny_lm()
    end = lm.chat.end_id
    at_limit = forced_prefix([20, 21, 22, end])  # ends exactly at the limit: finished, not cut
    earlier = forced_prefix([20, end])
    cut = forced_prefix([20, 21, 22, 23])
    samples = generate(lm, [[1, 2]] * 3, SamplingConfig(max_new_tokens=4), seed=0, forced=[at_limit, earlier, cut])
    reasons = [row[0].finish_reason for row in samples]
    assert reasons == ["eos", "eos", "length"]
    assert [row[0].token_ids for row in samples] == [[20, 21, 22, end], [20, end], [20, 21, 22, 23]]
    assert samples[0][0].text == decode_text(lm, [20, 21, 22]).strip()


def test_top_k_and_top_p_are_renormalised(tiny_lm: MakeLM) -> None:
    lm = end_early(tiny_lm())
    config = SamplingConfig(max_new_tokens=10, temperature=0.8, top_k=12, top_p=0.7)
    for prompt, row in zip(PROMPTS, generate(lm, PROMPTS, config, seed=2, num_samples=2), strict=True):
        for sample in row:
            so_far = list(prompt)
            for token, logprob in zip(sample.token_ids, sample.logprobs, strict=True):
                order = plain_logits(lm, so_far).div(0.8).softmax(-1).sort(descending=True)
                kept = order.values[:12] / order.values[:12].sum()
                count = next(k for k in range(1, 13) if kept[:k].sum() >= 0.7)  # the smallest set with that mass
                place = order.indices[:count].tolist().index(token)
                assert logprob == pytest.approx(float((kept[place] / kept[:count].sum()).log()), abs=2e-5)
                so_far.append(token)


def test_filters_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert filtered(logits, 2, 1.0).isfinite().tolist() == [[True, True, False, False]]
    assert filtered(logits, 0, 0.75).isfinite().tolist() == [[True, True, False, False]]
    assert filtered(logits, 0, 0.85).isfinite().tolist() == [[True, True, True, False]]
    assert filtered(logits, 0, 1e-9).isfinite().tolist() == [[True, False, False, False]]
    uniforms = torch.tensor([0.6], dtype=torch.float64)  # of (0.5, 0.3) / 0.8: 0.625 and 0.375
    token, logprob, _ = draw(logits, uniforms, temperature=1.0, top_k=2)
    assert (token.item(), logprob.exp().item()) == (0, pytest.approx(0.625))
    allowed = torch.tensor([[False, True, True, False]])
    token, logprob, _ = draw(logits, torch.tensor([0.9], dtype=torch.float64), temperature=1.0, allowed=allowed)
    assert (token.item(), logprob.exp().item()) == (2, pytest.approx(1 / 3))
    token, logprob, _ = draw(logits, uniforms, temperature=0.0, allowed=allowed)
    assert (token.item(), logprob.exp().item()) == (1, pytest.approx(2 / 3))


def test_extreme_uniforms_never_draw_what_is_excluded() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).repeat(2, 1)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms, temperature=1.0).token_ids.tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_step_follows_the_distribution(tiny_lm: MakeLM, temperature: float) -> None:
    lm = tiny_lm()
    num_samples = 2000
    config = SamplingConfig(max_new_tokens=1, temperature=temperature)
    (row,) = generate(lm, [[3, 1, 4]], config, seed=11, num_samples=num_samples)
    expected = (plain_logits(lm, [3, 1, 4]).double() / temperature).softmax(-1) * num_samples
    seen = torch.bincount(torch.tensor([sample.token_ids[0] for sample in row]), minlength=len(expected)).double()
    rare = expected < 5
    pooled = [[*counts[~rare].tolist(), float(counts[rare].sum())] for counts in (seen, expected)]
    assert chisquare(*pooled).pvalue > 1e-3


def test_stop_texts(tiny_lm: MakeLM) -> None:
    lm = never_end(tiny_lm())
    encode = lm.tokenizer.encode
    config = SamplingConfig(max_new_tokens=30, stop=("the end", "\n\n"))
    whole = [encode(" all in the endless\n\n then"), encode("one\n\ntwo"), encode("é the\n end" + "x" * 40)]
    samples = flat(generate(lm, [[1, 2]] * 3, config, seed=0, forced=[forced_prefix(token_ids) for token_ids in whole]))
    assert [sample.finish_reason for sample in samples] == ["stop", "stop", "length"]
    assert [sample.text for sample in samples[:2]] == ["all in", "one"]
    for sample, token_ids in zip(samples, whole, strict=True):
        assert sample.token_ids == token_ids[: len(sample.token_ids)]  # as sampled, never made again from the text
    assert decode_text(lm, samples[0].token_ids).endswith("the end")
    assert samples[2].text.startswith("é the\n end")


def test_constraints_in_the_middle_of_a_completion(tiny_lm: MakeLM) -> None:
    lm = never_end(tiny_lm())
    quote = [30, 31, 32]
    choices = {50, 51, 52}

    def constraint(so_far: Sequence[int]) -> Sequence[int] | set[int] | None:
        if len(so_far) == 2:
            return quote
        return choices if len(so_far) in (5, 6) else None

    config = SamplingConfig(max_new_tokens=10, max_rows=3)
    free, bound = generate(
        lm, [[1, 2, 3]] * 2, config, seed=0, num_samples=5, keys=["same", "same"], forced=[None, constraint]
    )
    for one, two in zip(free, bound, strict=True):
        assert (
            two.token_ids[:2] == one.token_ids[:2]
        )  # a neighbour's constraint changes nothing, nor does one's own yet
        assert two.token_ids[2:5] == quote
        assert two.logprobs[2:5] == [0, 0, 0]
        assert set(two.token_ids[5:7]) <= choices
        for place in (5, 6):
            kept = plain_logits(lm, [1, 2, 3, *two.token_ids[:place]])[sorted(choices)].log_softmax(-1)
            assert two.logprobs[place] == pytest.approx(float(kept[two.token_ids[place] - 50]), abs=1e-5)
        expected = plain_logprobs(lm, [1, 2, 3], two.token_ids, 1.0)
        assert two.logprobs[7:] == pytest.approx(expected[7:].tolist(), abs=1e-5)
    assert len({tuple(sample.token_ids) for sample in bound}) > 1


@pytest.mark.parametrize("answer", [[], set(), [10**6], {-1, 3}])
def test_impossible_constraints_are_refused(tiny_lm: MakeLM, answer: Sequence[int] | set[int]) -> None:
    with pytest.raises(InputError, match="constraint of prompt 0: after 0 tokens"):
        generate(tiny_lm(), [[1]], SamplingConfig(), seed=0, forced=[lambda so_far: answer])


def test_memory_budget_decides_how_many_rows_are_live(tiny_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qinglan.models.generate.packed_bytes", lambda *_: 0)  # as some processors have it
    lm = end_early(tiny_lm(), every=6)
    seen: list[int] = []
    step = Engine.step

    def counting_step(self: Engine) -> None:
        seen.append(self.num_slots)
        step(self)

    monkeypatch.setattr(Engine, "step", counting_step)
    drawn = [
        generate(lm, [[1, 2, 3]], SamplingConfig(max_new_tokens=200, memory_budget_mib=mib), seed=0, num_samples=40)
        for mib in (1, 1024)
    ]
    # 2 layers x (8 keys + 8 values) x 4 bytes x 203 tokens, and 24 bytes for each of 267 logits: 32 KiB a row. The
    # prompt is kept apart while samples of it wait.
    assert sorted(set(seen)) == [(2**20 - 128 * 203) // (128 * 203 + 24 * 267), 40]
    assert [[s.token_ids for s in row] for row in drawn[0]] == [[s.token_ids for s in row] for row in drawn[1]]


def test_a_budget_that_holds_no_row_is_refused(tiny_lm: MakeLM) -> None:
    lm = tiny_lm()
    lm.model.config.max_position_embeddings = 10**6
    with pytest.raises(InputError, match=r"memory_budget_mib: 1 MiB hold no row; a row of 20001 tokens takes 3 MiB"):
        generate(lm, [[1]], SamplingConfig(max_new_tokens=20_000, memory_budget_mib=1), seed=0)


def test_requests_that_make_no_sense_are_refused(tiny_lm: MakeLM) -> None:
    lm = tiny_lm()
    with pytest.raises(InputError, match="prompt 1: its 200 tokens and max_new_tokens 64 exceed the context"):
        generate(lm, [[1], [1] * 200], SamplingConfig(), seed=0)
    with pytest.raises(InputError, match="prompt 0: has no tokens"):
        generate(lm, [[]], SamplingConfig(), seed=0)
    with pytest.raises(InputError, match="num_samples: got 0"):
        generate(lm, [[1]], SamplingConfig(), seed=0, num_samples=0)
    with pytest.raises(InputError, match="keys: got 1 for 2 prompts"):
        generate(lm, [[1], [2]], SamplingConfig(), seed=0, keys=["a"])
    with pytest.raises(InputError, match="can never appear"):
        generate(lm, [[1]], SamplingConfig(stop=("<|im_end|>",)), seed=0)
    with pytest.raises(ValueError, match="stop: an empty text"):
        SamplingConfig(stop=("",))
    assert generate(lm, [], SamplingConfig(), seed=0) == []


def test_damaged_weights_are_named(tiny_lm: MakeLM) -> None:
    lm = tiny_lm()
    lm.model.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match=r"tiny-llama: its logits are not numbers"):
        generate(lm, [[1, 2]], SamplingConfig(), seed=0)


def test_a_model_without_keys_and_values_is_exact_and_says_so_once(
    tiny_lm: MakeLM, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = tiny_lm()
    sizes = MambaConfig(
        vocab_size=len(lm.tokenizer), hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=2
    )
    torch.manual_seed(0)
    lm = end_early(lm._replace(model=MambaForCausalLM(sizes).eval(), name="mamba"))
    config = SamplingConfig(max_new_tokens=8, max_rows=4)
    samples = generate(lm, PROMPTS, config, seed=0, num_samples=2)
    for prompt, row in zip(PROMPTS, samples, strict=True):
        for sample in row:
            expected = plain_logprobs(lm, prompt, sample.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-5, rtol=0)
    assert generate(lm, PROMPTS, config, seed=0, num_samples=2) == samples
    said = capsys.readouterr().err
    assert said.count("sampling from mamba: its layers are not known to keep plain keys and values") == 1


def test_slots_that_change_the_logits_are_not_used(
    tiny_lm: MakeLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = generate(end_early(tiny_lm()), PROMPTS, SamplingConfig(max_new_tokens=8), seed=0)
    prefill = SlotCache.prefill
    monkeypatch.setattr(SlotCache, "prefill", lambda self, prompts, *to: prefill(self, [p[::-1] for p in prompts], *to))
    lm = end_early(tiny_lm())
    assert [row[0].token_ids for row in generate(lm, PROMPTS, SamplingConfig(max_new_tokens=8), seed=0)] == [
        row[0].token_ids for row in expected
    ]
    assert row_memory.model_facts(lm.model, lm.name, None).plan is None
    assert "with a cache by slots its logits change" in capsys.readouterr().err


def test_bf16_matmuls_sample_from_nearly_the_same_distribution(tiny_lm: MakeLM) -> None:
    lm = never_end(tiny_lm("llama"))._replace(device=Device(torch.device("cpu"), torch.bfloat16))
    for prompt, (sample,) in zip(
        PROMPTS, generate(lm, PROMPTS, SamplingConfig(max_new_tokens=10), seed=0), strict=True
    ):
        expected = plain_logprobs(lm, prompt, sample.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=0.2, rtol=0)


def test_the_model_is_left_as_it_was(tiny_lm: MakeLM) -> None:
    lm = tiny_lm()
    lm.model.train()
    generate(lm, PROMPTS, SamplingConfig(max_new_tokens=4), seed=0)
    assert lm.model.training
    lm.model(input_ids=torch.tensor([PROMPTS[0]])).logits.sum().backward()  # no inference tensor stayed behind


def test_completion_records(tiny_lm: MakeLM) -> None:
    lm = tiny_lm()
    prompts = [
        Prompt(
            id=f"prompt-{number}",
            source="human",
            producer_id="someone",
            prompt_group_id=f"group-{number}",
            split="test",
            messages=(Message(role="user", content=text),),
        )
        for number, text in enumerate(["Which colour?", "Why?"])
    ]
    config = SamplingConfig(max_new_tokens=6, temperature=0.9)
    records = sample_completions(lm, prompts, config, seed=4, num_samples=3)
    ids = [record.id for row in records for record in row]
    assert len(set(ids)) == 6
    first = records[0][0]
    assert (first.source, first.split, first.prompt_id, first.parents) == ("policy", "test", "prompt-0", ("prompt-0",))
    assert first.sampler is not None and first.sampler.temperature == 0.9 and first.sampler.seed == 4
    assert first.token_ids is not None and first.text == lm.chat.text_of(first.token_ids)
    backwards = sample_completions(lm, prompts[::-1], config, seed=4, num_samples=3)[::-1]
    assert [record.id for row in backwards for record in row] == ids


def test_a_prompt_of_one_token_is_drawn_the_same_alone_and_beside_longer_ones(tiny_lm: MakeLM) -> None:
    lm, config = tiny_lm("llama"), SamplingConfig(max_new_tokens=6)
    (alone,) = generate(lm, [[40]], config, seed=0)[0]
    beside = generate(lm, [[40], [5, 6, 7, 8]], config, seed=0)[0][0]
    assert alone.token_ids == beside.token_ids and alone.logprobs == pytest.approx(beside.logprobs, abs=1e-5)
