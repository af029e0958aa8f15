"""Small settings, scorers, rollouts and comparisons that the tests of the PPO loop share."""

from pathlib import Path

import torch
from tiny_world import make_lm, make_prompt, make_stage

from qinglan.core.rng import stream
from qinglan.learn.advantages import mask_of_lengths
from qinglan.learn.ppo import PPOConfig, train_ppo
from qinglan.learn.ppo_update import (
    Learners,
    Targets,
    make_learners,
)
from qinglan.learn.rollout import Rollout, draw_rollout, rollout_logprobs
from qinglan.models.generate import SamplingConfig
from qinglan.models.heads import ScalarModel
from qinglan.models.language_model import (
    LanguageModel,
    TokenSequence,
)

PROMPTS = [make_prompt(text) for text in ("abc", "hello", "x y", "who?", "1+1", "zz")]


def small(**changes) -> PPOConfig:
    """Sixteen short episodes in four minibatches."""
    settings = {
        "num_iterations": 3,
        "episodes_per_iteration": 16,
        "minibatch_episodes": 4,
        "samples_per_prompt": 2,
        "sampling": SamplingConfig(max_new_tokens=5),
        "learning_rate": 1e-2,
        "value_learning_rate": 2e-2,
        "checkpoint_every": 1,
    }
    return PPOConfig(**(settings | changes))


def count_a(prompts, completions) -> list[float]:
    return [completion.text.count("a") / 3 for completion in completions]


def brevity(prompts, completions) -> list[float]:
    return [-float(len(completion.token_ids)) for completion in completions]


def train(directory: Path, config: PPOConfig, *, lm: LanguageModel | None = None, scorer=brevity, **others):
    lm = lm or make_lm()
    return train_ppo(lm, lm, scorer, PROMPTS, config, stage=make_stage(directory, "ppo"), seed=0, **others)


def rows_of(directory: Path) -> list[dict[str, float]]:
    rows = make_stage(directory, "ppo").run.metrics("ppo")
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def weights_of(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}


def assert_equal_weights(first: LanguageModel, second: LanguageModel) -> None:
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def roll(lm: LanguageModel, *, temperature: float = 1.0, tokens: int = 5, prompts=PROMPTS) -> Rollout:
    """Two completions of each prompt."""
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=tokens)
    ids = [lm.chat.prompt_ids(prompt.messages) for prompt in prompts]
    return draw_rollout(lm, prompts, ids, sampling, seed=1, num_samples=2)


def hand_made(lm: LanguageModel, completions: list[list[int]]) -> Rollout:
    """A rollout of given completions, whose old log-probabilities are the model's own."""
    prompt_ids = lm.chat.prompt_ids(PROMPTS[0].messages)
    sequences = [TokenSequence([*prompt_ids, *ids], len(prompt_ids)) for ids in completions]
    lengths = torch.tensor([len(ids) for ids in completions])
    mask = mask_of_lengths(lengths, int(lengths.max()))
    rollout = Rollout([PROMPTS[0]] * len(completions), [], sequences, [], mask, torch.zeros(mask.shape))
    return rollout._replace(logprobs=rollout_logprobs(lm, rollout, 1.0, 4096))


def draw_targets(rollout: Rollout) -> Targets:
    shape = rollout.completion_mask.shape
    advantages, returns, values = (torch.randn(shape, generator=stream(0, key)) for key in ("a", "r", "v"))
    return Targets(advantages, returns, values, None)


def gradients(learners: Learners) -> torch.Tensor:
    """Gradients of policy and value model as one vector; they are taken away."""
    models = [learners.policy.model] + ([learners.value.model] if learners.value else [])
    found = [p.grad.flatten() for model in models for p in model.parameters() if p.grad is not None]
    for model in models:
        model.zero_grad()
    return torch.cat(found)


def learners_of(lm: LanguageModel, value: ScalarModel | None = None, **changes) -> Learners:
    return make_learners(lm, value, small(**changes), 0, "ppo")


def corpus(start: int, count: int) -> list[list[int]]:
    return [[2 + (7 * i + 3 * t) % 60 for t in range(6)] for i in range(start, start + count)]
