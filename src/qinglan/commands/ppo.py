"""`qinglan ppo`: reinforcement learning of any Hugging Face policy against a reward model or a Python function.

The stage of InstructGPT, section 3.5, by itself: a run folder with the policy as an ordinary directory in
`stages/ppo/model`, its scores beside its start's on prompts that it was not trained on, report.json and report.html.
Everything that is wrong with models, files and reward function is said before the folder is made.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from qinglan.cli import CommandResult, Options
from qinglan.commands.stage_inputs import Limit, Sides, open_run, pretraining_source, sides_from_file
from qinglan.commands.stage_report import Curve, StageFindings, conclude, transcripts_section
from qinglan.core.config import Config
from qinglan.core.device import Device, Dtype, prepare_process
from qinglan.core.records import Completion, Prompt, Scorer
from qinglan.core.rng import stream_seed
from qinglan.core.run import Measure
from qinglan.data.load import OnBad, load_prompts
from qinglan.evals.alignment import Answers, answer, kl_to
from qinglan.evals.metrics import mean_difference, mean_with_interval
from qinglan.learn.checks import check_same_rendering
from qinglan.learn.ppo import train_ppo
from qinglan.learn.ppo_config import PPOConfig
from qinglan.learn.reward_function import load_reward_function
from qinglan.learn.scoring import ask_scorer
from qinglan.models.chat import TemplateName
from qinglan.models.generate import SamplingConfig, sample_completions
from qinglan.models.heads import as_scorer, load_scalar_model
from qinglan.models.language_model import LanguageModel, load_language_model, max_context
from qinglan.tasks.base_models import resolve_model


class PPOCommand(Config):
    """Reinforcement learning of a policy against a reward model or a Python function."""

    policy: str
    """Where training starts, and the reference of the KL: a Hugging Face causal LM directory, or a built-in size."""
    prompts: Path
    """File or folder with prompts; those of demonstrations and comparisons count too."""
    reward_model: Path | None = None
    """Directory of a reward model, which also starts the value model."""
    reward: str | None = None
    """A Python function "module:function" of prompts and completions in place of a reward model."""
    template: TemplateName = "own"
    """Chat template of the policy: its own, or plain "User: ... Assistant:" text for models without one."""
    device: str = "auto"
    """cpu, cuda or auto."""
    dtype: Dtype = "auto"
    """Precision of matrix products; auto is bfloat16 on a GPU that has it, else float32. Losses are float32 always."""
    on_bad: OnBad = "stop"
    """Rows that are broken or leave no room for a completion: stop and name them, or skip and count them."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompt groups kept for measuring."""
    max_measured: int = Field(default=200, ge=1)
    """At most so many held-out prompts are measured."""
    pretraining: Path | None = None
    """Text file (documents between empty lines) for `training.ptx_coef` above 0."""
    training: PPOConfig = PPOConfig()
    """The reinforcement learning itself (InstructGPT, section 3.5 and C.4)."""

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Return the presets by scale; the first is the default."""
        return {"small": {}, "paper": {"training": PPOConfig.paper().model_dump()}}

    @model_validator(mode="after")
    def _one_reward(self) -> Self:
        if (self.reward_model is None) == (self.reward is None):
            raise ValueError("wants a reward: give either --reward-model DIR or --reward module:function")
        return self


PPO_CURVES = (
    Curve("Score", "", {"score": "score"}),
    Curve("KL to the start", "nats per completion", {"policy": "kl"}),
    Curve("Length", "tokens", {"policy": "length"}),
    Curve("Entropy", "nats per token", {"policy": "entropy"}),
    Curve("Cut at the limit", "share", {"policy": "finish_length"}),
    Curve("Clip fraction", "share", {"policy": "clip_fraction"}),
)


class Scores(NamedTuple):
    """What the scorer says of start and policy."""

    metrics: dict[str, Measure]
    sampled_scores: dict[str, list[float]]
    unscored: int


def ppo(config: PPOCommand, options: Options) -> CommandResult:
    """Train a policy, and compare its scores with its start's on held-out prompts, sampled and greedy."""
    prepare_process()
    seed, path, device = options.seed, resolve_model(config.policy), Device.detect(config.device, config.dtype)
    start = load_language_model(path, device, template=config.template)
    value_start = None
    if config.reward_model is not None:
        value_start = load_scalar_model(config.reward_model, device)
        check_same_rendering(start, [value_start], "ppo")
    scorer = as_scorer(value_start) if value_start is not None else load_reward_function(str(config.reward))
    sampling = config.training.sampling
    context = min(max_context(lm.model) for lm in (start, value_start) if lm is not None)
    limit = Limit(context - sampling.max_new_tokens, config.on_bad, f"context {context} less max_new_tokens")
    data = sides_from_file(
        load_prompts, config.prompts, lambda prompt: len(start.chat.prompt_ids(prompt.messages)), limit,
        on_bad=config.on_bad, held_out=config.held_out, seed=seed,
    )  # fmt: skip
    pretrain = pretraining_source(config.pretraining, config.training.ptx_coef, "training.ptx_coef", start, seed)
    try_scorer(scorer, start, data.train[:2], sampling, seed)
    inputs = {
        "policy": path,
        "prompts": config.prompts,
        "reward_model": config.reward_model,
        "pretraining": config.pretraining,
    }
    with open_run(config, options, "ppo", inputs) as run:
        settings = (config.training, config.template, config.held_out, config.on_bad, config.reward)
        stage = run.stage("ppo", *settings, run.inputs)
        result = train_ppo(
            start, start, scorer, data.train, config.training,
            stage=stage, seed=seed, value_start=value_start, pretrain=pretrain,
        )  # fmt: skip
        stage.finish({"alarms": result.alarms})

        prompts = (data.held_out or data.train)[: config.max_measured]
        models = {"start": start, "policy": result.policy}
        answers = {name: answer(lm, prompts, sampling, seed) for name, lm in models.items()}
        found = compare_scores(prompts, answers, scorer, seed)
        found.metrics["kl"] = kl_to(start, result.policy, prompts, answers["policy"].sampled, seed)
        return conclude(run, stage, ppo_findings(found, answers, prompts, data, result.alarms, seed))


def ppo_findings(
    found: Scores,
    answers: Mapping[str, Answers],
    prompts: Sequence[Prompt],
    data: Sides[Prompt],
    alarms: Sequence[str],
    seed: int,
) -> StageFindings:
    """Return the rows, and what start and policy write for the worst, the median and the best prompt."""
    seen = "held-out" if data.held_out else "training"
    verdict = f"Trained on {len(data.train)} prompts; scores are on {len(prompts)} {seen} ones, sampled and greedy."
    sampled = {name: both.sampled for name, both in answers.items()}
    return StageFindings(
        title="Reinforcement learning",
        verdict=(verdict, "The score is what was trained for (the proxy); it is not what people would prefer."),
        metrics=found.metrics | data.counts,
        rows={"floor": found.metrics["score/start"], "student": found.metrics["score/policy"]},
        row_names={"floor": "Start", "student": "Policy"},
        rows_caption=f"Mean score on {seen} prompts, sampled at temperature 1.",
        curves=PPO_CURVES,
        sections=transcripts_section(prompts, sampled, found.sampled_scores, "score", seed),
        alarms=tuple(alarms),
        unscored=found.unscored,
    )


def try_scorer(
    scorer: Scorer, lm: LanguageModel, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
) -> None:
    """Ask the scorer about one completion of each prompt; raises `InputError` where it raises or gives no number."""
    drawn = [row[0] for row in sample_completions(lm, prompts, sampling, seed=stream_seed(seed, "try the scorer"))]
    ask_scorer(scorer, prompts, drawn, what="the scorer, asked before training")


def compare_scores(prompts: Sequence[Prompt], answers: Mapping[str, Answers], scorer: Scorer, seed: int) -> Scores:
    """Return score, length and share of cut completions of both models, and the policy's gain, sampled and greedy."""
    groups = [prompt.prompt_group_id for prompt in prompts]
    found: dict[str, Measure] = {}
    by_kind: dict[str, dict[str, list[float]]] = {}
    for kind in ("sampled", "greedy"):
        mark = "" if kind == "sampled" else "_greedy"
        scores = by_kind.setdefault(kind, {})
        for name, both in answers.items():
            completions: list[Completion] = getattr(both, kind)
            scores[name] = ask_scorer(scorer, prompts, completions, allow_unscored=True)
            lengths = [float(len(one.token_ids or ())) for one in completions]
            cut = [float(one.finish_reason == "length") for one in completions]
            found[f"score/{name}{mark}"] = mean_with_interval(scores[name], groups, seed=seed, unit="score")
            found[f"length/{name}{mark}"] = mean_with_interval(lengths, groups, seed=seed, unit="tokens")
            found[f"cut_short/{name}{mark}"] = mean_with_interval(cut, groups, seed=seed, unit="share")
        gain = mean_difference(scores["policy"], scores["start"], groups, seed=seed, unit="score")
        found[f"score_gain{mark}"] = gain
    unscored = sum(math.isnan(one) for scores in by_kind.values() for values in scores.values() for one in values)
    return Scores(found, by_kind["sampled"], unscored)
