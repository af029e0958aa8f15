"""Scores and values: the last real token, offsets, layouts, persistence, and the scorer against the training path."""

import json

import pytest
import torch
from conftest import ARCHITECTURES, CPU, make_sequences, make_tiny_lm
from transformers import AutoModelForSequenceClassification

from qinglan.core.errors import InputError
from qinglan.core.records import Completion, Message, Prompt
from qinglan.models.adapters import LoRAConfig
from qinglan.models.heads import (
    ScalarModel,
    as_scorer,
    last_token_scores,
    load_scalar_model,
    save_scalar_model,
    scalar_model_from,
    score_sequences,
    start_of_training,
    token_values,
)
from qinglan.models.language_model import TokenSequence, hidden_states
from qinglan.models.tokens import collate

SOURCE = {"source": "human", "producer_id": "p", "prompt_group_id": "g"}


def make_scalar(architecture: str = "llama", *, pad_is_eos: bool = False, offset: float = 0.0) -> ScalarModel:
    """Scalar model whose head is large enough that mistakes show."""
    scalar = scalar_model_from(make_tiny_lm(architecture, pad_is_eos=pad_is_eos), seed=3)
    with torch.no_grad():
        scalar.model.score.weight.mul_(4)
    return scalar._replace(offset=offset)


def slow_scores(scalar: ScalarModel, sequences: list[TokenSequence]) -> torch.Tensor:
    """The oracle: transformers' own forward pass, one sequence at a time, without any padding."""
    with torch.no_grad():
        raw = [scalar.model(input_ids=torch.tensor([s.token_ids])).logits[0, 0] for s in sequences]
    return torch.stack(raw) - scalar.offset


def in_order(batch, scores: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(scores)
    found[[place.original for place in batch.sequence_rows]] = scores
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_padded_packed_and_single_scores_are_equal(architecture, pad_is_eos):
    scalar = make_scalar(architecture, pad_is_eos=pad_is_eos, offset=0.5)
    sequences = make_sequences(scalar)
    slow = slow_scores(scalar, sequences)
    assert slow.std() > 0.1
    for layout in (
        {},
        {"extra_columns": 3},
        {"extra_columns": 17},
        {"rows": [[3, 0, 4, 1, 5, 2]]},
        {"rows": [[2, 4, 1], [0, 5, 3]], "extra_columns": 2},
    ):
        batch = collate(sequences, **layout)
        fast = in_order(batch, last_token_scores(scalar, batch))
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
    torch.testing.assert_close(score_sequences(scalar, sequences, max_tokens=20), slow, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_scores_do_not_depend_on_the_layout(architecture):
    scalar = make_scalar(architecture)
    sequences = make_sequences(scalar)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.3, 0.7])

    def gradients(layouts):
        scalar.model.zero_grad()
        for layout in layouts:
            batch = collate(sequences, **layout)
            rows = [place.original for place in batch.sequence_rows]
            (last_token_scores(scalar, batch) * weights[rows]).sum().backward()
        return torch.cat([p.grad.flatten() for p in scalar.model.parameters() if p.grad is not None])

    alone = gradients([{"rows": [[index]]} for index in range(len(sequences))])
    scale = alone.abs().max()
    for layout in ({"extra_columns": 17}, {"rows": [[0, 1, 2, 3, 4, 5]]}):
        torch.testing.assert_close(gradients([layout]) / scale, alone / scale, atol=1e-5, rtol=0)


def test_the_value_of_the_last_token_is_the_score():
    scalar = make_scalar("qwen3", offset=-1.25)
    batch = collate(make_sequences(scalar), extra_columns=3)
    values = token_values(scalar, hidden_states(scalar.model, batch))
    assert (values.shape, values.dtype) == (batch.input_ids.shape, torch.float32)
    at_end = torch.stack([values[row, end - 1] for _, row, _, end in batch.sequence_rows])
    # Scores leave the padding out: another order of additions inside products.
    torch.testing.assert_close(at_end, last_token_scores(scalar, batch), atol=1e-5, rtol=0)
    unshifted = token_values(scalar._replace(offset=0.0), hidden_states(scalar.model, batch))
    torch.testing.assert_close(values, unshifted + 1.25, atol=1e-6, rtol=0)


def test_poisoned_padding_does_not_leak_into_scores():
    scalar = make_scalar()
    batch = collate(make_sequences(scalar), extra_columns=3)
    clean = last_token_scores(scalar, batch)
    with torch.no_grad():
        scalar.model.get_input_embeddings().weight[scalar.chat.pad_id] = torch.nan
    holds_pad = torch.tensor([scalar.chat.pad_id in s.token_ids for s in make_sequences(scalar)])
    assert torch.equal(last_token_scores(scalar, batch)[~holds_pad], clean[~holds_pad])


def test_the_head_starts_small_and_depends_on_the_seed_only(tiny_lm):
    lm = tiny_lm()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (scalar_model_from(lm, seed=seed).model.score for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert first.bias is None
    draws = torch.cat([scalar_model_from(lm, seed=seed).model.score.weight for seed in range(20)])
    assert draws.std().item() == pytest.approx((16 + 1) ** -0.5, rel=0.15)  # 320 draws: standard error 4%
    assert draws.mean().abs() < 0.05


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_trunk_is_a_copy(architecture):
    lm = make_tiny_lm(architecture)
    scalar = scalar_model_from(lm, seed=0)
    ours, theirs = scalar.model.base_model.state_dict(), lm.model.base_model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert all(parameter.device.type == "cpu" for parameter in scalar.model.parameters())
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.zero_()
    assert scalar.model.get_input_embeddings().weight.abs().sum() > 0
    assert not any("lm_head" in name for name in scalar.model.state_dict())
    copy = start_of_training(scalar, LoRAConfig(), seed=0, name="value model")
    with torch.no_grad():
        scalar.model.score.weight.zero_()
    assert copy.model.score.weight.abs().sum() > 0
    assert copy.name == "value model"


# Persistence


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_save_and_load_give_the_same_scores(architecture, pad_is_eos, tmp_path):
    scalar = make_scalar(architecture, pad_is_eos=pad_is_eos, offset=0.1)
    sequences = make_sequences(scalar)
    save_scalar_model(scalar, tmp_path / "reward")
    again = load_scalar_model(tmp_path / "reward", CPU)
    assert (again.offset, again.chat.render_hash) == (0.1, scalar.chat.render_hash)
    assert torch.equal(score_sequences(again, sequences), score_sequences(scalar, sequences))

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert theirs.config.num_labels == 1
    assert theirs.config.qinglan["offset"] == 0.1
    ends = TokenSequence([5, 6, 7, scalar.tokenizer.eos_token_id], 1)
    with torch.no_grad():
        raw = theirs(input_ids=torch.tensor([ends.token_ids])).logits[0, 0]
    torch.testing.assert_close(raw - 0.1, score_sequences(scalar, [ends])[0], atol=1e-5, rtol=0)
    # Where padding is an end token transformers would read the score before it, so it gets no padding token.
    assert theirs.config.pad_token_id == (None if pad_is_eos else scalar.chat.pad_id)


def test_the_plain_template_travels_with_the_reward_model(tmp_path):
    scalar = scalar_model_from(make_tiny_lm(template="plain"), seed=0)
    save_scalar_model(scalar, tmp_path / "reward")
    assert load_scalar_model(tmp_path / "reward", CPU).chat.render_hash == scalar.chat.render_hash


def test_another_rendering_than_in_training_is_refused(tmp_path):
    save_scalar_model(make_scalar(), tmp_path / "reward")
    with pytest.raises(InputError, match="render hash"):
        load_scalar_model(tmp_path / "reward", CPU, template="plain")
    template = tmp_path / "reward" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(InputError, match="render hash"):
        load_scalar_model(tmp_path / "reward", CPU)


def test_loading_refuses_what_is_not_a_reward_model(tiny_lm, tmp_path):
    lm = tiny_lm()
    with pytest.raises(InputError, match="no such directory"):
        load_scalar_model(tmp_path / "absent", CPU)
    lm.model.save_pretrained(tmp_path / "policy")
    lm.tokenizer.save_pretrained(tmp_path / "policy")
    with pytest.raises(InputError, match=r"missing.*score|labels"):
        load_scalar_model(tmp_path / "policy", CPU)
    save_scalar_model(make_scalar(), tmp_path / "reward")
    config = tmp_path / "reward" / "config.json"
    values = json.loads(config.read_text())
    del values["qinglan"]
    config.write_text(json.dumps(values))
    assert load_scalar_model(tmp_path / "reward", CPU).offset == 0.0


# The scorer


def make_prompt(text: str) -> Prompt:
    return Prompt(id=text, messages=(Message(role="user", content=text),), **SOURCE)


def make_completion(text: str, token_ids: tuple[int, ...] | None = None) -> Completion:
    return Completion(id=text, prompt_id="p", text=text, token_ids=token_ids, **SOURCE)


def test_the_scorer_scores_what_training_scored():
    scalar = make_scalar(offset=0.3)
    prompts = [make_prompt("the ant"), make_prompt("the ant"), make_prompt("thin ink in the hall")]
    texts = ["in the hall", "", "all"]
    sequences = []
    for prompt, text in zip(prompts, texts, strict=True):
        start = scalar.chat.prompt_ids(prompt.messages)
        sequences.append(TokenSequence(start + scalar.chat.completion_ids(text), len(start)))
    batch = collate(sequences, [[2, 0, 1]])
    trained = in_order(batch, last_token_scores(scalar, batch))
    scores = as_scorer(scalar)(prompts, [make_completion(text) for text in texts])
    assert scores == pytest.approx(trained.tolist(), abs=1e-5)
    assert as_scorer(scalar)([], []) == []


def test_the_scorer_takes_token_ids_as_sampled():
    scalar = make_scalar()
    prompt = make_prompt("the ant")
    letters = [scalar.tokenizer.convert_tokens_to_ids(letter) for letter in "the"]  # a sampler may spell "the" so
    spelled = (*letters, scalar.chat.end_id)
    assert list(spelled) != scalar.chat.completion_ids("the")
    start = scalar.chat.prompt_ids(prompt.messages)
    expected = slow_scores(scalar, [TokenSequence([*start, *spelled], len(start))]).tolist()
    score = as_scorer(scalar)
    assert score([prompt], [make_completion("the", spelled)]) == pytest.approx(expected, abs=1e-5)
    assert score([prompt], [make_completion("the")]) != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("shape", [(), (0,), (37,), (3, 0), (5, 7)])
def test_values_of_states_of_any_shape(shape):
    scalar = make_scalar(offset=0.5)
    head = scalar.model.score.weight
    hidden = torch.randn(*shape, head.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(token_values(scalar, hidden), hidden @ head[0] - 0.5)
