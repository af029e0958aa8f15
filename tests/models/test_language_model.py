"""Batched log-probabilities against a one-token-at-a-time loop; padding, packing, chunks, loading, saving."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, CPU, make_sequences, make_tiny_lm
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, CohereConfig, GraniteConfig

from qinglan.core.errors import InputError
from qinglan.models import language_model
from qinglan.models.attention import NAME
from qinglan.models.directory import write_model_directory
from qinglan.models.language_model import (
    LanguageModel,
    TokenSequence,
    check_batching,
    completion_logprobs,
    copy_language_model,
    hidden_states,
    load_language_model,
    max_context,
    save_language_model,
    target_logprobs,
    target_states,
    token_logprobs,
    vocabulary_logits,
)
from qinglan.models.tokens import collate

VARIANTS = [
    (name, kind, kind == "eager")  # in one of the two, padding is an end token
    for name in ARCHITECTURES
    for kind in ("sdpa", "eager")
    if (name, kind) != ("gemma2", "sdpa")
]


def slow_logprobs(lm: LanguageModel, sequence: TokenSequence, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The oracle: for each target, run the whole model on what stands before it and read its last logits."""
    logprobs, entropies = [], []
    for t in range(sequence.num_prompt_tokens, len(sequence.token_ids)):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([sequence.token_ids[:t]]), use_cache=False).logits[0, -1]
        probs = torch.softmax(logits.double() / temperature, dim=-1)
        logprobs.append(probs[sequence.token_ids[t]].log())
        entropies.append(-(probs * probs.log()).sum())
    return torch.tensor(logprobs).float(), torch.tensor(entropies).float()


def by_sequence(lm: LanguageModel, sequences: list[TokenSequence], **layout: object) -> list[Tensor]:
    batch = collate(sequences, **layout)
    found = target_logprobs(lm.model, target_states(lm.model, batch), batch).logprobs.split(batch.lengths)
    return [values for _, values in sorted(zip([s.original for s in batch.sequence_rows], found, strict=True))]


@pytest.mark.parametrize(("architecture", "attention", "pad_is_eos"), VARIANTS)
def test_padded_packed_and_single_equal_the_one_token_loop(architecture, attention, pad_is_eos):
    lm = make_tiny_lm(architecture, pad_is_eos=pad_is_eos, attention=attention)
    assert lm.model.config._attn_implementation == (NAME if attention == "sdpa" else attention)
    sequences = make_sequences(lm)
    slow = [slow_logprobs(lm, sequence)[0] for sequence in sequences]
    assert max(values.abs().max() for values in slow if len(values)) > 1  # far from uniform, or nothing is tested
    layouts = {
        "padded": {},
        "padding of 3": {"extra_columns": 3},
        "padding of 17": {"extra_columns": 17},
        "one row": {"rows": [[3, 0, 4, 1, 5, 2]]},
        "two rows": {"rows": [[2, 4, 1], [0, 5, 3]], "extra_columns": 2},
    }
    for name, layout in layouts.items():
        fast = by_sequence(lm, sequences, **layout)
        for index, (expected, got) in enumerate(zip(slow, fast, strict=True)):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0, msg=lambda m, n=name, i=index: f"{n} {i}: {m}")
    single = [by_sequence(lm, [sequence])[0] for sequence in sequences]
    listed = completion_logprobs(lm, sequences, max_tokens=20)
    for expected, got, also in zip(slow, single, listed, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(also, expected, atol=1e-5, rtol=0)
    check_batching(lm.model)


def gradients(lm: LanguageModel, sequences: list[TokenSequence], layouts: list[dict], **options: object) -> Tensor:
    lm.model.zero_grad()
    for layout in layouts:
        batch = collate(sequences, **layout)
        found = target_logprobs(lm.model, target_states(lm.model, batch), batch, **options)
        weights = torch.cos(batch.input_ids[batch.target_mask].float())  # a different weight for each target
        (found.logprobs * weights + 0.3 * found.entropy * weights**2).sum().backward()
    return torch.cat([p.grad.flatten() for p in lm.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_do_not_depend_on_the_layout_or_the_chunks(architecture):
    lm = make_tiny_lm(architecture, pad_is_eos=True)
    sequences = make_sequences(lm)
    alone = gradients(lm, sequences, [{"rows": [[index]]} for index in range(len(sequences))])
    scale = alone.abs().max()
    for layout in ({"extra_columns": 17}, {"rows": [[3, 4, 1], [2, 0, 5]]}):
        torch.testing.assert_close(gradients(lm, sequences, [layout]) / scale, alone / scale, atol=1e-5, rtol=0)
        chunked = gradients(lm, sequences, [layout], chunk_tokens=4)
        torch.testing.assert_close(chunked / scale, alone / scale, atol=1e-5, rtol=0)


def test_chunks_leave_values_as_they_are(tiny_lm):
    lm = tiny_lm("gemma2")
    batch = collate(make_sequences(lm))
    states = target_states(lm.model, batch)
    whole = target_logprobs(lm.model, states, batch)
    for chunk in (1, 4, 7, 1000):
        part = target_logprobs(lm.model, states, batch, chunk_tokens=chunk)
        torch.testing.assert_close(part.logprobs, whole.logprobs, atol=1e-6, rtol=0)
        torch.testing.assert_close(part.entropy, whole.entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_temperature_divides_the_logits_of_logprob_and_entropy(architecture, temperature):
    lm = make_tiny_lm(architecture)
    sequences = make_sequences(lm)[:3]
    batch = collate(sequences)
    got = target_logprobs(lm.model, target_states(lm.model, batch), batch, temperature=temperature)
    slow = [slow_logprobs(lm, sequence, temperature) for sequence in sequences]
    torch.testing.assert_close(got.logprobs, torch.cat([s[0] for s in slow]), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.entropy, torch.cat([s[1] for s in slow]), atol=2e-5, rtol=0)
    listed = completion_logprobs(lm, sequences, temperature=temperature)
    torch.testing.assert_close(torch.cat(listed), got.logprobs.detach(), atol=1e-6, rtol=0)


def test_logprobs_of_all_tokens_sum_to_one_and_bound_the_entropy(tiny_lm):
    lm = tiny_lm("qwen3")
    every = [TokenSequence([5, 9, token], 2) for token in range(len(lm.tokenizer))]
    batch = collate(every)
    found = target_logprobs(lm.model, target_states(lm.model, batch), batch)
    assert found.logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    expected = -(found.logprobs.exp() * found.logprobs).sum()  # each row has the same distribution, hence one entropy
    torch.testing.assert_close(found.entropy, expected.expand(len(every)), atol=1e-4, rtol=0)
    assert found.entropy.max() < torch.tensor(float(len(lm.tokenizer))).log()


def test_temperature_zero_and_unasked_entropy_do_not_pass_silently(tiny_lm):
    lm = tiny_lm()
    batch = collate(make_sequences(lm))
    states = target_states(lm.model, batch)
    assert target_logprobs(lm.model, states, batch, with_entropy=False).entropy.isnan().all()
    with pytest.raises(InputError, match="temperature"):
        target_logprobs(lm.model, states, batch, temperature=0.0)


def test_an_entropy_that_is_only_measured_is_the_same_number_without_a_gradient(tiny_lm):
    lm = tiny_lm()
    batch = collate(make_sequences(lm))
    states, targets = target_states(lm.model, batch), batch.input_ids[batch.target_mask]
    learnt, measured = (token_logprobs(lm.model, states, targets, entropy_gradient=flag) for flag in (True, False))
    assert torch.equal(learnt.entropy, measured.entropy) and torch.equal(learnt.logprobs, measured.logprobs)
    assert learnt.entropy.requires_grad and measured.logprobs.requires_grad and not measured.entropy.requires_grad


def test_the_end_token_is_a_target_and_the_prompt_is_not(tiny_lm):
    lm = tiny_lm(pad_is_eos=True)
    eos = lm.tokenizer.eos_token_id
    batch = collate([TokenSequence([1, eos, 3, eos], 2), TokenSequence([4, 5, 6, 7, 8, eos], 3)])
    assert batch.target_mask.tolist() == [
        [False, False, True, True, False, False],
        [False, False, False, True, True, True],
    ]
    head = lm.model.get_output_embeddings()
    found = target_logprobs(lm.model, target_states(lm.model, batch), batch)
    (gradient,) = torch.autograd.grad(found.logprobs[1], head.weight)
    assert gradient[eos].norm() > 0  # log p(eos): raising its logit pays


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_the_end_tokens_embedding_learns_even_where_it_is_the_padding_token(pad_is_eos):
    lm = make_tiny_lm("llama", pad_is_eos=pad_is_eos)
    eos = lm.tokenizer.eos_token_id
    batch = collate([TokenSequence([1, eos, 3, 4], 2)])
    target_logprobs(lm.model, target_states(lm.model, batch), batch).logprobs.sum().backward()
    assert lm.model.get_input_embeddings().weight.grad[eos].norm() > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_poisoned_padding_does_not_leak(architecture):
    lm = make_tiny_lm(architecture)
    sequences = make_sequences(lm)
    batch = collate(sequences, extra_columns=3)
    clean = hidden_states(lm.model, batch)
    poisoned = clean.masked_fill(~batch.real_mask[..., None], torch.nan)
    rows, columns = batch.target_mask.nonzero(as_tuple=True)
    torch.testing.assert_close(target_states(lm.model, batch), poisoned[rows, columns - 1], atol=1e-6, rtol=1e-5)

    other_ids = torch.where(batch.real_mask, batch.input_ids, torch.arange(batch.input_ids.shape[1]) + 7)
    changed = batch._replace(input_ids=other_ids)
    hidden = hidden_states(lm.model, changed)
    torch.testing.assert_close(hidden[batch.real_mask], clean[batch.real_mask], atol=1e-6, rtol=0)


def test_padding_never_holds_the_padding_token(tiny_lm):
    lm = tiny_lm("llama")
    sequences = [TokenSequence([1, 2, 3, 4, 5], 1), TokenSequence([6, 7], 1)]
    clean = completion_logprobs(lm, sequences)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.chat.pad_id] = torch.nan
    for before, after in zip(clean, completion_logprobs(lm, sequences), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_trunk_computes_no_logits_and_the_head_equals_the_models_own(architecture):
    lm = make_tiny_lm(architecture)
    batch = collate([TokenSequence(list(range(9)), 1)])
    theirs = lm.model(input_ids=batch.input_ids).logits
    ours = vocabulary_logits(lm.model, hidden_states(lm.model, batch))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    def refuse(*_):
        raise AssertionError("the unembedding was called")

    handle = lm.model.get_output_embeddings().register_forward_hook(refuse)
    hidden_states(lm.model, batch)
    handle.remove()


def test_logits_are_computed_for_targets_only(tiny_lm, monkeypatch):
    lm = tiny_lm()
    seen = []
    monkeypatch.setattr(
        language_model, "vocabulary_logits", lambda m, h: seen.append(h.shape) or vocabulary_logits(m, h)
    )
    completion_logprobs(lm, [TokenSequence(list(range(40)), 37)])
    assert seen == [(3, 16)]


@pytest.mark.parametrize("num_targets", [0, 1, 37, 587])
def test_rows_that_fill_up_change_no_logprob_entropy_or_gradient(tiny_lm, num_targets):
    lm = tiny_lm()
    head = lm.model.get_output_embeddings()
    states = torch.randn(num_targets, head.in_features, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(num_targets) % head.out_features
    found_states, plain_states = states.clone().requires_grad_(), states.clone().requires_grad_()
    found = token_logprobs(lm.model, found_states, targets)
    every = (plain_states @ head.weight.T).log_softmax(-1)
    plain = every.gather(-1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)
    torch.testing.assert_close((found.logprobs, found.entropy), plain, atol=1e-5, rtol=1e-5)
    (found.logprobs.sum() + found.entropy.sum()).backward()
    (plain[0].sum() + plain[1].sum()).backward()
    torch.testing.assert_close(found_states.grad, plain_states.grad, atol=1e-5, rtol=1e-5)


def test_logits_have_few_sizes(tiny_lm, monkeypatch):
    lm, sizes = tiny_lm(), set()
    real = language_model.vocabulary_logits
    monkeypatch.setattr(language_model, "vocabulary_logits", lambda model, x: sizes.add(len(x)) or real(model, x))
    width = lm.model.get_output_embeddings().in_features
    for num_targets in range(512, 1025):  # between two powers of two there are sixteen
        token_logprobs(lm.model, torch.zeros(num_targets, width), torch.zeros(num_targets, dtype=torch.long))
    assert sizes == set(range(512, 1025, 32))


def test_too_long_a_sequence_is_refused_with_its_length(tiny_lm):
    lm = tiny_lm("gpt2")
    assert max_context(lm.model) == 256
    fits = TokenSequence([1] * 256, 255)
    assert completion_logprobs(lm, [fits])[0].isfinite().all()
    with pytest.raises(InputError, match=r"257 tokens.*256 tokens"):
        completion_logprobs(lm, [TokenSequence([1] * 257, 255)])


def test_learned_positions_survive_padding_beyond_the_context(tiny_lm):
    lm = tiny_lm("gpt2")
    sequences = [TokenSequence([1, 2, 3, 4], 1), TokenSequence([5, 6, 7], 1)]
    for layout in ({"extra_columns": 300}, {"rows": [[0, 1]], "extra_columns": 300}):
        for expected, got in zip(completion_logprobs(lm, sequences), by_sequence(lm, sequences, **layout), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_architectures_that_cannot_be_packed_are_refused():
    sizes = {"vocab_size": 50, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    bloom = AutoModelForCausalLM.from_config(BloomConfig(**sizes, n_layer=1, n_head=2, initializer_range=0.3))
    assert max_context(bloom) == sys.maxsize
    with pytest.raises(InputError, match=r"BloomForCausalLM.*packed"):
        check_batching(bloom)


def test_a_model_without_a_trunk_is_refused(tiny_lm, tmp_path, monkeypatch):
    lm = tiny_lm()
    save_language_model(lm, tmp_path / "model")
    monkeypatch.setattr(type(lm.model), "base_model_prefix", "absent")  # as Llama4ForCausalLM has it
    with pytest.raises(InputError, match="LlamaForCausalLM has no trunk that gives hidden states"):
        load_language_model(tmp_path / "model", CPU)


@pytest.mark.parametrize("config_class", [CohereConfig, GraniteConfig])
def test_scaled_logits_equal_the_models_own(config_class):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    scale = {"logit_scale": 0.5} if config_class is CohereConfig else {"logits_scaling": 3.0}
    config = config_class(**sizes, **scale, num_hidden_layers=1, bos_token_id=1, eos_token_id=1, pad_token_id=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = collate([TokenSequence(list(range(9)), 1)])
    theirs = model(input_ids=batch.input_ids).logits
    torch.testing.assert_close(vocabulary_logits(model, hidden_states(model, batch)), theirs, atol=1e-5, rtol=0)
    check_batching(model)


def test_an_architecture_that_mixes_packed_sequences_is_caught(tiny_lm, monkeypatch):
    lm = tiny_lm("llama")
    forward = lm.model.base_model.forward
    monkeypatch.setattr(
        lm.model.base_model, "forward", lambda input_ids, position_ids, **rest: forward(input_ids=input_ids, **rest)
    )
    with pytest.raises(InputError, match="packed"):
        check_batching(lm.model)


def test_bf16_matmuls_keep_fp32_logprobs(tiny_lm):
    lm = tiny_lm()
    half = lm._replace(device=lm.device._replace(compute_dtype=torch.bfloat16))
    sequences = make_sequences(lm)
    for exact, rough in zip(completion_logprobs(lm, sequences), completion_logprobs(half, sequences), strict=True):
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, exact, atol=0.5, rtol=0)
    with half.device.autocast():
        logits = vocabulary_logits(lm.model, torch.randn(3, 16).bfloat16())
    assert logits.dtype == torch.float32


def test_memory_of_logits_is_bounded_by_the_chunk(tiny_lm):
    """Only a chunk's logits exist at once, in the backward pass as well: saved tensors do not grow by N * V."""
    lm = tiny_lm()
    batch = collate([TokenSequence([1] * 200, 1)] * 8)
    states = target_states(lm.model, batch).detach().requires_grad_()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        target_logprobs(lm.model, states, batch, chunk_tokens=16)
    assert max(saved) < 8 * 199 * len(lm.tokenizer)


# Loading and saving


def same_weights(a: LanguageModel, b: LanguageModel) -> bool:
    theirs = b.model.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.model.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("template", ["own", "plain"])
def test_save_and_load_give_the_same_model(architecture, template, tmp_path):
    lm = make_tiny_lm(architecture, pad_is_eos=architecture == "gpt2", template=template)
    save_language_model(lm, tmp_path / "model")
    again = load_language_model(tmp_path / "model", CPU)  # the plain template travels with the tokenizer
    assert same_weights(lm, again)
    assert again.chat.render_hash == lm.chat.render_hash
    assert not again.model.training
    sequences = make_sequences(lm)
    for before, after in zip(completion_logprobs(lm, sequences), completion_logprobs(again, sequences), strict=True):
        assert torch.equal(before, after)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.config.pad_token_id == lm.chat.pad_id
    assert set(theirs.generation_config.eos_token_id) == lm.chat.end_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == lm.chat.template
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bf16_files_become_fp32_weights(tiny_lm, tmp_path):
    lm = tiny_lm("qwen2")
    save_language_model(lm, tmp_path / "model")
    copy_language_model(lm).model.bfloat16().save_pretrained(tmp_path / "model")
    again = load_language_model(tmp_path / "model", CPU)
    assert {parameter.dtype for parameter in again.model.parameters()} == {torch.float32}
    assert torch.equal(next(again.model.parameters()), next(lm.model.parameters()).bfloat16().float())


def test_dropout_is_off_even_in_training_mode(tiny_lm, tmp_path):
    lm = tiny_lm("gpt2")
    lm.model.config.resid_pdrop = lm.model.config.attn_pdrop = 0.5
    save_language_model(lm, tmp_path / "model")
    again = load_language_model(tmp_path / "model", CPU)
    again.model.train()
    sequences = make_sequences(lm)
    assert torch.equal(completion_logprobs(again, sequences)[0], completion_logprobs(lm, sequences)[0])


def test_copy_shares_no_weight_and_keeps_tied_ones_tied(tiny_lm):
    lm = tiny_lm("gemma2")
    copy = copy_language_model(lm, name="reference")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.zero_()
    assert copy.model.get_input_embeddings().weight.abs().sum() > 0
    assert copy.model.get_output_embeddings().weight is copy.model.get_input_embeddings().weight
    assert (copy.name, copy_language_model(lm).name) == ("reference", lm.name)


def test_loading_refuses_what_is_not_a_whole_model(tiny_lm, tmp_path):
    lm = tiny_lm()
    directory = tmp_path / "model"
    with pytest.raises(InputError, match="no such directory"):
        load_language_model(directory, CPU)
    directory.mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        load_language_model(directory, CPU)
    save_language_model(lm, directory)

    (directory / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="--template plain"):
        load_language_model(directory, CPU)
    assert load_language_model(directory, CPU, template="plain").chat.end_id == lm.tokenizer.eos_token_id

    save_language_model(lm, directory)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_language_model(directory, CPU)
    weights.unlink()
    with pytest.raises(InputError, match="damaged"):
        load_language_model(directory, CPU)

    save_language_model(lm, directory)
    lm.model.base_model.save_pretrained(directory)  # the trunk alone: no unembedding
    with pytest.raises(InputError, match=r"missing.*lm_head"):
        load_language_model(directory, CPU)

    save_language_model(lm, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    with pytest.raises(InputError, match="tokenizer"):
        load_language_model(directory, CPU)


def test_weights_of_another_shape_are_refused(tiny_lm, tmp_path):
    save_language_model(tiny_lm(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 48}))
    with pytest.raises(InputError, match="opened as a model"):
        load_language_model(tmp_path / "model", CPU)


def test_a_save_that_cannot_take_its_place_puts_the_earlier_model_back(tiny_lm, tmp_path, monkeypatch):
    lm = tiny_lm()
    save_language_model(lm, tmp_path / "model")
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if source.name.endswith(".part"):
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match="No space left"):
        save_language_model(tiny_lm(seed=3), tmp_path / "model")
    assert same_weights(load_language_model(tmp_path / "model", CPU), lm)


def test_a_save_that_fails_leaves_the_earlier_model(tiny_lm, tmp_path):
    lm = tiny_lm()
    save_language_model(lm, tmp_path / "model")

    def fail(part: Path) -> None:
        (part / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        write_model_directory(tmp_path / "model", fail)
    assert same_weights(load_language_model(tmp_path / "model", CPU), lm)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    other = tiny_lm(seed=3)
    save_language_model(other, tmp_path / "model")
    assert same_weights(load_language_model(tmp_path / "model", CPU), other)
