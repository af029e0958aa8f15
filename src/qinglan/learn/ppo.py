"""Proximal policy optimization of a policy against a scorer (InstructGPT, sections 3.5 and C.4; Schulman et al. 2017).

A contextual bandit: one prompt, one completion, one score, and the episode ends. Token rewards are -beta (log pi -
log pi_ref), plus the score at the last token; discount 1; GAE with a value model that starts as a copy of the reward
model, or is a head on the policy's trunk; clip 0.2; pretraining gradients in the same optimizer step (PPO-ptx); an
average of the policy's weights. The same loop trains by RLOO, GRPO and REINFORCE++, which want no value model.

    result = train_ppo(policy, reference, scorer, prompts, PPOConfig(),
                       stage=run.stage("ppo"), seed=0, value_start=reward_model)

Departures: gradients are clipped; advantages are whitened over the rollout; AdamW without decay for Adam, epsilon 1e-5;
the weights' average moves after every update (the paper does not say whether update or iteration). Old
log-probabilities come from the sampler, which saves a forward pass; before the first update of every iteration they
must agree with the trainer's.

Legend: E episodes of an iteration, T tokens of the longest completion, N sampled tokens of a micro-batch.
"""

import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qinglan.core.errors import InputError
from qinglan.core.files import read_json, write_json
from qinglan.core.records import Prompt, Scorer
from qinglan.core.rng import stream_seed
from qinglan.core.run import Stage
from qinglan.learn.advantages import (
    NO_MOMENTS,
    Moments,
    adapt_kl_coef,
    estimate_advantages,
    moments_of,
    token_rewards,
    whiten,
)
from qinglan.learn.alarms import find_alarms
from qinglan.learn.checks import check_ratio, check_same_rendering, check_start, ratio_errors
from qinglan.learn.optimize import (
    Checkpointer,
    restore_training,
    training_tensors,
)
from qinglan.learn.ppo_config import PPOConfig
from qinglan.learn.ppo_metrics import rollout_metrics, score_metrics
from qinglan.learn.ppo_update import Learners, Targets, knows_old_logprobs, make_learners, update
from qinglan.learn.rollout import (
    Rollout,
    StateValues,
    draw_rollout,
    forget_samples,
    log_samples,
    prompt_positions,
    rollout_logprobs,
    state_values,
)
from qinglan.learn.scoring import ask_scorer, charge_missing_eos
from qinglan.learn.sft import PretrainSource
from qinglan.models.heads import ScalarModel
from qinglan.models.language_model import (
    LanguageModel,
    end_of_training,
    load_language_model,
    max_context,
    save_language_model,
)

__all__ = ["PPOConfig", "PPOResult", "train_ppo"]


class PPOResult(NamedTuple):
    """What training leaves."""

    policy: LanguageModel
    alarms: list[str]
    """One message for each kind of alarm, at the iteration that first raised it."""


class Setting(NamedTuple):
    """What stays as it is while the policy learns."""

    reference: LanguageModel
    scorer: Scorer
    gold: Scorer | None
    """Only measures."""
    score_range: tuple[float, float] | None
    pretrain: PretrainSource | None
    prompts: Sequence[Prompt]
    prompt_ids: list[list[int]]


class Controls(NamedTuple):
    """Small state that an iteration hands to the next; it is saved with every checkpoint."""

    kl_coef: float
    scores: Moments
    """Of all scores so far."""
    history: tuple[dict[str, float], ...]
    alarms: dict[str, str]


def train_ppo(
    policy: LanguageModel,
    reference: LanguageModel,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    config: PPOConfig,
    *,
    stage: Stage,
    seed: int,
    value_start: ScalarModel | None = None,
    pretrain: PretrainSource | None = None,
    gold: Scorer | None = None,
    score_range: tuple[float, float] | None = None,
) -> PPOResult:
    """Return a copy of `policy` trained to score higher, also saved as a model directory in `stage.dir/"model"`.

    Args:
        policy: where training starts; it is not changed.
        reference: KL is measured against it (InstructGPT: the same model as `policy`).
        scorer: one number for each completion, whatever it stands for.
        prompts: drawn in a new order each pass.
        config: settings.
        stage: folder for checkpoints and result; a killed stage goes on from its last checkpoint, bit-identical on CPU.
        seed: decides prompts, sampling and minibatches.
        value_start: the value model starts as its copy (InstructGPT: the reward model); default: the policy's trunk
            with a head of zeros. Read by estimator "gae" with a separate value model only.
        pretrain: the pretraining corpus, by position; wanted where `ptx_coef` is above 0.
        gold: a second scorer that is only logged, to see whether the first is exploited.
        score_range: lowest and highest score of a sample of what the reward model learnt from, for an alarm.

    Raises:
        InputError: no prompt, one too long, a scorer that raises or gives no number, a step-0 check that fails, a loss
            that is not finite.
    """
    directory, alarm_file = stage.dir / "model", stage.dir / "alarms.json"
    if directory.is_dir():  # written whole, after the last update: an earlier start of this stage came to its end
        return PPOResult(load_language_model(directory, policy.device)._replace(name=stage.name), read_json(alarm_file))

    prompt_ids = _encode_prompts(policy, value_start, prompts, config, stage.name)
    check_same_rendering(policy, [reference] if value_start is None else [reference, value_start], stage.name)
    corpus = _ptx_source(pretrain, config, stage.name)
    setting = Setting(reference, scorer, gold, score_range, corpus, prompts, prompt_ids)
    learners = make_learners(policy, value_start, config, seed, stage.name)
    controls = Controls(config.kl_coef, NO_MOMENTS, (), {})
    checkpointer = Checkpointer(stage.dir / "checkpoints")
    start, controls = _resume(checkpointer, learners, controls)
    forget_samples(stage, start)

    progress = stage.progress(config.num_iterations)
    for iteration in range(start, config.num_iterations):
        controls = run_iteration(learners, setting, controls, config, stage, seed, iteration)
        if (iteration + 1) % config.checkpoint_every == 0:
            _save(checkpointer, learners, controls, iteration + 1)
        latest = controls.history[-1]
        progress.show(iteration + 1, f"score {latest['score']:.3f}, KL {latest['kl']:.2f}")

    if config.returned == "ema":
        restore_training(learners.average, learners.policy.model, prefix="average.")
    alarms = list(controls.alarms.values())
    write_json(alarm_file, alarms)
    trained = end_of_training(learners.policy, config.lora)
    save_language_model(trained, directory)
    checkpointer.clear()
    return PPOResult(trained, alarms)


def run_iteration(
    learners: Learners,
    setting: Setting,
    controls: Controls,
    config: PPOConfig,
    stage: Stage,
    seed: int,
    iteration: int,
) -> Controls:
    """Sample, score, and take the updates of one iteration; log it and return the controls for the next."""
    started, where = time.monotonic(), f"{stage.name}, iteration {iteration}"
    policy, value = learners.policy, learners.value

    # 1. Prompts, in a new order each pass
    num_prompts = config.episodes_per_iteration // config.samples_per_prompt
    chosen = list(prompt_positions(len(setting.prompts), iteration * num_prompts, num_prompts, seed))

    # 2. Completions, with the log-probabilities of the policy that samples them
    rollout = draw_rollout(
        policy,
        [setting.prompts[i] for i in chosen],
        [setting.prompt_ids[i] for i in chosen],
        config.sampling,
        seed=stream_seed(seed, "ppo", "rollout", iteration),
        num_samples=config.samples_per_prompt,
    )
    seconds_sampling = time.monotonic() - started
    metrics: dict[str, float] = {}
    if iteration == 0:
        metrics |= check_start(policy, value, rollout.sequences, where)
    rollout = _settle_old_logprobs(policy, rollout, config, iteration, where)

    # 3. Scores; a completion cut at the limit pays for it
    scores = ask_scorer(setting.scorer, rollout.prompts, rollout.completions, what=f"{where}: the scorer")
    charged = charge_missing_eos(scores, rollout.finish_reasons, config.missing_eos, config.missing_eos_penalty)
    score_moments = controls.scores.merge(moments_of(torch.tensor(scores)))
    metrics |= score_metrics(setting.gold, setting.score_range, rollout, scores, charged, where)

    # 4. Log-probabilities of the reference and values of all states, once for the whole rollout
    max_tokens = config.max_tokens
    reference_logprobs = rollout_logprobs(setting.reference, rollout, config.sampling.temperature, max_tokens)
    states = None if value is None else state_values(value, rollout, max_tokens)

    # 5. Rewards, advantages, returns
    targets = make_targets(rollout, reference_logprobs, charged, states, score_moments, config, controls.kl_coef)
    metrics |= rollout_metrics(rollout, reference_logprobs, targets, controls.kl_coef)

    # 6. Updates
    metrics |= update(learners, setting.pretrain, rollout, targets, config, seed, iteration, where=where)

    # 7. KL coefficient, alarms, log
    kl_coef = controls.kl_coef
    if config.target_kl_per_completion is not None:
        target, episodes = config.target_kl_per_completion, config.episodes_per_iteration
        kl_coef = adapt_kl_coef(kl_coef, metrics["kl"], target=target, horizon=config.kl_horizon, num_episodes=episodes)
    history = (*controls.history, metrics)
    new_alarms = {k: v for k, v in find_alarms(history, config.alarms).items() if k not in controls.alarms}
    for message in new_alarms.values():
        print(f"{stage.name}: alarm: {message}", file=sys.stderr)
    stage.log(iteration, {**metrics, "seconds": time.monotonic() - started, "seconds_sampling": seconds_sampling})
    if iteration % config.samples_every == 0:
        log_samples(stage, iteration, rollout, scores, config.num_logged_samples)
    return Controls(kl_coef, score_moments, history, controls.alarms | new_alarms)


def make_targets(
    rollout: Rollout,
    reference_logprobs: Float[Tensor, "E T"],
    scores: Sequence[float],
    states: StateValues | None,
    score_moments: Moments,
    config: PPOConfig,
    kl_coef: float,
) -> Targets:
    """Return advantages and returns of a rollout. `scores` are those after the rule for a missing end token."""
    mask = rollout.completion_mask
    final = torch.tensor(scores)
    if config.scale_scores:
        final = final / max(score_moments.std, 1e-6)
    end_values = None
    if config.truncated == "bootstrap" and states is not None:
        # The episode goes on: V(s_T) already predicts the score, so none is paid.
        is_cut = torch.tensor([reason == "length" for reason in rollout.finish_reasons])
        final, end_values = torch.where(is_cut, 0.0, final), torch.where(is_cut, states.end_values, 0.0)
    rewards = token_rewards(rollout.logprobs, reference_logprobs, final, mask, kl_coef)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = estimate_advantages(
        config.estimator,
        rewards,
        mask,
        num_samples=config.samples_per_prompt,
        discount=config.discount,
        gae_lambda=config.gae_lambda,
        values=None if states is None else states.values,
        end_values=end_values,
    )
    if config.estimator == "reinforce_pp" or (config.estimator == "gae" and config.whiten_advantages):
        advantages = whiten(advantages, mask)
    value_clip = None if config.value_clip is None else config.value_clip * moments_of(returns, mask).std
    return Targets(advantages, returns, torch.zeros_like(returns) if states is None else states.values, value_clip)


# ---------------------------------------------------------------------------------------------- start, state, resume


def _encode_prompts(
    policy: LanguageModel, value: ScalarModel | None, prompts: Sequence[Prompt], config: PPOConfig, stage: str
) -> list[list[int]]:
    """Return the prompts' token ids. Raises `InputError` for no prompt, or one that leaves no room for a completion."""
    if not prompts:
        raise InputError(f"{stage}: no prompts; expected at least one; give some")
    models = [policy.model] if value is None else [policy.model, value.model]
    context, room = min(max_context(model) for model in models), config.sampling.max_new_tokens
    encoded = [policy.chat.prompt_ids(prompt.messages) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) + room > context:
            raise InputError(
                f"{stage}: prompt {prompt.id}: {len(ids)} tokens and {room} new ones exceed the context of {context}; "
                "leave out longer prompts or lower sampling.max_new_tokens"
            )
    return encoded


def _ptx_source(pretrain: PretrainSource | None, config: PPOConfig, stage: str) -> PretrainSource | None:
    """Return the pretraining corpus where it is to be mixed in, else None."""
    if config.ptx_coef == 0:
        return None
    if pretrain is None:
        raise InputError(
            f"{stage}: ptx_coef is {config.ptx_coef}, but there is no pretraining corpus; give one or set ptx_coef to 0"
        )
    return pretrain


def _save(checkpointer: Checkpointer, learners: Learners, controls: Controls, iteration: int) -> None:
    tensors = training_tensors(learners.policy.model, learners.policy_optimizer, prefix="policy.") | learners.average
    if learners.value_module is not None:
        tensors |= training_tensors(learners.value_module, learners.value_optimizer, prefix="value.")
    checkpointer.save(iteration, tensors, controls._asdict())


def _resume(checkpointer: Checkpointer, learners: Learners, controls: Controls) -> tuple[int, Controls]:
    """Put the newest checkpoint into the learners; return the iteration to go on with and the controls for it."""
    state = checkpointer.load()
    if state is None:
        return 0, controls
    restore_training(state.tensors, learners.policy.model, learners.policy_optimizer, prefix="policy.")
    if learners.value_module is not None:
        restore_training(state.tensors, learners.value_module, learners.value_optimizer, prefix="value.")
    for name, weights in learners.average.items():
        weights.copy_(state.tensors[name])
    saved = state.values
    history = tuple(saved["history"])
    return state.step, Controls(saved["kl_coef"], Moments(*saved["scores"]), history, saved["alarms"])


def _settle_old_logprobs(
    policy: LanguageModel, rollout: Rollout, config: PPOConfig, iteration: int, where: str
) -> Rollout:
    """Return the rollout with the old log-probabilities to train with.

    The sampler's serve in fp32, after a check of all tokens of the first rollout, unless the first update reads all,
    which checks them for nothing (as it does the first minibatch of later rollouts). bf16 rounds a cached decoding step
    and a full pass differently, so there they are computed again, unless the update knows them itself
    (`knows_old_logprobs`); the KL is then measured with the sampler's.
    """
    dtype = policy.device.compute_dtype
    rounds_differently = dtype != torch.float32 and not knows_old_logprobs(policy, config)
    must_recompute = config.old_logprobs == "recompute" or rounds_differently
    is_checked_later = iteration > 0 or config.minibatch_episodes == config.episodes_per_iteration
    if not must_recompute and is_checked_later:
        return rollout
    again = rollout_logprobs(policy, rollout, config.sampling.temperature, config.max_tokens)
    if must_recompute:
        return rollout._replace(logprobs=again)
    mask = rollout.completion_mask
    worst, mean = ratio_errors(again[mask], rollout.logprobs[mask])
    check_ratio(worst if dtype == torch.float32 else mean, mean, dtype, where)
    return rollout
