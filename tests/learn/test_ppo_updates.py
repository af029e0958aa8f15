"""Rewards and updates of PPO, each against numbers found another way. Numbers in names are rules of the checklist."""

import json

import pytest
import torch
from tiny_ppo import (
    PROMPTS,
    brevity,
    corpus,
    draw_targets,
    gradients,
    hand_made,
    learners_of,
    roll,
    rows_of,
    small,
    train,
    weights_of,
)
from tiny_world import make_lm, make_stage

from qinglan.core.records import Prompt
from qinglan.learn import ppo
from qinglan.learn.advantages import NO_MOMENTS
from qinglan.learn.ppo import PPOConfig, make_targets, train_ppo
from qinglan.learn.ppo_metrics import rollout_metrics
from qinglan.learn.ppo_update import (
    Targets,
    accumulate_gradients,
    accumulate_ptx_gradients,
    update,
)
from qinglan.learn.rollout import Rollout, StateValues
from qinglan.models.heads import scalar_model_from, score_sequences
from qinglan.models.language_model import TokenSequence

# ------------------------------------------------------------------------------------------------------------- rewards


def targets_of(reasons: list[str], **changes) -> Targets:
    """Targets of episodes of two tokens, values 1 and 2 (3 after the end), score 10, no KL, lambda 1, not whitened."""
    count = len(reasons)
    mask = torch.ones(count, 2, dtype=torch.bool)
    rollout = Rollout([], [], [], reasons, mask, torch.zeros(count, 2))
    states = StateValues(torch.tensor([[1.0, 2.0]] * count), torch.tensor([3.0] * count))
    config = small(whiten_advantages=False, gae_lambda=1.0, **changes)
    scores = ppo.charge_missing_eos([10.0] * count, reasons, config.missing_eos, config.missing_eos_penalty)
    return make_targets(rollout, torch.zeros(count, 2), scores, states, NO_MOMENTS, config, 0.0)


def test_rule_6_only_the_finish_reason_says_who_pays_for_a_missing_end():
    # The first row is as long as the cut one, but it ended: its score stays 10.
    reasons = ["eos", "length", "stop"]
    assert targets_of(reasons).returns[:, 1].tolist() == [10.0, 9.0, 10.0]
    assert targets_of(reasons, missing_eos_penalty=4.0).returns[:, 1].tolist() == [10.0, 6.0, 10.0]
    assert targets_of(reasons, missing_eos="replace").returns[:, 1].tolist() == [10.0, -1.0, 10.0]
    assert targets_of(reasons, missing_eos="keep").returns[:, 1].tolist() == [10.0, 10.0, 10.0]


def test_rule_7_a_cut_episode_ends_or_goes_on_by_its_value():
    reasons = ["eos", "length"]
    assert targets_of(reasons).advantages.tolist() == [[9.0, 8.0], [8.0, 7.0]]
    # bootstrap: the value 3 after the last token in place of score and penalty: 3 - 1 and 3 - 2
    assert targets_of(reasons, truncated="bootstrap").advantages.tolist() == [[9.0, 8.0], [2.0, 1.0]]
    with pytest.raises(ValueError, match="gae"):
        small(truncated="bootstrap", estimator="rloo")


def test_rule_13_large_log_ratios_are_counted_and_not_clamped():
    mask = torch.ones(1, 4, dtype=torch.bool)
    rollout = Rollout([], [], [], ["eos"], mask, torch.zeros(1, 4))
    reference = torch.tensor([[-30.0, 0.0, 0.0, 0.0]])
    config = small(estimator="reinforce_pp")
    targets = make_targets(rollout, reference, [0.0], None, NO_MOMENTS, config, 1.0)
    assert targets.returns[0, 0].item() == -30.0
    assert rollout_metrics(rollout, reference, targets, 1.0)["large_kl_share"] == 0.25


def test_rule_19_the_value_clip_is_in_standard_deviations_of_the_returns():
    assert targets_of(["eos", "length"]).value_clip is None, "off by default"
    # returns 10, 10, 9, 9: standard deviation 0.5
    assert targets_of(["eos", "length"], value_clip=0.2).value_clip == pytest.approx(0.1)


def test_scaled_scores_and_whitened_rewards(tmp_path):
    def tenfold(prompts, completions):
        return [10 * score for score in brevity(prompts, completions)]

    for name, scorer in (("one", brevity), ("ten", tenfold)):
        config = small(scale_scores=True, whiten_rewards=True, missing_eos="keep", num_iterations=2)
        train(tmp_path / name, config, scorer=scorer)
    one, ten = rows_of(tmp_path / "one"), rows_of(tmp_path / "ten")
    assert [row["return"] for row in ten] == pytest.approx([row["return"] for row in one], rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- updates


@pytest.mark.parametrize("max_tokens", [4096, 30])
def test_rule_21_optimizer_steps_are_epochs_times_minibatches_however_batches_are_cut(max_tokens):
    lm = make_lm()
    learners, rollout = learners_of(lm), roll(lm)
    config = small(episodes_per_iteration=12, minibatch_episodes=4, inner_epochs=2, max_tokens=max_tokens)
    update(learners, None, rollout, draw_targets(rollout), config, 0, 0, where="here")
    for optimizer in (learners.policy_optimizer, learners.value_optimizer):
        assert {int(entry["step"]) for entry in optimizer.state.values()} == {2 * 3}


def test_rule_22_the_gradient_is_the_token_mean_however_the_batch_is_cut():
    lm = make_lm()
    learners = learners_of(lm)
    rollout = hand_made(lm, [[10] * n + [lm.chat.end_id] for n in (1, 7, 3, 2, 9, 4, 1, 5)])  # ragged
    targets = draw_targets(rollout)
    poison = torch.where(rollout.completion_mask, 0.0, torch.nan)
    targets = Targets(*(matrix + poison for matrix in targets[:3]), None)
    found = []
    for max_tokens, pack in ((10_000, False), (60, False), (24, False), (10_000, True), (40, True)):
        config = small(episodes_per_iteration=8, minibatch_episodes=8, max_tokens=max_tokens, pack=pack)
        accumulate_gradients(learners, rollout, targets, range(8), config)
        found.append(gradients(learners))
        assert found[-1].isfinite().all()
        torch.testing.assert_close(found[-1], found[0], atol=1e-6, rtol=1e-3)
    # The same by hand: each completion alone, weighted by its share of all tokens.
    total = torch.zeros_like(found[0])
    for row in range(8):
        accumulate_gradients(learners, rollout, targets, [row], config)
        total += gradients(learners) * int(rollout.lengths[row]) / int(rollout.lengths.sum())
    torch.testing.assert_close(total, found[0], atol=1e-6, rtol=1e-3)


def test_rule_20_the_value_before_each_token_is_fitted_and_none_after_the_end():
    lm = make_lm()
    scalar = scalar_model_from(lm, seed=0)
    learners, rollout = learners_of(lm, scalar), roll(lm)
    targets = draw_targets(rollout)
    tally = accumulate_gradients(learners, rollout, targets, range(12), small())
    losses = []
    for row, (ids, num_prompt_tokens) in enumerate(rollout.sequences):
        cut = [TokenSequence(ids[:end], 1) for end in range(num_prompt_tokens, len(ids))]
        errors = score_sequences(scalar, cut) - targets.returns[row, : len(cut)]
        losses.append(errors.square() / 2)
    assert tally.value_loss == pytest.approx(torch.cat(losses).sum().item(), rel=1e-5)


def test_rule_28_pretraining_gradients_go_into_the_same_step_times_gamma():
    lm = make_lm()
    rollout = roll(lm)
    targets, sequences = draw_targets(rollout), corpus(0, 5)
    config = small(estimator="rloo", episodes_per_iteration=12, ptx_coef=27.8, max_tokens=30)
    learners = learners_of(lm, estimator="rloo")
    accumulate_gradients(learners, rollout, targets, range(12), config)
    from_episodes = gradients(learners)
    accumulate_gradients(learners, rollout, targets, range(12), config)
    loss = accumulate_ptx_gradients(learners.policy, sequences, config)
    together = gradients(learners)
    # The pretraining gradient by itself, from transformers' own loss of each sequence (all are equally long).
    losses = [learners.policy.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in sequences]
    mean_loss = torch.stack(losses).mean()
    mean_loss.backward()
    torch.testing.assert_close(together, from_episodes + 27.8 * gradients(learners), atol=1e-4, rtol=1e-3)
    assert loss == pytest.approx(mean_loss.item(), rel=1e-5)


def test_rule_28_one_optimizer_step_and_eight_times_as_many_examples_by_position():
    lm = make_lm()
    asked = []

    def source(start: int, count: int) -> list[list[int]]:
        asked.append((start, count))
        return corpus(start, count)

    config = small(episodes_per_iteration=12, minibatch_episodes=4, ptx_coef=1.0, ptx_ratio=8)
    learners, rollout = learners_of(lm), roll(lm)
    metrics = update(learners, source, rollout, draw_targets(rollout), config, 0, 2, where="here")
    assert asked == [(32 * (6 + i), 32) for i in range(3)], "iteration 2 goes on where two times three updates ended"
    assert {int(entry["step"]) for entry in learners.policy_optimizer.state.values()} == {3}
    assert metrics["ptx_loss"] > 0


def test_rule_30_rates_are_separate_and_climb_by_iteration(tmp_path):
    lm = make_lm()
    config = small(learning_rate=0.0, value_learning_rate=1e-2, warmup_iterations=4, warmup_start=0.1)
    learners, rollout = learners_of(lm), roll(lm)
    before = weights_of(learners.policy)
    value_before = learners.value.model.score.weight.clone()
    config = config.model_copy(update={"episodes_per_iteration": 12})
    update(learners, None, rollout, draw_targets(rollout), config, 0, 2, where="here")
    assert all(torch.equal(before[name], p) for name, p in learners.policy.model.named_parameters())
    assert not torch.equal(value_before, learners.value.model.score.weight)
    group = learners.value_optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(1e-2 * (0.1 + 0.9 * 2 / 4)) and group["eps"] == 1e-5


def test_ema_follows_every_update_and_is_what_comes_back(tmp_path):
    config = small(num_iterations=1, episodes_per_iteration=4, minibatch_episodes=4, returned="ema", ema_decay=0.75)
    lm = make_lm()
    average = train(tmp_path / "ema", config, lm=lm).policy
    last = train(tmp_path / "last", config.model_copy(update={"returned": "last"}), lm=lm).policy
    for start, mean, end in zip(*(m.model.parameters() for m in (lm, average, last)), strict=True):
        torch.testing.assert_close(mean, 0.75 * start + 0.25 * end)  # one update


def test_the_papers_preset():
    config = PPOConfig.paper()
    assert (config.kl_coef, config.clip, config.inner_epochs) == (0.02, 0.2, 1)
    assert (config.episodes_per_iteration, config.minibatch_episodes, config.updates_per_iteration) == (512, 64, 8)
    assert (config.discount, config.ema_decay, config.returned) == (1.0, 0.992, "ema")
    assert (config.ptx_coef, config.ptx_ratio) == (27.8, 8)
    assert (config.warmup_iterations, config.warmup_start, config.value_learning_rate) == (10, 0.1, 9e-6)
    assert config.episodes_per_iteration * config.num_iterations == 256_000


@pytest.mark.parametrize("changes", [
    {"estimator": "rloo", "samples_per_prompt": 1},
    {"episodes_per_iteration": 10},
    {"samples_per_prompt": 3},
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match=r"samples_per_prompt|multiple"):
        small(**changes)


def test_prompt_with_several_turns_is_taken(tmp_path):
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "ab")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    prompt = Prompt.model_validate({**PROMPTS[0].model_dump(), "messages": messages})
    lm = make_lm()
    config = small(num_iterations=1)
    train_ppo(lm, lm, brevity, [prompt], config, stage=make_stage(tmp_path, "ppo"), seed=0)
    assert json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])["prompt"].startswith("user: hi\nassist")


# ---------------------------------------------------------------------------------- a value head on the policy's trunk


def test_a_shared_trunk_is_run_once_and_its_head_starts_at_zero():
    lm = make_lm()
    learners, rollout = learners_of(lm, value_model="shared_trunk"), roll(lm)
    assert learners.value.model.base_model is learners.policy.model.base_model
    assert [name for name, _ in learners.value_module.named_parameters()] == ["weight"]
    assert not learners.value_module.weight.any()
    calls = []
    embeddings = learners.policy.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda *_: calls.append(1))
    config = small(value_model="shared_trunk")
    accumulate_gradients(learners, rollout, draw_targets(rollout), range(12), config)
    handle.remove()
    assert len(calls) == 1


def test_the_gradient_of_a_shared_trunk_is_the_policys_plus_the_values_times_its_coefficient():
    lm = make_lm()
    rollout = roll(lm)
    targets = draw_targets(rollout)
    learners = learners_of(lm, value_model="shared_trunk")
    with torch.no_grad():
        learners.value_module.weight.copy_(torch.linspace(-1, 1, 16)[None])
    config = small(value_model="shared_trunk", value_coef=0.3, max_tokens=60)
    accumulate_gradients(learners, rollout, targets, range(12), config)
    found = {name: p.grad.clone() for name, p in learners.policy.model.named_parameters()}
    head = learners.value_module.weight.grad.clone()
    # By hand, one sequence after the other, with the model's own forward pass.
    learners.policy.model.zero_grad(), learners.value_module.zero_grad()
    num_tokens = int(rollout.completion_mask.sum())
    for row, (ids, num_prompt) in enumerate(rollout.sequences):
        output = learners.policy.model(torch.tensor([ids]), output_hidden_states=True)
        places = torch.arange(num_prompt - 1, len(ids) - 1)
        logprobs = output.logits[0].log_softmax(-1)[places, torch.tensor(ids)[places + 1]]
        values = output.hidden_states[-1][0, places] @ learners.value_module.weight[0]
        count = len(places)
        ratio = (logprobs - rollout.logprobs[row, :count]).exp()  # 1: no clipping
        policy_loss = -(ratio * targets.advantages[row, :count]).sum()
        value_loss = (values - targets.returns[row, :count]).square().sum() / 2
        ((policy_loss + 0.3 * value_loss) / num_tokens).backward()
    for name, p in learners.policy.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(head, learners.value_module.weight.grad, atol=1e-5, rtol=1e-3)


def test_the_head_and_the_trunk_have_their_own_rates():
    lm = make_lm()
    rollout = roll(lm)
    config = small(value_model="shared_trunk", learning_rate=0.0, episodes_per_iteration=12)
    learners = learners_of(lm, value_model="shared_trunk", learning_rate=0.0)
    before = weights_of(learners.policy)
    update(learners, None, rollout, draw_targets(rollout), config, 0, 0, where="here")
    assert all(torch.equal(before[name], p) for name, p in learners.policy.model.named_parameters())
    assert learners.value_module.weight.any()


def test_a_shared_trunk_belongs_to_gae():
    with pytest.raises(ValueError, match="value_model shared_trunk belongs to estimator gae, not rloo"):
        small(estimator="rloo", value_model="shared_trunk")
