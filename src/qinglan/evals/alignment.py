"""What an aligned model is measured by: gold scores, rates of harm, win rates, best-of-n, and the alignment tax.

After InstructGPT, sections 3.6, 4.1 and 4.2, on the built-in world: completions of held-out prompts, sampled at
temperature 1 and greedy, graded by the answer key and judged by held-out labelers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field

from qinglan.core.config import Config
from qinglan.core.records import ComparisonGroup, Completion, Prompt, Scorer
from qinglan.core.rng import stream_seed
from qinglan.core.run import Measure
from qinglan.evals.capability import TAXED, probe_capabilities
from qinglan.evals.judge import HeadToHead, head_to_head
from qinglan.evals.metrics import mean_difference, mean_with_interval
from qinglan.evals.overoptimization import BestOfN, best_of_n_curve
from qinglan.learn.encode import encode_completion
from qinglan.learn.sft import PretrainSource
from qinglan.models.generate import SamplingConfig, sample_completions
from qinglan.models.language_model import LanguageModel, TokenSequence, completion_logprobs
from qinglan.supervisors.simulated import Labeler, Quality
from qinglan.tasks.assistant import World, draw_prompts, overall
from qinglan.tasks.item import Grade


class MeasureConfig(Config):
    """How much is measured."""

    judges_per_prompt: int = Field(default=3, ge=1)
    """Held-out labelers who compare each pair, in both orders."""
    num_ranked_prompts: int = Field(default=400, ge=1)
    """Test prompts whose completions are ranked to measure the reward model."""
    num_safety_prompts: int = Field(default=100, ge=0)
    """Further test prompts, half harmful and half harmless look-alikes, for the rates of harm and over-refusal only."""
    best_of_n_samples: int = Field(default=32, ge=2)
    """Completions per prompt from which best of n is estimated, for n up to this number."""
    num_best_of_n_prompts: int = Field(default=60, ge=1)
    """Test prompts used for best of n."""
    num_pretraining_documents: int = Field(default=300, ge=1)
    """Documents on which pretraining loss is measured before and after."""
    num_probe_items: int = Field(default=60, ge=1)
    """Items of each capability probe, before and after."""


class Answers(NamedTuple):
    """One model's completions of the test prompts."""

    sampled: list[Completion]
    """At temperature 1."""
    greedy: list[Completion]


def answer(lm: LanguageModel, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> Answers:
    """Let a model complete every prompt once sampled and once greedily."""
    greedy = sampling.model_copy(update={"temperature": 0.0})
    sampled = sample_completions(lm, prompts, sampling.model_copy(update={"temperature": 1.0}), seed=seed)
    return Answers([row[0] for row in sampled], [row[0] for row in sample_completions(lm, prompts, greedy, seed=seed)])


class Graded(NamedTuple):
    """A model's completions with their grades, in order of the prompts."""

    prompts: Sequence[Prompt]
    grades: list[Grade]

    @property
    def gold(self) -> list[float]:
        """Overall gold scores in [0, 1]."""
        return [overall(one) for one in self.grades]

    @property
    def groups(self) -> list[str]:
        """Prompt groups, the unit of the bootstrap."""
        return [prompt.prompt_group_id for prompt in self.prompts]

    def rate(self, flag: str, use_cases: Sequence[str], seed: int) -> Measure:
        """Return how often a flag of `Grade` is raised on prompts of the given use cases (their first tag)."""
        chosen = [i for i, prompt in enumerate(self.prompts) if prompt.tags[0] in use_cases]
        flags = [float(getattr(self.grades[i], flag)) for i in chosen]
        return mean_with_interval(flags, [self.prompts[i].prompt_group_id for i in chosen], seed=seed, unit="rate")

    def by_use_case(self, seed: int) -> dict[str, Measure]:
        """Return the mean gold score of each use case."""
        found = {}
        for name in sorted({prompt.tags[0] for prompt in self.prompts}):
            chosen = [i for i, prompt in enumerate(self.prompts) if prompt.tags[0] == name]
            values = [overall(self.grades[i]) for i in chosen]
            found[name] = mean_with_interval(values, [self.prompts[i].prompt_group_id for i in chosen], seed=seed)
        return found


ASKED_FOR_FACTS = ("open_qa", "unanswerable", "closed_qa", "extract", "summarise")
"""Use cases in which something can be invented."""


def grade_all(world: World, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Graded:
    """Grade completions by the answer key."""
    return Graded(prompts, [world.grade(prompt, done) for prompt, done in zip(prompts, completions, strict=True)])


def rates(graded: Graded, safety: Graded, name: str, seed: int) -> dict[str, Measure]:
    """Return gold score, hallucination, harm and over-refusal of one model as report metrics.

    Harm and over-refusal are counted on the test prompts and on further `safety` prompts together.
    """
    both = Graded([*graded.prompts, *safety.prompts], graded.grades + safety.grades)
    return {
        f"gold_score/{name}": mean_with_interval(graded.gold, graded.groups, seed=seed, unit="gold score"),
        f"hallucination_rate/{name}": graded.rate("hallucinated", ASKED_FOR_FACTS, seed),
        f"harmful_rate/{name}": both.rate("harmful", ("harmful", "benign"), seed),
        f"refusal_rate_on_benign/{name}": both.rate("refused", ("benign",), seed),
    }


def safety_prompts(count: int, known: Sequence[Prompt], seed: int) -> World:
    """Return test prompts that none of the `known` ones repeats, half harmful and half harmless look-alikes."""
    sides = [
        draw_prompts(number, stream_seed(seed, "safety", use_case), "test", use_case=use_case, known=known)
        for use_case, number in (("harmful", count - count // 2), ("benign", count // 2))
    ]
    return World(
        tuple(prompt for side in sides for prompt in side.prompts),
        {key: item for side in sides for key, item in side.items.items()},
    )


def gold_gain(after: Graded, before: Graded, seed: int) -> Measure:
    """Return the paired difference of gold scores."""
    return mean_difference(after.gold, before.gold, after.groups, seed=seed, unit="gold score")


class Bench(NamedTuple):
    """Prompts and the people who judge on them."""

    prompts: list[Prompt]
    judges: list[Labeler]
    quality: Quality
    config: MeasureConfig
    seed: int

    def judge(self, policy: Sequence[Completion], other: Sequence[Completion]) -> HeadToHead:
        """Let held-out labelers compare two models' completions of all prompts."""
        judged = self.config.judges_per_prompt
        return head_to_head(self.prompts, policy, other, self.judges, self.quality, self.seed, judges_per_prompt=judged)


def kl_to(
    reference: LanguageModel, policy: LanguageModel, prompts: Sequence[Prompt], sampled: Sequence[Completion], seed: int
) -> Measure:
    """Return KL(policy || reference) in nats per completion, estimated on what the policy sampled at temperature 1.

    The mean over completions of sum_t log policy(y_t) - log reference(y_t) (k1: unbiased, may be slightly negative).
    """
    sequences = [encode_completion(policy.chat, *one) for one in zip(prompts, sampled, strict=True)]
    pairs = zip(completion_logprobs(policy, sequences), completion_logprobs(reference, sequences), strict=True)
    groups = [prompt.prompt_group_id for prompt in prompts]
    return mean_with_interval(
        [float((own - other).sum()) for own, other in pairs], groups, seed=seed, unit="nats per completion"
    )


def best_of_n(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    proxy: Scorer,
    gold: Scorer,
    sampling: SamplingConfig,
    config: MeasureConfig,
    seed: int,
) -> BestOfN:
    """Return proxy and gold score of the best of n by the proxy, for n = 1, 2, 4, ... (Gao et al. 2022)."""
    chosen = list(prompts[: config.num_best_of_n_prompts])
    rows = sample_completions(lm, chosen, sampling, seed=seed, num_samples=config.best_of_n_samples)
    repeated = [prompt for prompt, row in zip(chosen, rows, strict=True) for _ in row]
    flat = [one for row in rows for one in row]
    shape = (len(chosen), config.best_of_n_samples)
    scores = np.array(proxy(repeated, flat)).reshape(shape), np.array(gold(repeated, flat)).reshape(shape)
    ns = [2**power for power in range(int(math.log2(config.best_of_n_samples)) + 1)]
    return best_of_n_curve(*scores, ns, [prompt.prompt_group_id for prompt in chosen], seed=seed)


def alignment_tax(
    models: Mapping[str, LanguageModel], pretrain: PretrainSource, config: MeasureConfig, seed: int
) -> dict[str, Measure]:
    """Return pretraining loss (nats per token) and probe accuracy of each model on documents of the corpus."""
    held_out = 10_000_000  # far behind every document that SFT or PPO mixes in
    documents = pretrain(held_out, config.num_pretraining_documents)
    measures = {}
    for name, lm in models.items():
        logprobs = completion_logprobs(lm, [TokenSequence(ids, 1) for ids in documents])
        losses = [-float(found.mean()) for found in logprobs]
        measures[f"pretraining_loss/{name}"] = mean_with_interval(losses, seed=seed, unit="nats per token")
        probed = probe_capabilities(lm, TAXED, num_items=config.num_probe_items, seed=seed)
        measures |= {f"capability/{probe}/{name}": measure for probe, measure in probed.items()}
    return measures


def mean_score(
    scorer: Scorer, prompts: list[Prompt], sampling: SamplingConfig, seed: int
) -> Callable[[LanguageModel], float]:
    """Return the function that scores a model by the mean score of its completions of `prompts`."""

    def select(lm: LanguageModel) -> float:
        drawn = [row[0] for row in sample_completions(lm, prompts, sampling, seed=stream_seed(seed, "select"))]
        return sum(scorer(prompts, drawn)) / len(drawn)

    return select


def range_of(scorer: Scorer, groups: list[ComparisonGroup]) -> tuple[float, float]:
    """Return the lowest and highest score on comparisons, such as a sample of those that a reward model learnt from."""
    scores = scorer(
        [group.prompt for group in groups for _ in group.completions],
        [one for group in groups for one in group.completions],
    )
    return min(scores), max(scores)
