"""LoRA: an untouched base, directories that PEFT opens with the same numbers, merging, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, make_sequences, make_tiny_lm
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from torch import Tensor

from qinglan.core.errors import InputError
from qinglan.models import heads
from qinglan.models.adapters import LoRAConfig, adapter_of, trainable_copy
from qinglan.models.heads import ScalarModel, load_scalar_model, save_scalar_model, scalar_model_from, score_sequences
from qinglan.models.language_model import (
    LanguageModel,
    completion_logprobs,
    copy_language_model,
    end_of_training,
    load_language_model,
    save_language_model,
    start_of_training,
)

KINDS = ["llama", "qwen2", "gpt2", "gemma2", "gemma3"]  # qwen2, gpt2 and gemma have tied heads
LORA = LoRAConfig(rank=3, alpha=6.0)


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> LanguageModel:
    """A model of the named architecture (llama by default) that lies in a directory."""
    save_language_model(make_tiny_lm(getattr(request, "param", "llama")), tmp_path / "base")
    return load_language_model(tmp_path / "base", CPU)


def move(model: torch.nn.Module) -> None:
    """Stand in for training: give every trainable weight another value."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))


def adapted(base: LanguageModel, lora: LoRAConfig = LORA) -> LanguageModel:
    student = start_of_training(base, lora, seed=1, name="student")
    move(student.model)
    return student


def logprobs(lm: LanguageModel) -> Tensor:
    return torch.cat(completion_logprobs(lm, make_sequences(lm)))


def plain_logprobs(model: torch.nn.Module, lm: LanguageModel) -> Tensor:
    """Log-probabilities of the same targets by the model's own forward pass, one sequence at a time."""
    found = []
    for sequence in make_sequences(lm):
        ids = torch.tensor([sequence.token_ids])
        with torch.no_grad():
            all_logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(all_logprobs.gather(1, ids[0, 1:, None])[sequence.num_prompt_tokens - 1 :, 0])
    return torch.cat(found)


@pytest.mark.parametrize("base", KINDS, indirect=True)
def test_a_new_adapter_changes_nothing_and_only_it_is_trained(base):
    student = start_of_training(base, LORA, seed=1, name="student")
    assert torch.equal(logprobs(student), logprobs(base))
    trained = {name for name, p in student.model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert all(p.requires_grad for p in base.model.parameters()), "what it starts from is not changed"
    # The same memory: no second copy of the base.
    names = dict(base.model.named_parameters())
    frozen = {name.replace(".base_layer", ""): p for name, p in student.model.named_parameters() if name not in trained}
    assert frozen.keys() == names.keys()
    assert all(p.data_ptr() == names[name].data_ptr() for name, p in frozen.items())


def test_the_first_weights_depend_on_the_seed_alone(base):
    def first(seed: int) -> list[Tensor]:
        return [p for name, p in trainable_copy(base.model, LORA, seed=seed).named_parameters() if "lora_A" in name]

    state = torch.random.get_rng_state()
    one = first(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, first(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, first(2), strict=True))
    # Kaiming's uniform bound for A [rank, inputs], a = sqrt(5): 1 / sqrt(inputs)
    assert max(float(p.abs().max()) * p.shape[1] ** 0.5 for p in one) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("base", KINDS, indirect=True)
def test_peft_opens_the_directory_with_the_same_numbers_and_its_base_is_untouched(base, tmp_path):
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    student = adapted(base)
    expected = logprobs(student)
    assert not torch.allclose(expected, logprobs(base), atol=1e-2)
    save_language_model(student, tmp_path / "adapter")

    loaded = load_language_model(tmp_path / "adapter", CPU)
    assert torch.equal(logprobs(loaded), expected)
    assert loaded.chat.render_hash == base.chat.render_hash
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(plain_logprobs(theirs, base), expected, atol=1e-4, rtol=1e-4)
    with theirs.disable_adapter():  # the reference is the adapter off
        torch.testing.assert_close(plain_logprobs(theirs, base), logprobs(base), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[name], p) for name, p in base.model.named_parameters())
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "model.safetensors" not in files


@pytest.mark.parametrize("base", KINDS, indirect=True)
def test_merging_adds_the_update_to_weights_of_its_own(base, tmp_path):
    student = adapted(base)
    merged = end_of_training(student, LORA.model_copy(update={"merge": True}))
    assert adapter_of(merged.model) is None
    torch.testing.assert_close(logprobs(merged), logprobs(student), atol=1e-4, rtol=1e-4)
    assert torch.equal(logprobs(base), logprobs(load_language_model(tmp_path / "base", CPU)))
    save_language_model(merged, tmp_path / "merged")
    torch.testing.assert_close(logprobs(load_language_model(tmp_path / "merged", CPU)), logprobs(merged))
    assert end_of_training(student, LORA).model is student.model


def test_training_goes_on_with_a_copy_of_the_adapter_or_merges_it(base, tmp_path):
    save_language_model(adapted(base), tmp_path / "adapter")
    start = load_language_model(tmp_path / "adapter", CPU)
    before = logprobs(start)
    second = start_of_training(start, LORA, seed=9, name="second")
    assert torch.equal(logprobs(second), before)
    move(second.model)
    assert torch.equal(logprobs(start), before), "the reference keeps its own adapter"
    save_language_model(second, tmp_path / "second")
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    whole = start_of_training(start, LoRAConfig(), seed=9, name="whole")
    assert adapter_of(whole.model) is None and all(p.requires_grad for p in whole.model.parameters())
    torch.testing.assert_close(logprobs(whole), before, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match=r"lora.rank is 4, but .* an adapter of rank 3"):
        start_of_training(start, LoRAConfig(rank=4), seed=0, name="other")


@pytest.mark.parametrize("base", ["llama", "gpt2", "gemma3"], indirect=True)
def test_a_reward_model_is_an_adapter_with_its_head_and_reloads_with_identical_scores(base, tmp_path):
    untrained = scalar_model_from(base, seed=2, trunk="shared")
    scalar = heads.start_of_training(untrained, LORA, seed=1, name="rm")
    trained = {name for name, p in scalar.model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and all(".lora_" in name for name in trained - {"score.weight"})
    move(scalar.model)
    scalar = scalar._replace(offset=0.25)
    expected = score_sequences(scalar, make_sequences(scalar))
    save_scalar_model(scalar, tmp_path / "rm")

    loaded = load_scalar_model(tmp_path / "rm", CPU)
    assert loaded.offset == 0.25
    assert torch.equal(score_sequences(loaded, make_sequences(scalar)), expected)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
    theirs.config.get_text_config().pad_token_id = None
    found = [theirs(input_ids=torch.tensor([one.token_ids])).logits.item() for one in make_sequences(scalar)]
    assert found == pytest.approx((expected + 0.25).tolist(), abs=1e-4)
    # As the start of a value model: a copy with adapter and head of its own.
    value = heads.start_of_training(loaded, LORA, seed=3, name="value")
    move(value.model)
    assert torch.equal(score_sequences(loaded, make_sequences(scalar)), expected)
    # Merged, it is an ordinary reward model.
    merged = heads.end_of_training(scalar, LORA.model_copy(update={"merge": True}))
    torch.testing.assert_close(score_sequences(merged, make_sequences(scalar)), expected, atol=1e-4, rtol=1e-4)


def test_a_reward_model_starts_from_a_policy_with_an_adapter(base, tmp_path):
    student = adapted(base)
    for lora in (LORA, LoRAConfig()):
        scalar = heads.start_of_training(scalar_model_from(student, seed=2, trunk="shared"), lora, seed=1, name="rm")
        expected = score_sequences(scalar_model_from(end_of_training(student, LORA), seed=2), make_sequences(base))
        torch.testing.assert_close(score_sequences(scalar, make_sequences(base)), expected, atol=1e-4, rtol=1e-4)
        save_scalar_model(scalar, tmp_path / "rm")
        loaded: ScalarModel = load_scalar_model(tmp_path / "rm", CPU)
        torch.testing.assert_close(score_sequences(loaded, make_sequences(base)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_project"])
def test_layers_that_cannot_be_adapted_are_named(base, target):
    with pytest.raises(InputError, match=r"^lora.target_modules: .*q_proj"):
        start_of_training(base, LoRAConfig(rank=2, target_modules=(target,)), seed=0, name="x")


def test_chosen_layers_alone_are_adapted(base):
    student = start_of_training(base, LoRAConfig(rank=2, target_modules=("q_proj", "down_proj")), seed=0, name="x")
    trained = {
        name.split(".lora_")[0].rpartition(".")[2] for name, p in student.model.named_parameters() if p.requires_grad
    }
    assert trained == {"q_proj", "down_proj"}


def test_a_base_that_was_never_saved_is_refused_before_training(base):
    with pytest.raises(InputError, match="these weights were never saved"):
        start_of_training(make_tiny_lm(), LORA, seed=0, name="x")
    changed = start_of_training(base, LoRAConfig(), seed=0, name="trained whole")
    with pytest.raises(InputError, match="these weights were never saved"):
        start_of_training(changed, LORA, seed=0, name="x")
    start_of_training(make_tiny_lm(), LORA.model_copy(update={"merge": True}), seed=0, name="x")


def test_once_saved_a_model_can_be_a_base(tmp_path):
    lm = copy_language_model(make_tiny_lm())
    save_language_model(lm, tmp_path / "saved")
    save_language_model(adapted(lm), tmp_path / "adapter")
    assert torch.equal(logprobs(load_language_model(tmp_path / "adapter", CPU)), logprobs(adapted(lm)))


def test_damage_is_named(base, tmp_path):
    student = adapted(base)
    directory = tmp_path / "adapter"

    def refused() -> str:
        with pytest.raises(InputError) as caught:
            load_language_model(directory, CPU)
        assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
        return str(caught.value)

    save_language_model(student, directory)
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "make or copy the adapter again" in refused()
    weights.unlink()
    assert "make or copy the adapter again" in refused()

    save_language_model(student, directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    assert "does not fit its configuration" in refused()
    (directory / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert "expected plain LoRA" in refused()

    save_language_model(student, directory)
    save_language_model(make_tiny_lm(seed=8), tmp_path / "base")
    assert "has other weights than in training" in refused()
    shutil.rmtree(tmp_path / "base")
    assert "is not there" in refused()
