"""Forward passes over completions: sharing a prompt changes nothing but the work, and is done where it saves some."""

import pytest
import torch
from tiny_ppo import draw_targets, gradients, learners_of, roll, small
from tiny_world import make_lm, make_prompt

from qinglan.core.errors import InputError
from qinglan.learn.ppo_update import accumulate_gradients, minibatch_order
from qinglan.learn.rollout import rollout_logprobs, state_values
from qinglan.models import completion_rows
from qinglan.models.completion_rows import make_completion_batches
from qinglan.models.heads import scalar_model_from, score_sequences
from qinglan.models.language_model import TokenSequence
from qinglan.models.prompt_sharing import TreeBatch

LONG = [make_prompt(text * 8) for text in ("abc", "hello", "x y", "who?", "1+1", "zz")]


def layouts(lm, rollout, **settings) -> list[type]:
    batches = make_completion_batches(rollout.sequences, range(len(rollout.sequences)), [lm.model], **settings)
    return [type(batch.rows) for batch in batches]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma", "mistral"])
@pytest.mark.parametrize("max_tokens", [4096, 60])
def test_shared_prompts_give_the_numbers_of_separate_rows(kind, max_tokens, monkeypatch):
    lm = make_lm(kind)
    value, rollout = scalar_model_from(lm, seed=0), roll(lm, prompts=LONG)
    assert TreeBatch in layouts(lm, rollout, max_tokens=max_tokens)

    def measured():
        targets, learners = draw_targets(rollout), learners_of(lm, value)
        accumulate_gradients(learners, rollout, targets, [11, 3, 2, 0, 7, 6], small(max_tokens=max_tokens))
        states = state_values(value, rollout, max_tokens)
        return rollout_logprobs(lm, rollout, 0.7, max_tokens), states.values, states.end_values, gradients(learners)

    shared = measured()
    monkeypatch.setattr(completion_rows, "can_share_prompt", lambda model: False)
    assert TreeBatch not in layouts(lm, rollout, max_tokens=max_tokens)
    for ours, separate in zip(shared, measured(), strict=True):
        torch.testing.assert_close(ours, separate, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mistral_sliding", "gemma3"])
def test_models_with_windows_keep_rows_apart(kind):
    lm = make_lm(kind)
    assert TreeBatch not in layouts(lm, roll(lm, prompts=LONG), max_tokens=4096)


def test_sharing_is_done_where_it_takes_fewer_products():
    # D = 16. Two samples of 5 tokens on a prompt of 20: one row of 30 columns, 30 (12 * 16 + 4 * 30) = 9,360, against
    # 2 * 25 (192 + 50) = 12,100. On a prompt of 2 with samples of 60: 122 (192 + 488) = 82,960 against
    # 2 * 62 (192 + 124) = 39,184.
    model = make_lm().model
    for num_prompt, length, pays in ((20, 5, True), (2, 60, False)):
        sequences = [TokenSequence([*range(4, 4 + num_prompt), *[10 + k] * length], num_prompt) for k in range(2)]
        [batch] = make_completion_batches(sequences, [0, 1], [model], max_tokens=4096)
        assert isinstance(batch.rows, TreeBatch) == pays
        assert batch.numbers == [0, 1]
        assert batch.completion_ids.tolist() == [10] * length + [11] * length


def test_samples_of_a_prompt_stand_in_one_minibatch_where_they_fit():
    config = small(episodes_per_iteration=12, samples_per_prompt=3, minibatch_episodes=6)
    order = minibatch_order(config, 0, 0, 0)
    assert sorted(order) == list(range(12))
    assert all(order[k] // 3 == order[k + 1] // 3 == order[k + 2] // 3 for k in range(0, 12, 3))
    assert order != minibatch_order(config, 0, 0, 1)
    apart = small(episodes_per_iteration=12, samples_per_prompt=3, minibatch_episodes=4)
    assert sorted(minibatch_order(apart, 0, 0, 0)) == list(range(12))


def test_a_completion_of_no_token_ends_where_its_prompt_ends():
    lm = make_lm()
    value, ids = scalar_model_from(lm, seed=0), [5, 6, 7, 8, 9, 10, 11, 12]
    both = score_sequences(value, [TokenSequence(ids, 8), TokenSequence([*ids, 20], 8)])
    [alone] = score_sequences(value, [TokenSequence(ids, 8)])
    assert float(both[0]) == pytest.approx(float(alone), abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_exceeds_the_context_is_refused_with_and_without_company(kind):
    value = scalar_model_from(make_lm(kind), seed=0)  # a context of 128 tokens
    for count in (1, 4):
        sequences = [TokenSequence([5] * 120 + [10 + k] * 20, 120) for k in range(count)]
        with pytest.raises(InputError, match="the model's context is 128 tokens"):
            score_sequences(value, sequences)


def test_rows_stay_within_the_budget_however_many_samples_share_a_prompt():
    lm = make_lm()
    sequences = [TokenSequence([*range(4, 24), 30 + k, 31 + k], 20) for k in range(40)]
    batches = list(make_completion_batches(sequences, range(40), [lm.model], max_tokens=30))
    assert all(batch.rows.input_ids.numel() <= 30 for batch in batches)
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(40))
    # D = 16: no row is wider than 48 columns, of which 28 are left for completions of 2 tokens.
    [batch] = make_completion_batches(sequences, range(40), [lm.model], max_tokens=4096)
    assert isinstance(batch.rows, TreeBatch)
    assert batch.rows.input_ids.shape == (3, 48)
    assert batch.numbers == list(range(40))
