"""`qinglan dpo`: preference optimization of any Hugging Face policy on comparisons, without a reward model.

Opens a run folder, leaves the policy as an ordinary directory in `stages/dpo/model`, and measures it on prompt groups
that training did not see: how well the reward that it implies orders their comparisons, and, on completions of its own,
how far it went from its start. Everything that is wrong with model and file is said before the folder is made.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from qinglan.cli import CommandResult, Options
from qinglan.commands.stage_inputs import Sides, comparison_length, open_run, sides_from_file, training_limit
from qinglan.commands.stage_report import Curve, StageFindings, conclude, judge_reward_model, transcripts_section
from qinglan.core.config import Config
from qinglan.core.device import Device, Dtype, prepare_process
from qinglan.core.records import ComparisonGroup, Completion, Prompt
from qinglan.core.run import Measure
from qinglan.data.load import OnBad, load_comparisons
from qinglan.evals.metrics import mean_with_interval
from qinglan.evals.report import Section
from qinglan.learn.dpo import DPOConfig, as_implicit_scorer, train_dpo
from qinglan.models.chat import TemplateName
from qinglan.models.generate import SamplingConfig, sample_completions
from qinglan.models.language_model import LanguageModel, load_language_model, max_context
from qinglan.tasks.base_models import resolve_model


class DPOCommand(Config):
    """Preference optimization of a policy on comparisons, without a reward model."""

    model: str
    """Where training starts, and the reference: a Hugging Face causal LM directory, or a built-in size."""
    comparisons: Path
    """File or folder with comparisons; `qinglan data check` says whether it can be read."""
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
    max_measured: int = Field(default=200, ge=1)
    """At most so many held-out prompts are completed to measure the KL to the start."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64)
    """How completions of held-out prompts are drawn."""
    training: DPOConfig = DPOConfig()
    """The optimization itself (Rafailov et al. 2023)."""

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Return the presets by scale; the first is the default."""
        return {"small": {}, "paper": {"training": DPOConfig.paper().model_dump()}}


DPO_CURVES = (
    Curve("Loss", "nats per pair", {"training": "loss", "validation": "valid_loss"}),
    Curve("Pair accuracy", "accuracy", {"training": "accuracy", "validation": "valid_accuracy"}),
    Curve("Margin", "logits", {"training": "margin", "validation": "valid_margin"}),
    Curve("Log-ratio to the start", "nats per completion", {"best": "chosen_logratio", "others": "rejected_logratio"}),
    Curve("Gradient norm", "", {"norm": "grad_norm"}),
)


def dpo(config: DPOCommand, options: Options) -> CommandResult:
    """Train a policy on comparisons; measure its implied reward and its KL to the start on held-out prompt groups."""
    prepare_process()
    seed, path = options.seed, resolve_model(config.model)
    start = load_language_model(path, Device.detect(config.device, config.dtype), template=config.template)
    limit = training_limit(start, config.training.max_length, config.on_bad)
    data = sides_from_file(
        load_comparisons, config.comparisons, comparison_length(start), limit,
        on_bad=config.on_bad, held_out=config.held_out, seed=seed,
    )  # fmt: skip
    with open_run(config, options, "dpo", {"model": path, "comparisons": config.comparisons}) as run:
        stage = run.stage("dpo", config.training, config.template, config.held_out, config.on_bad, run.inputs)
        policy = train_dpo(start, data.train, config.training, stage=stage, seed=seed, valid=data.held_out)
        stage.finish()
        return conclude(run, stage, dpo_findings(start, policy, data, config, seed))


def dpo_findings(
    start: LanguageModel, policy: LanguageModel, data: Sides[ComparisonGroup], config: DPOCommand, seed: int
) -> StageFindings:
    """Return how the policy's implied reward orders held-out comparisons, its KL, and what it says."""
    verdict = f"Fitted to {len(data.train)} comparisons; the accuracy is on {len(data.held_out)} others."
    found = StageFindings(
        title="Direct preference optimization",
        verdict=(verdict, "The implied reward is beta times the log-ratio of policy and start."),
        metrics=data.counts,
        rows={},
        row_names={"floor": "The longer wins", "student": "Implied reward", "ceiling": "Best possible"},
        rows_caption="Share of held-out pairs ordered as they were judged.",
        curves=DPO_CURVES,
    )
    if not data.held_out:
        return found
    scorer = as_implicit_scorer(policy, start, config.training.beta)
    judged = judge_reward_model(data.held_out, scorer, seed)
    named = {name.replace("reward_model", "implied_reward"): value for name, value in judged.metrics.items()}
    section = judged.section._replace(title="Can the policy tell, as the reward model that it implies?")

    room = max_context(start.model) - config.sampling.max_new_tokens
    prompts = {group.prompt.id: group.prompt for group in data.held_out}.values()
    roomy = [prompt for prompt in prompts if len(start.chat.prompt_ids(prompt.messages)) <= room]
    chosen = roomy[: config.max_measured]
    written = {
        name: [row[0] for row in sample_completions(lm, chosen, config.sampling, seed=seed)]
        for name, lm in (("start", start), ("policy", policy))
    }
    scores = {name: scorer(chosen, completions) for name, completions in written.items()}
    return found._replace(
        metrics=named | measure_completions(chosen, written, scores, config.training.beta, seed) | data.counts,
        rows=judged.rows,
        sections=(section, *transcripts(chosen, written, scores, seed)),
        unscored=judged.unscored,
    )


def measure_completions(
    prompts: Sequence[Prompt],
    written: Mapping[str, Sequence[Completion]],
    scores: Mapping[str, Sequence[float]],
    beta: float,
    seed: int,
) -> dict[str, Measure]:
    """Return the KL to the start, estimated on the policy's own completions (k1), and both models' lengths."""
    if not prompts:
        return {}
    groups = [prompt.prompt_group_id for prompt in prompts]
    kls = [score / beta for score in scores["policy"]]
    found = {"kl": mean_with_interval(kls, groups, seed=seed, unit="nats per completion")}
    for name, completions in written.items():
        lengths = [float(len(one.token_ids or ())) for one in completions]
        cut = [float(one.finish_reason == "length") for one in completions]
        found[f"length/{name}"] = mean_with_interval(lengths, groups, seed=seed, unit="tokens")
        found[f"cut_short/{name}"] = mean_with_interval(cut, groups, seed=seed, unit="share")
    return found


def transcripts(
    prompts: Sequence[Prompt],
    written: Mapping[str, Sequence[Completion]],
    scores: Mapping[str, Sequence[float | None]],
    seed: int,
) -> tuple[Section, ...]:
    """Return the page's section with what start and policy say, chosen by the policy's implied reward."""
    return transcripts_section(prompts, written, scores, "implied reward", seed) if prompts else ()
