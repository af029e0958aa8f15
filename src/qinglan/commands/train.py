"""`qinglan sft` and `qinglan reward`: one supervised stage of InstructGPT on any model directory and your own files.

Each opens a run folder, leaves the model as an ordinary directory in `stages/<stage>/model`, measures it on prompt
groups that training did not see, and writes report.json and a short report.html. Everything that is wrong with models
and files is said before the folder is made. Reinforcement learning is in `ppo.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from qinglan.cli import CommandResult, Options
from qinglan.commands.stage_inputs import (
    Sides,
    comparison_length,
    demonstration_length,
    open_run,
    pretraining_source,
    sides_from_file,
    training_limit,
)
from qinglan.commands.stage_report import Curve, StageFindings, conclude, judge_reward_model, transcripts_section
from qinglan.core.config import Config
from qinglan.core.device import Device, Dtype, prepare_process
from qinglan.core.records import ComparisonGroup, Completion, Demonstrated
from qinglan.data.load import OnBad, load_comparisons, load_demonstrations
from qinglan.evals.metrics import mean_with_interval
from qinglan.evals.report import Section, choose_transcripts
from qinglan.learn.encode import encode_completion
from qinglan.learn.reward import RewardConfig, train_reward_model
from qinglan.learn.sft import SFTConfig, train_sft
from qinglan.models.chat import TemplateName
from qinglan.models.generate import SamplingConfig, sample_completions
from qinglan.models.heads import ScalarModel, as_scorer
from qinglan.models.language_model import LanguageModel, completion_logprobs, load_language_model, max_context
from qinglan.tasks.base_models import resolve_model

Presets = dict[str, dict[str, Any]]


# ------------------------------------------------------------------------------------------------------------- sft


class SFTCommand(Config):
    """Supervised fine-tuning of a model on demonstrations."""

    model: str
    """Where training starts: a Hugging Face causal LM directory, or a size of the built-in family."""
    demonstrations: Path
    """File or folder with demonstrations; `qinglan data check` says whether it can be read."""
    template: TemplateName = "own"
    """Chat template: the model's own, or plain "User: ... Assistant:" text for models without one."""
    device: str = "auto"
    """cpu, cuda or auto."""
    dtype: Dtype = "auto"
    """Precision of matrix products; auto is bfloat16 on a GPU that has it, else float32. Losses are float32 always."""
    on_bad: OnBad = "stop"
    """Rows that are broken or longer than the model's context: stop and name them, or skip and count them."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompt groups kept for measuring."""
    pretraining: Path | None = None
    """Text file (documents between empty lines) for `training.pretrain_fraction` above 0."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64)
    """How completions for the report page are drawn; greedily, whatever its temperature."""
    training: SFTConfig = SFTConfig()
    """The fine-tuning itself (InstructGPT, C.1 and C.3)."""

    @classmethod
    def presets(cls) -> Presets:
        """Return the presets by scale; the first is the default."""
        return {"small": {}, "paper": {"training": SFTConfig.paper_baseline().model_dump()}}


SFT_CURVES = (
    Curve("Loss", "nats per token", {"training": "loss", "validation": "valid_loss"}),
    Curve("Gradient norm", "", {"norm": "grad_norm"}),
    Curve("Learning rate", "", {"rate": "lr"}),
)


def sft(config: SFTCommand, options: Options) -> CommandResult:
    """Fine-tune, and measure the loss on held-out demonstrations before and after."""
    prepare_process()
    seed, path = options.seed, resolve_model(config.model)
    base = load_language_model(path, Device.detect(config.device, config.dtype), template=config.template)
    limit = training_limit(base, config.training.max_length, config.on_bad)
    data = sides_from_file(
        load_demonstrations, config.demonstrations, demonstration_length(base), limit,
        on_bad=config.on_bad, held_out=config.held_out, seed=seed,
    )  # fmt: skip
    mix = config.training.pretrain_fraction
    pretrain = pretraining_source(config.pretraining, mix, "training.pretrain_fraction", base, seed)
    inputs = {"model": path, "demonstrations": config.demonstrations, "pretraining": config.pretraining}
    with open_run(config, options, "sft", inputs) as run:
        stage = run.stage("sft", config.training, config.template, config.held_out, config.on_bad, run.inputs)
        student = train_sft(
            base, data.train, config.training, stage=stage, seed=seed, pretrain=pretrain, valid=data.held_out
        )
        stage.finish()
        return conclude(run, stage, sft_findings(base, student, data, config.sampling, seed))


def sft_findings(
    base: LanguageModel, student: LanguageModel, data: Sides[Demonstrated], sampling: SamplingConfig, seed: int
) -> StageFindings:
    """Return the loss on held-out demonstrations before and after, and what is written for three of their prompts."""
    found = StageFindings(
        title="Supervised fine-tuning",
        verdict=(f"Fine-tuned on {len(data.train)} demonstrations; a lower loss on held-out ones is better.",),
        metrics=data.counts,
        rows={},
        row_names={"floor": "Before", "student": "After"},
        rows_caption="Mean loss per token of held-out demonstrations.",
        curves=SFT_CURVES,
    )
    if not data.held_out:
        return found
    groups = [one.prompt.prompt_group_id for one in data.held_out]
    loss = {name: losses(lm, data.held_out) for name, lm in (("base", base), ("sft", student))}
    measured = {
        f"held_out_loss/{name}": mean_with_interval(values, groups, seed=seed, unit="nats per token")
        for name, values in loss.items()
    }
    return found._replace(
        metrics=measured | data.counts,
        rows={"floor": measured["held_out_loss/base"], "student": measured["held_out_loss/sft"]},
        sections=write_before_and_after({"base": base, "sft": student}, data.held_out, loss, sampling, seed),
    )


def losses(lm: LanguageModel, demonstrations: Sequence[Demonstrated]) -> list[float]:
    """Return the mean loss per token of each demonstration, in nats."""
    sequences = [encode_completion(lm.chat, one.prompt, one.demonstration) for one in demonstrations]
    return [-float(logprobs.mean()) for logprobs in completion_logprobs(lm, sequences)]


def write_before_and_after(
    models: Mapping[str, LanguageModel],
    shown: Sequence[Demonstrated],
    loss: Mapping[str, Sequence[float]],
    sampling: SamplingConfig,
    seed: int,
) -> tuple[Section, ...]:
    """Return the page's section with greedy completions of three held-out prompts, chosen by the last model's loss."""
    *_, (last, lm) = models.items()
    room = max_context(lm.model) - sampling.max_new_tokens
    roomy = [i for i, one in enumerate(shown) if len(lm.chat.prompt_ids(one.prompt.messages)) <= room]
    chosen = [roomy[choice.item] for choice in choose_transcripts([-loss[last][i] for i in roomy], seed)]
    prompts = [shown[i].prompt for i in chosen]
    greedy = sampling.model_copy(update={"temperature": 0.0})
    written: dict[str, Sequence[Completion]] = {"demonstration": [shown[i].demonstration for i in chosen]}
    scores: dict[str, Sequence[float | None]] = {"demonstration": [None] * len(chosen)}
    for name, lm in models.items():
        written[name] = [row[0] for row in sample_completions(lm, prompts, greedy, seed=seed)]
        scores[name] = [-loss[name][i] for i in chosen]
    return transcripts_section(prompts, written, scores, "log-likelihood per token of the demonstration", seed)


# ---------------------------------------------------------------------------------------------------------- reward


class RewardCommand(Config):
    """Fitting of a reward model to comparisons."""

    model: str
    """The model whose trunk is copied: a Hugging Face causal LM directory, or a size of the built-in family."""
    comparisons: Path
    """File or folder with comparisons; `qinglan data check` says whether it can be read."""
    demonstrations: Path | None = None
    """Demonstrations whose mean score becomes 0 (InstructGPT, section 3.5); without them scores keep their origin."""
    template: TemplateName = "own"
    """Chat template: the model's own, or plain "User: ... Assistant:" text for models without one."""
    device: str = "auto"
    """cpu, cuda or auto."""
    dtype: Dtype = "auto"
    """Precision of matrix products; auto is bfloat16 on a GPU that has it, else float32. Losses are float32 always."""
    on_bad: OnBad = "stop"
    """Rows that are broken or longer than the model's context: stop and name them, or skip and count them."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompt groups kept for measuring."""
    training: RewardConfig = RewardConfig()
    """The fitting itself (InstructGPT, section 3.5 and C.2)."""

    @classmethod
    def presets(cls) -> Presets:
        """Return the presets by scale; the first is the default."""
        return {"small": {}, "paper": {"training": RewardConfig.paper().model_dump()}}


REWARD_CURVES = (
    Curve("Loss", "nats per pair", {"training": "loss", "validation": "valid_loss"}),
    Curve("Pair accuracy", "accuracy", {"training": "accuracy", "validation": "valid_accuracy"}),
    Curve("Gradient norm", "", {"norm": "grad_norm"}),
    Curve("Learning rate", "", {"rate": "lr"}),
)


def reward(config: RewardCommand, options: Options) -> CommandResult:
    """Train a reward model, and measure its pair accuracy and calibration on held-out prompt groups."""
    prepare_process()
    seed, path = options.seed, resolve_model(config.model)
    base = load_language_model(path, Device.detect(config.device, config.dtype), template=config.template)
    limit = training_limit(base, config.training.max_length, config.on_bad)
    data = sides_from_file(
        load_comparisons, config.comparisons, comparison_length(base), limit,
        on_bad=config.on_bad, held_out=config.held_out, seed=seed,
    )  # fmt: skip
    shown: list[Demonstrated] = []
    if config.demonstrations is not None:
        shown = sides_from_file(
            load_demonstrations, config.demonstrations, demonstration_length(base), limit,
            on_bad=config.on_bad, held_out=0.0, seed=seed,
        ).train  # fmt: skip
    inputs = {"model": path, "comparisons": config.comparisons, "demonstrations": config.demonstrations}
    with open_run(config, options, "reward", inputs) as run:
        stage = run.stage("reward_model", config.training, config.template, config.held_out, config.on_bad, run.inputs)
        model = train_reward_model(
            base, data.train, config.training, stage=stage, seed=seed, valid=data.held_out, demonstrations=shown
        )
        stage.finish()
        return conclude(run, stage, reward_findings(model, data, seed))


def reward_findings(model: ScalarModel, data: Sides[ComparisonGroup], seed: int) -> StageFindings:
    """Return how well the reward model orders held-out comparisons."""
    verdict = f"Fitted to {len(data.train)} comparisons; the accuracy is on {len(data.held_out)} others."
    found = StageFindings(
        title="Reward model",
        verdict=(verdict,),
        metrics=data.counts,
        rows={},
        row_names={"floor": "The longer wins", "student": "Reward model", "ceiling": "Best possible"},
        rows_caption="Share of held-out pairs ordered as they were judged.",
        curves=REWARD_CURVES,
    )
    if not data.held_out:
        return found
    judged = judge_reward_model(data.held_out, as_scorer(model), seed)
    return found._replace(
        metrics=judged.metrics | data.counts, rows=judged.rows, sections=(judged.section,), unscored=judged.unscored
    )
