"""The updates of PPO: gradients of a minibatch, those of pretraining in the same step, and the weights' average.

One optimizer step sees a whole minibatch of episodes, however it is cut into micro-batches: losses are summed over its
sampled tokens and divided by their number. Policy and value model share nothing, or the trunk; each has its optimizer
and its rate.

Legend: E episodes of an iteration, T tokens of the longest completion, N sampled tokens of a micro-batch.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qinglan.core.errors import InputError
from qinglan.core.rng import permutation, stream_seed
from qinglan.learn.batch import make_batches
from qinglan.learn.checks import check_ratio
from qinglan.learn.compiling import Compiled, compile_trunks
from qinglan.learn.gradients import Backward, accumulate
from qinglan.learn.optimize import (
    check_finite,
    clip_gradients,
    make_optimizer,
    set_lr,
    training_tensors,
    warmup_factor,
)
from qinglan.learn.policy_losses import clipped_surrogate, value_loss
from qinglan.learn.ppo_config import PPOConfig
from qinglan.learn.rollout import Rollout
from qinglan.learn.sft import PretrainSource
from qinglan.models import heads
from qinglan.models.completion_rows import CompletionBatch, lengths_of, make_completion_batches, states_before
from qinglan.models.heads import ScalarModel, scalar_model_from, token_values
from qinglan.models.language_model import (
    LanguageModel,
    TokenBatch,
    TokenSequence,
    max_context,
    start_of_training,
    target_logprobs,
    target_states,
    token_logprobs,
)
from qinglan.models.trunk import num_at_once


class Learners(NamedTuple):
    """What learns, in place: the value model with estimator "gae" only, the average where `returned` is "ema"."""

    policy: LanguageModel
    policy_optimizer: torch.optim.Optimizer
    value: ScalarModel | None
    value_optimizer: torch.optim.Optimizer | None
    average: dict[str, Tensor]
    shares_trunk: bool = False
    """True where the value model is a head on the policy's trunk."""
    compiled: Compiled = nullcontext
    """Makes the context in which gradients are computed."""

    @property
    def value_module(self) -> nn.Module | None:
        """What the value model learns by itself: all of it, or its head alone where the trunk is the policy's."""
        if self.value is None:
            return None
        return self.value.model.get_submodule("score") if self.shares_trunk else self.value.model


class Targets(NamedTuple):
    """What the updates of one iteration aim at; tensors [E, T] on the CPU."""

    advantages: Float[Tensor, "E T"]
    returns: Float[Tensor, "E T"]
    old_values: Float[Tensor, "E T"]
    value_clip: float | None
    """In the units of the returns."""


def make_learners(
    start: LanguageModel, value_start: ScalarModel | None, config: PPOConfig, seed: int, stage: str
) -> Learners:
    """Return copies of policy and value model with an optimizer each, compiled where that is wanted."""
    learners = _make_learners(start, value_start, config, seed, stage)
    own_trunk = [] if learners.value is None or learners.shares_trunk else [learners.value.model]
    models = [learners.policy.model, *own_trunk]
    return learners._replace(compiled=compile_trunks(models, config.compile, start.device, stage))


def _make_learners(
    start: LanguageModel, value_start: ScalarModel | None, config: PPOConfig, seed: int, stage: str
) -> Learners:
    policy = start_of_training(start, config.lora, seed=stream_seed(seed, "ppo", "adapter"), name=stage)
    policy_optimizer = make_optimizer(policy.model, config.learning_rate, betas=config.betas, eps=config.eps)
    average: dict[str, Tensor] = {}
    if config.returned == "ema":
        average = {name: weights.clone() for name, weights in training_tensors(policy.model, prefix="average.").items()}
    learners = Learners(policy, policy_optimizer, None, None, average)
    if config.estimator != "gae":
        return learners
    value = _make_value_model(start, policy, value_start, config, seed)._replace(name=f"{stage}/value")
    learners = learners._replace(value=value, shares_trunk=config.value_model == "shared_trunk")
    assert learners.value_module is not None
    optimizer = make_optimizer(learners.value_module, config.value_learning_rate, betas=config.betas, eps=config.eps)
    return learners._replace(value_optimizer=optimizer)


def _make_value_model(
    start: LanguageModel, policy: LanguageModel, value_start: ScalarModel | None, config: PPOConfig, seed: int
) -> ScalarModel:
    """Return a copy of `value_start`, or a trunk with a head of zeros: nothing is known yet, every state is worth 0."""
    is_shared = config.value_model == "shared_trunk"
    if is_shared or value_start is None:
        lm = policy if is_shared else start
        value_start = scalar_model_from(lm, seed=seed, trunk="same" if is_shared else "shared")
        with torch.no_grad():
            value_start.model.get_parameter("score.weight").zero_()
    if is_shared:
        return value_start
    seed = stream_seed(seed, "ppo", "value adapter")
    return heads.start_of_training(value_start, config.lora, seed=seed, name=value_start.name)


class Tally(NamedTuple):
    """Sums over the sampled tokens of minibatches, for the log."""

    num_tokens: float = 0.0
    policy_loss: float = 0.0
    clip_fraction: float = 0.0
    approx_kl: float = 0.0
    ratio: float = 0.0
    ratio_error: float = 0.0
    entropy: float = 0.0
    value_loss: float = 0.0
    value_clip_fraction: float = 0.0
    worst_ratio_error: float = 0.0
    """The largest |ratio - 1| of a token, not a sum."""

    def add(self, other: "Tally") -> "Tally":
        """Return the tally of both."""
        sums = [a + b for a, b in zip(self[:-1], other[:-1], strict=True)]
        worst = max(self.worst_ratio_error, other.worst_ratio_error)
        return Tally(*sums)._replace(worst_ratio_error=worst)

    def means(self) -> dict[str, float]:
        """Return the means over tokens, by name."""
        return {name: total / self.num_tokens for name, total in zip(self._fields[1:-1], self[1:-1], strict=True)}


def update(
    learners: Learners,
    pretrain: PretrainSource | None,
    rollout: Rollout,
    targets: Targets,
    config: PPOConfig,
    seed: int,
    iteration: int,
    *,
    where: str,
) -> dict[str, float]:
    """Take the optimizer steps of one iteration and return its mean metrics.

    Raises `InputError` if a gradient is not finite, or if the ratio of new to old probabilities is not 1 at the first.
    """
    policy, value = learners.policy, learners.value
    rate = warmup_factor(iteration, config.warmup_iterations, config.warmup_start)
    set_lr(learners.policy_optimizer, rate * config.learning_rate)
    if learners.value_optimizer is not None:
        set_lr(learners.value_optimizer, rate * config.value_learning_rate)
    tally, metrics = Tally(), {"lr": rate * config.learning_rate}
    policy_norms: list[float] = []
    value_norms: list[float] = []
    ptx_losses: list[float] = []
    for epoch in range(config.inner_epochs):
        order = minibatch_order(config, seed, iteration, epoch)
        for place in range(0, len(order), config.minibatch_episodes):
            # Gradients of the whole minibatch, however it is cut; those of pretraining go into the same step.
            chosen = order[place : place + config.minibatch_episodes]
            with learners.compiled():
                found = accumulate_gradients(learners, rollout, targets, chosen, config)
            if epoch == place == 0:
                mean_error = found.ratio_error / found.num_tokens
                # In bf16 a sampler's token may stray from the trainer's, which then serves only to measure.
                worst_error = mean_error if knows_old_logprobs(policy, config) else found.worst_ratio_error
                check_ratio(worst_error, mean_error, policy.device.compute_dtype, where)
                metrics["start_ratio_error"] = found.worst_ratio_error
            if pretrain is not None:
                num_done = iteration * config.updates_per_iteration + len(policy_norms)
                count = config.ptx_ratio * config.minibatch_episodes
                ptx_losses.append(accumulate_ptx_gradients(policy, pretrain(num_done * count, count), config))
            # Both models are checked before either moves.
            policy_norms.append(_gradient_norm(policy.model, config, "the policy's gradient", where))
            if learners.value_module is not None:
                value_norms.append(_gradient_norm(learners.value_module, config, "the value model's gradient", where))
            _take_step(learners, config)
            tally = tally.add(found)
    metrics |= tally.means() | {"grad_norm": fmean(policy_norms)}
    if value is not None:
        metrics["value_grad_norm"] = fmean(value_norms)
    if ptx_losses:
        metrics["ptx_loss"] = fmean(ptx_losses)
    return metrics


def minibatch_order(config: PPOConfig, seed: int, iteration: int, epoch: int) -> list[int]:
    """Return the episodes of one pass in a new order; the samples of one prompt stay together where minibatches allow.

    Together they can share the prompt's computation (`models/completion_rows.py`).
    """
    together = config.samples_per_prompt if config.minibatch_episodes % config.samples_per_prompt == 0 else 1
    prompts = permutation(config.episodes_per_iteration // together, seed, "ppo", "minibatch", iteration, epoch)
    return [prompt * together + sample for prompt in prompts for sample in range(together)]


def knows_old_logprobs(policy: LanguageModel, config: PPOConfig) -> bool:
    """Return True if an update takes its own log-probabilities, without a gradient, for the old ones.

    So it is in bf16 where a rollout serves one update: the policy is still the one that sampled it, and nothing is left
    of what bf16 rounds differently in a decoding step.
    """
    return config.updates_per_iteration == 1 and policy.device.compute_dtype != torch.float32


def accumulate_gradients(
    learners: Learners, rollout: Rollout, targets: Targets, chosen: Sequence[int], config: PPOConfig
) -> Tally:
    """Add the gradients of one minibatch of episodes to the models' `.grad`: the mean over all its sampled tokens."""
    policy, value = learners.policy, learners.value
    num_tokens = int(rollout.completion_mask[list(chosen)].sum())
    models = [policy.model] if value is None else [policy.model, value.model]

    def of_batch(batch: CompletionBatch, backward: Backward) -> Tally:
        mask = rollout.completion_mask[batch.numbers]

        def flat(matrix: Tensor) -> Float[Tensor, " N"]:
            return matrix[batch.numbers][mask].to(policy.device.torch_device)

        with policy.device.autocast():
            states = states_before(policy.model, batch)
            new = token_logprobs(
                policy.model,
                states,
                batch.completion_ids,
                temperature=config.sampling.temperature,
                entropy_gradient=config.entropy_coef > 0,
            )
        sampled = flat(rollout.logprobs)
        old = new.logprobs.detach() if knows_old_logprobs(policy, config) else sampled
        loss = clipped_surrogate(new.logprobs, old, flat(targets.advantages), config.clip)
        errors = torch.expm1(new.logprobs.detach() - sampled).abs()
        total = (loss.loss.sum() - config.entropy_coef * new.entropy.sum()) / num_tokens
        if not learners.shares_trunk:
            backward(total)
        fitted, value_clipped = 0.0, 0.0
        if value is not None:
            if not learners.shares_trunk:
                with value.device.autocast():
                    states = states_before(value.model, batch)
            values = token_values(value, states)
            found = value_loss(values, flat(targets.old_values), flat(targets.returns), targets.value_clip)
            value_total = found.loss.sum() / num_tokens
            # One backward pass through a shared trunk, where the value loss has its weight; else each model its own.
            backward(total + config.value_coef * value_total if learners.shares_trunk else value_total)
            fitted, value_clipped = float(found.loss.detach().sum()), float(found.is_clipped.sum())
        return Tally(
            num_tokens=len(new.logprobs),
            policy_loss=float(loss.loss.detach().sum()),
            clip_fraction=float(loss.is_clipped.sum()),
            approx_kl=float(loss.approx_kl.sum()),
            ratio=float(loss.ratio.double().sum()),
            entropy=float(new.entropy.detach().sum()),
            value_loss=fitted,
            value_clip_fraction=value_clipped,
            ratio_error=float(errors.sum()),
            worst_ratio_error=float(errors.max()),
        )

    at_once = num_at_once(models, policy.device, lengths_of(rollout.sequences, chosen), config.max_tokens)
    batches = make_completion_batches(
        rollout.sequences, chosen, models,
        max_tokens=config.max_tokens // at_once, pack=config.pack, multiple_of=at_once,
    )  # fmt: skip
    return reduce(Tally.add, accumulate(models, batches, of_batch, at_once), Tally())


def accumulate_ptx_gradients(policy: LanguageModel, token_ids: Sequence[list[int]], config: PPOConfig) -> float:
    """Add gamma times the gradient of the mean pretraining loss to the policy's `.grad`; return the loss without gamma.

    InstructGPT, objective 2: gamma * E over the pretraining corpus of log pi(x), here as the mean over tokens, in nats.
    """
    limit = max_context(policy.model)
    sequences = [TokenSequence(list(ids[:limit]), 1) for ids in token_ids if len(ids) > 1]
    if not sequences:
        raise InputError(
            f"ptx: no pretraining sequence of two tokens or more among {len(token_ids)}; expected text to predict; "
            "give a corpus or set ptx_coef to 0"
        )
    num_tokens = sum(len(sequence.token_ids) - 1 for sequence in sequences)

    def of_batch(batch: TokenBatch, backward: Backward) -> float:
        batch = batch.to(policy.device.torch_device)
        with policy.device.autocast():
            states = target_states(policy.model, batch)
            logprobs = target_logprobs(policy.model, states, batch, with_entropy=False).logprobs
        loss = -logprobs.sum() / num_tokens
        backward(config.ptx_coef * loss)
        return float(loss.detach())

    at_once = num_at_once([policy.model], policy.device, [len(one.token_ids) for one in sequences], config.max_tokens)
    batches = make_batches(sequences, max_tokens=config.max_tokens // at_once, pack=True, multiple_of=at_once)
    return sum(accumulate([policy.model], batches, of_batch, at_once))


def _gradient_norm(model: nn.Module, config: PPOConfig, what: str, where: str) -> float:
    """Clip the gradients and return their norm before; raise `InputError` if it is not finite."""
    return check_finite(clip_gradients(model, config.max_grad_norm), f"the norm of {what}", where)


def _take_step(learners: Learners, config: PPOConfig) -> None:
    """Let both optimizers move once, and the policy's average follow."""
    for optimizer in (learners.policy_optimizer, learners.value_optimizer):
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        for name, parameter in learners.policy.model.named_parameters():
            if learners.average and parameter.requires_grad:  # average = decay * average + (1 - decay) * weights
                learners.average[f"average.model.{name}"].lerp_(parameter, 1 - config.ema_decay)
