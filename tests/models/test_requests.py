"""What a request may ask for by itself: a prefix, a constrained span, stop texts, a seed; exact as everything else."""

import copy
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from transformers import MambaConfig, MambaForCausalLM

from qinglan.core.errors import InputError
from qinglan.models.constraints import forced_prefix, one_of, one_of_after
from qinglan.models.generate import Request, Sample, SamplingConfig, generate, generate_requests
from qinglan.models.kv_cache import SlotCache, attention_plan
from qinglan.models.language_model import LanguageModel, TokenSequence, completion_logprobs
from tests.conftest import ARCHITECTURES, make_config

MakeLM = Callable[..., LanguageModel]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [40], [60, 61, 62, 63]]
QUOTES = [[30, 31, 99], [30, 32, 99], [33, 99], [30, 31, 34, 35, 99]]  # 99 closes each


def with_ends(lm: LanguageModel, *end_ids: int) -> LanguageModel:
    return lm._replace(chat=lm.chat._replace(end_ids=frozenset(end_ids)))


def forward_logprobs(
    lm: LanguageModel, prompt: Sequence[int], tokens: Sequence[int], temperature: float
) -> list[float]:
    (found,) = completion_logprobs(lm, [TokenSequence([*prompt, *tokens], len(prompt))], temperature=temperature)
    return found.tolist()


def exact_logprobs(lm: LanguageModel, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Return the log-probabilities by transformers' own forward pass in fp64."""
    model = copy.deepcopy(lm.model).double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def plain_distribution(lm: LanguageModel, token_ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0, -1].float()
    return (logits / temperature).softmax(-1)


# -------------------------------------------------------------------------------------------------- exactness, longer


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers_far_beyond_the_window(tiny_lm: MakeLM, architecture: str, pad_is_eos: bool) -> None:
    lm = tiny_lm(architecture, pad_is_eos=pad_is_eos)
    ends = sorted(lm.chat.end_ids)
    samples = generate(lm, PROMPTS, SamplingConfig(temperature=0, max_new_tokens=40), seed=0)
    for prompt, (sample,) in zip(PROMPTS, samples, strict=True):
        with torch.no_grad():
            output = lm.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=40,
                eos_token_id=ends,
                pad_token_id=lm.chat.pad_id,
            )
        assert sample.token_ids == output[0, len(prompt) :].tolist()
        assert sample.logprobs == pytest.approx(exact_logprobs(lm, prompt, sample.token_ids), abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_raw_logprobs_are_those_of_a_forward_pass_whatever_was_left_out(tiny_lm: MakeLM, architecture: str) -> None:
    lm = with_ends(tiny_lm(architecture), 7)
    config = SamplingConfig(max_new_tokens=12, temperature=0.7, top_k=20, top_p=0.8, max_rows=4)
    requests = [
        Request(PROMPTS[0], "a", 0, prefix=[20, 21, 22, 23, 24, 25], constraint=one_of(QUOTES, start=6)),
        Request(PROMPTS[1], "b", 0, prefix=[20]),
        Request(PROMPTS[2], "c", 0, constraint=forced_prefix([50, 51])),
    ]
    for request, row in zip(requests, generate_requests(lm, requests, config, num_samples=3), strict=True):
        for sample in row:
            expected = forward_logprobs(lm, request.prompt, sample.token_ids, 0.7)
            assert sample.raw_logprobs == pytest.approx(expected, abs=1e-5)
            num_forced = len(request.prefix) or 2
            assert sample.logprobs[:num_forced] == [0.0] * num_forced
            assert all(
                drawn >= raw - 1e-5
                for drawn, raw in zip(sample.logprobs[num_forced:], sample.raw_logprobs[num_forced:], strict=True)
            )
            assert sample.logprobs[num_forced:] != sample.raw_logprobs[num_forced:]


def test_with_nothing_left_out_both_logprobs_are_one(tiny_lm: MakeLM) -> None:
    for (sample,) in generate(tiny_lm(), PROMPTS, SamplingConfig(max_new_tokens=8), seed=0):
        assert sample.raw_logprobs == sample.logprobs


# ----------------------------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_prefix_continues_as_the_same_text_in_the_prompt_would(tiny_lm: MakeLM, architecture: str) -> None:
    lm = with_ends(tiny_lm(architecture), *range(0, 267, 9))
    config = SamplingConfig(max_new_tokens=10, temperature=0.8)
    prefixes = [[20, 21, 22, 23, 24, 25, 26], [], [30]]
    requests = [Request(p, str(n), 3, prefix=f) for n, (p, f) in enumerate(zip(PROMPTS, prefixes, strict=True))]
    forked = generate_requests(lm, requests, config, num_samples=4)
    whole = generate(lm, [[*p, *f] for p, f in zip(PROMPTS, prefixes, strict=True)], config, seed=3, num_samples=4)
    for prefix, one, two in zip(prefixes, forked, whole, strict=True):
        for continued, free in zip(one, two, strict=True):
            assert continued.token_ids == [*prefix, *free.token_ids]
            assert continued.logprobs[: len(prefix)] == [0.0] * len(prefix)
            assert continued.logprobs[len(prefix) :] == pytest.approx(free.logprobs, abs=1e-5)
            assert continued.finish_reason == free.finish_reason
            assert continued.text == lm.chat.text_of(continued.token_ids)


def test_prompt_and_prefix_are_computed_once_for_all_continuations(
    tiny_lm: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = with_ends(tiny_lm())
    generate(lm, [[1]], SamplingConfig(max_new_tokens=1), seed=0)  # the trial of the model's slots is over
    prefilled: list[list[int]] = []
    prefill = SlotCache.prefill
    monkeypatch.setattr(
        SlotCache, "prefill", lambda self, prompts, *to: prefilled.extend(prompts) or prefill(self, prompts, *to)
    )
    request = Request([1, 2, 3], "beam", 0, prefix=[4, 5, 6])
    (row,) = generate_requests(lm, [request], SamplingConfig(max_new_tokens=5, max_rows=3), num_samples=8)
    assert prefilled == [[1, 2, 3, 4, 5]]
    assert len({tuple(sample.token_ids) for sample in row}) == 8
    assert {sample.finish_reason for sample in row} == {"length"} and {len(s.token_ids) for s in row} == {8}


def test_prefixes_that_make_no_sense_are_refused(tiny_lm: MakeLM) -> None:
    lm = tiny_lm()
    with pytest.raises(InputError, match="prompt 0: the prefix of its completions holds an end token"):
        generate_requests(lm, [Request([1], "a", 0, prefix=[lm.chat.end_id])], SamplingConfig())
    with pytest.raises(InputError, match="prompt 0: its 201 tokens and max_new_tokens 64 exceed the context"):
        generate_requests(lm, [Request([1], "a", 0, prefix=[2] * 200)], SamplingConfig())


# ---------------------------------------------------------------------------------------------------- spans of choices


def test_spans_by_hand() -> None:
    span = one_of([[1, 2, 9], [1, 3, 9], [4, 9]], start=2)
    assert span([7]) is None
    assert set(span([7, 7])) == {1, 4}
    assert set(span([7, 7, 1])) == {2, 3}
    assert set(span([7, 7, 1, 3])) == {9}
    assert span([7, 7, 1, 3, 9]) is None
    assert span([7, 7, 1, 3, 9, 1]) is None  # what follows is free, though a choice begins so
    assert set(one_of([[1, 2, 3], [1, 2]])([1])) == {2} and one_of([[1, 2, 3], [1, 2]])([1, 2]) is None

    after = one_of_after([5, 5], [[1, 9], [5, 5, 9]])
    assert after([]) is None and after([5]) is None
    assert set(after([5, 5])) == {1, 5}
    assert set(after([0, 5, 5, 5])) == {5}
    assert set(after([0, 5, 5, 5, 5])) == {9}  # a mark inside a span opens nothing
    assert after([0, 5, 5, 5, 5, 9]) is None
    assert set(after([0, 5, 5, 1, 9, 3, 5, 5])) == {1, 5}  # every mark opens a span
    assert after([5, 5, 8, 3]) is None  # a prefix that holds something else is left as it is


@pytest.mark.parametrize("bad", [[], [[1], []]])
def test_spans_without_choices_are_refused(bad: list[list[int]]) -> None:
    with pytest.raises(InputError, match="has no choice, or an empty one"):
        one_of(bad)
    with pytest.raises(InputError, match="the mark has no tokens"):
        one_of_after([], [[1]])


def test_a_span_is_drawn_by_the_models_own_probabilities(tiny_lm: MakeLM) -> None:
    lm = with_ends(tiny_lm())
    num_samples = 800
    request = Request([1, 2, 3], "span", 0, prefix=[4, 5], constraint=one_of(QUOTES, start=2))
    config = SamplingConfig(max_new_tokens=6, temperature=0.7)
    (row,) = generate_requests(lm, [request], config, num_samples=num_samples)

    def walk(choice: list[int]) -> list[float]:
        """Return the renormalised log-probability of each step along a choice, by enumeration."""
        steps = []
        for place, token in enumerate(choice):
            follow = {other[place] for other in QUOTES if other[:place] == choice[:place]}
            mass = plain_distribution(lm, [1, 2, 3, 4, 5, *choice[:place]], 0.7)
            steps.append(float((mass[token] / mass[sorted(follow)].sum()).log()))
        return steps

    counts = [0] * len(QUOTES)
    for sample in row:
        drawn = sample.token_ids[2:]
        (which,) = [n for n, quote in enumerate(QUOTES) if drawn[: len(quote)] == quote]
        assert sample.logprobs[2 : 2 + len(QUOTES[which])] == pytest.approx(walk(QUOTES[which]), abs=1e-5)
        counts[which] += 1
    expected = [num_samples * float(torch.tensor(walk(quote)).sum().exp()) for quote in QUOTES]
    assert sum(expected) == pytest.approx(num_samples, rel=1e-4)  # the choices are all there is
    assert chisquare(counts, [e * sum(counts) / sum(expected) for e in expected]).pvalue > 1e-3
    assert len({tuple(sample.token_ids[-1:]) for sample in row}) > 10  # and then the text is free again


def test_every_mark_in_the_middle_opens_a_span(tiny_lm: MakeLM) -> None:
    lm = with_ends(tiny_lm())
    mark, words = 50, frozenset({50, 60, 61})
    quotes = one_of_after([mark], QUOTES)

    def few_words(so_far: Sequence[int]) -> Sequence[int] | frozenset[int]:
        return quotes(so_far) or words  # outside the quotations only three tokens, so that marks are frequent

    request = Request([1], "marks", 0, prefix=[60, mark], constraint=few_words)
    (row,) = generate_requests(lm, [request], SamplingConfig(max_new_tokens=60), num_samples=6)
    spans = 0
    for sample in row:
        rest = sample.token_ids
        while mark in rest:
            rest = rest[rest.index(mark) + 1 :]
            fitting = [q for q in QUOTES if rest[: len(q)] == q]
            assert fitting or any(q[: len(rest)] == rest for q in QUOTES)  # cut short by the limit at most
            rest = rest[len(fitting[0]) if fitting else len(rest) :]
            spans += 1
    assert spans > len(row)  # more than the mark of the prefix


def everything(lm: LanguageModel) -> tuple[list[Request], SamplingConfig]:
    """Requests of all kinds at once."""
    encode = lm.tokenizer.encode
    requests = [
        Request(PROMPTS[0], "a", 1, prefix=[20, 21], constraint=one_of(QUOTES, start=4)),
        Request(PROMPTS[1], "b", 2, stop=tuple("abcdefghijklmnop0123456789")),
        Request(PROMPTS[2], "c", 3, constraint=one_of_after([40], QUOTES)),
        Request([80, 81], "d", 4, prefix=encode("all in the"), stop=("h",)),
        Request([80, 81], "e", 5, constraint=forced_prefix([33, 34]), stop=()),
    ]
    return requests, SamplingConfig(max_new_tokens=14, temperature=0.9, top_p=0.95, stop=("q",))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "mamba"])
def test_requests_do_not_depend_on_slots_order_or_neighbours(tiny_lm: MakeLM, architecture: str) -> None:
    lm = with_ends(tiny_lm("llama" if architecture == "mamba" else architecture), *range(0, 267, 12))
    if architecture == "mamba":
        sizes = MambaConfig(
            vocab_size=len(lm.tokenizer), hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=2
        )
        torch.manual_seed(0)
        lm = lm._replace(model=MambaForCausalLM(sizes).eval(), name="mamba")
    requests, config = everything(lm)

    def draw(asked: list[Request], rows: int) -> list[list[Sample]]:
        return generate_requests(lm, asked, config.model_copy(update={"max_rows": rows}), num_samples=3)

    together = draw(requests, 512)
    reasons = {sample.finish_reason for row in together for sample in row}
    assert reasons == {"eos", "stop", "length"}
    others = [
        draw(requests, 1),
        draw(requests, 4),
        draw(requests[::-1], 7)[::-1],
        [draw([r], 512)[0] for r in requests],
    ]
    for other, number in product(others, range(len(requests))):
        for one, two in zip(together[number], other[number], strict=True):
            assert (one.token_ids, one.finish_reason, one.text) == (two.token_ids, two.finish_reason, two.text)
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
            assert one.raw_logprobs == pytest.approx(two.raw_logprobs, abs=1e-5)


# --------------------------------------------------------------------------------------------------- stops and seeds


def test_each_request_has_its_own_stop_texts(tiny_lm: MakeLM) -> None:
    lm = with_ends(tiny_lm())
    text = lm.tokenizer.encode(" one two the three four")
    config = SamplingConfig(max_new_tokens=len(text), stop=("three",))
    stops = [None, (), ("two the", "four"), ("ree f",)]
    requests = [
        Request([1], str(number), 0, constraint=forced_prefix(text), stop=stop) for number, stop in enumerate(stops)
    ]
    found = [row[0] for row in generate_requests(lm, requests, config)]
    assert [one.finish_reason for one in found] == ["stop", "length", "stop", "stop"]
    assert [one.text for one in found] == ["one two the", "one two the three four", "one", "one two the th"]
    for one in found:
        assert one.token_ids == text[: len(one.token_ids)] == text[: len(one.logprobs)]  # the tokens stay


def test_a_stop_text_in_the_prefix_is_past_but_may_be_completed_behind_it(tiny_lm: MakeLM) -> None:
    lm = with_ends(tiny_lm())
    encode = lm.tokenizer.encode
    prefix = encode("a``` b")
    config = SamplingConfig(max_new_tokens=12, stop=("```", "bcd"))
    quoted = Request([1], "a", 0, prefix=prefix, constraint=forced_prefix(prefix + encode(" c``` d")))
    across = Request([1], "b", 0, prefix=prefix, constraint=forced_prefix(prefix + encode("cde")))
    (one,), (two,) = generate_requests(lm, [quoted, across], config)
    assert (one.finish_reason, one.text) == ("stop", "a``` b c")
    assert (two.finish_reason, two.text) == ("stop", "a```")


@pytest.mark.parametrize("stop", ["<|im_end|>", "the <|endoftext|>"])
def test_stop_texts_that_can_never_appear_are_refused(tiny_lm: MakeLM, stop: str) -> None:
    lm = tiny_lm()
    with pytest.raises(InputError, match="can never appear in a completion of tiny-llama"):
        generate(lm, [[1]], SamplingConfig(stop=(stop,)), seed=0)
    with pytest.raises(InputError, match="can never appear in a completion of tiny-llama"):
        generate_requests(lm, [Request([1], "a", 0, stop=(stop,))], SamplingConfig())


@pytest.mark.parametrize("stop", ["\n\n", " ", " the", "é", "日本", "x\ty", "```\n"])
def test_stop_texts_of_all_kinds_are_taken(tiny_lm: MakeLM, stop: str) -> None:
    lm = with_ends(tiny_lm())
    text = lm.tokenizer.encode(f"ab{stop}cd")
    (row,) = generate(
        lm, [[1]], SamplingConfig(stop=(stop,), max_new_tokens=len(text)), seed=0, forced=[forced_prefix(text)]
    )
    assert (row[0].finish_reason, row[0].text) == ("stop", "ab")


def test_each_request_has_its_own_seed(tiny_lm: MakeLM) -> None:
    lm = with_ends(tiny_lm())
    config = SamplingConfig(max_new_tokens=10)
    requests = [Request([1, 2], "same", seed) for seed in (0, 1, 0)]
    one, two, three = (row[0].token_ids for row in generate_requests(lm, requests, config))
    assert one == three != two
    assert [generate(lm, [[1, 2]], config, seed=seed, keys=["same"])[0][0].token_ids for seed in (0, 1)] == [one, two]


# ---------------------------------------------------------------------------------------------- memory, kinds of models


def test_the_budget_counts_the_waiting_prompt_and_the_copies_that_filters_make(
    tiny_lm: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qinglan.models.generate.packed_bytes", lambda *_: 0)  # as some processors have it
    lm = with_ends(tiny_lm(), *range(0, 267, 2))  # short completions; the room is for long ones
    made: list[int] = []
    initialise = SlotCache.__init__

    def counting(self: SlotCache, model: object, plan: object, num_slots: int, *rest: object) -> None:
        made.append(num_slots)
        initialise(self, model, plan, num_slots, *rest)

    generate(lm, [[1]], SamplingConfig(max_new_tokens=1), seed=0)
    monkeypatch.setattr(SlotCache, "__init__", counting)
    kept, logits = 128 * 203, 267  # bytes of 203 tokens; size of the vocabulary
    config = SamplingConfig(max_new_tokens=200, memory_budget_mib=1)
    generate(lm, [[1, 2, 3]] * 60, config, seed=0)
    assert made[-1] == 2**20 // (kept + 24 * logits)
    generate(lm, [[1, 2, 3]], config, seed=0, num_samples=60)
    assert made[-1] == (2**20 - kept) // (kept + 24 * logits) + 1
    generate(lm, [[1, 2, 3]] * 60, config.model_copy(update={"top_p": 0.9}), seed=0)
    assert made[-1] == 2**20 // (kept + 57 * logits)


@pytest.mark.parametrize(
    ("changes", "has_slots"),
    [
        ({}, True),
        ({"layer_types": ["full_attention", "chunked_attention"], "attention_chunk_size": 4}, False),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 8,
                }
            },
            False,
        ),
    ],
)
def test_kinds_of_attention_that_slots_cannot_serve_are_known(
    tiny_lm: MakeLM, changes: dict[str, object], has_slots: bool
) -> None:
    lm = tiny_lm()
    config = make_config("llama", len(lm.tokenizer))
    for name, value in changes.items():
        setattr(config, name, value)
    lm.model.config = config
    assert (attention_plan(lm.model) is not None) == has_slots
