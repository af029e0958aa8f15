"""`qinglan sample | score | evaluate | report`: use trained models, measure them, and read a finished run."""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from qinglan.cli import CommandResult, Options
from qinglan.commands.stage_report import judge_reward_model
from qinglan.core.config import Config
from qinglan.core.device import Device, prepare_process
from qinglan.core.errors import InputError
from qinglan.core.files import hash_of, read_json, write_jsonl
from qinglan.core.records import ComparisonGroup, Completion, Message, Prompt, record_id
from qinglan.core.run import Measure, Progress, Report
from qinglan.data.load import OnBad, load_comparisons, load_prompts, parse_files
from qinglan.data.own_records import record_of
from qinglan.data.rows import Row, RowProblem, list_files, read_rows
from qinglan.data.write import write_records
from qinglan.evals.alignment import Graded, answer, grade_all, rates
from qinglan.evals.formatting import visible
from qinglan.evals.instruct_gpt import HEADLINE
from qinglan.evals.metrics import mean_with_interval, pair_accuracy, scored_pairs
from qinglan.evals.report import headline, markdown_summary
from qinglan.models import remote
from qinglan.models.chat import TemplateName
from qinglan.models.generate import SamplingConfig, sample_completions
from qinglan.models.heads import as_scorer, load_scalar_model
from qinglan.models.language_model import load_language_model
from qinglan.models.server import RemoteConfig
from qinglan.tasks.assistant import draw_prompts
from qinglan.tasks.base_models import resolve_model

# ---------------------------------------------------------------------------------------------------------- sample


class SampleCommand(Config):
    """Completions of prompts by a model."""

    model: str
    """A Hugging Face causal LM directory, or a size of the built-in family; with `server`, the model's name there."""
    server: str | None = None
    """Address of an OpenAI-compatible server that draws the completions, such as http://localhost:8000/v1."""
    prompts: Path | None = None
    """File or folder with prompts."""
    text: str | None = None
    """One prompt, given right here."""
    num_samples: int = Field(default=1, ge=1)
    """Completions of each prompt."""
    to: Path | None = None
    """File (.jsonl or .parquet) for prompts and completions as records; default: they are printed."""
    template: TemplateName = "own"
    """Chat template: the model's own, or plain "User: ... Assistant:" text for models without one."""
    device: str = "auto"
    """cpu, cuda or auto."""
    on_bad: OnBad = "stop"
    """Broken rows: stop and name them, or skip and count them."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    remote: RemoteConfig = RemoteConfig()
    """How `server` is asked."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompts is None) == (self.text is None):
            raise ValueError('wants prompts: give either --prompts FILE or --text "..."')
        if self.server is None and self.remote != RemoteConfig():
            raise ValueError("remote: says how a server is asked, and there is none; add --server URL")
        return self


def sample(config: SampleCommand, options: Options) -> CommandResult:
    """Complete prompts; equal prompts and seeds give equal completions, whatever else is in the file."""
    prompts, num_skipped = [prompt_from(config.text or "")], 0
    if config.prompts is not None:
        loaded = load_prompts(config.prompts, on_bad=config.on_bad)
        prompts, num_skipped = loaded.records, len(loaded.skipped)
    drawn = draw_completions(config, prompts, options.seed)
    completions = [one for row in drawn for one in row]
    skipped = f", {num_skipped} broken rows skipped" if num_skipped else ""
    summary = f"{len(completions)} completions of {len(prompts)} prompts{skipped}"
    data: dict[str, Any] = {"num_prompts": len(prompts), "num_skipped": num_skipped}
    if config.to is not None:
        write_records(config.to, [*prompts, *completions])
        return CommandResult(f"{summary}\n{config.to}", data | {"to": str(config.to)})
    lines = []
    for prompt, row in zip(prompts, drawn, strict=True):
        lines += ["", *(f"{turn.role}: {visible(turn.content)}" for turn in prompt.messages)]
        lines += [f"  > {visible(one.text)}" for one in row]
    data["completions"] = [one.model_dump(mode="json") for one in completions]
    return CommandResult("\n".join(lines[1:]), data)


def draw_completions(config: SampleCommand, prompts: list[Prompt], seed: int) -> list[list[Completion]]:
    """Return the completions of prompts, as [prompt][sample], by the model or by the server."""
    progress = Progress("sample", len(prompts) * config.num_samples, time.monotonic(), quiet=False)
    if config.server is None:
        prepare_process()
        lm = load_language_model(resolve_model(config.model), Device.detect(config.device), template=config.template)
        return sample_completions(
            lm, prompts, config.sampling, seed=seed, num_samples=config.num_samples, progress=progress
        )
    asking = config.remote
    if asking.journal is None and config.to is not None:
        asking = asking.model_copy(update={"journal": config.to.with_name(f"{config.to.name}.requests.jsonl")})
    model = remote.open_remote(config.server, config.model, asking)
    return remote.sample_completions(
        model, prompts, config.sampling, seed=seed, num_samples=config.num_samples, progress=progress
    )


def prompt_from(text: str) -> Prompt:
    """Return a text as the prompt of one user's turn."""
    messages = (Message(role="user", content=text),)
    name = record_id("prompt", *messages)
    return Prompt(id=name, source="human", producer_id="command line", prompt_group_id=name, messages=messages)


# ----------------------------------------------------------------------------------------------------------- score


class ScoreCommand(Config):
    """Scores of completions by a reward model."""

    reward_model: Path
    """Directory of a reward model."""
    file: Path
    """File or folder with demonstrations, comparisons, or the records that `qinglan sample --to` wrote."""
    to: Path | None = None
    """File (.jsonl) for one score a line; default: they are printed."""
    template: TemplateName = "own"
    """Chat template: the one saved with the model, or plain text for models without one."""
    device: str = "auto"
    """cpu, cuda or auto."""
    on_bad: OnBad = "stop"
    """Broken rows: stop and name them, or skip and count them."""


class Answered(NamedTuple):
    """A prompt with one completion."""

    prompt: Prompt
    completion: Completion


class Scorable(NamedTuple):
    """What a file holds that can be scored."""

    items: list[Answered]
    comparisons: list[ComparisonGroup]
    """Whose completions the items are, in order; empty for other files."""
    num_skipped: int


def score(config: ScoreCommand, options: Options) -> CommandResult:
    """Score every completion of a file; for comparisons also say how often the better one scores higher."""
    prepare_process()
    scalar = load_scalar_model(config.reward_model, Device.detect(config.device), template=config.template)
    found = scorable(config.file, config.on_bad)
    scores = as_scorer(scalar)([one.prompt for one in found.items], [one.completion for one in found.items])
    groups = [one.prompt.prompt_group_id for one in found.items]
    metrics = {"score": mean_with_interval(scores, groups, seed=options.seed, unit="logits")}
    if found.comparisons:
        flat = iter(scores)
        table = scored_pairs(found.comparisons, [[next(flat) for _ in one.completions] for one in found.comparisons])
        metrics["pair_accuracy"] = pair_accuracy(table, seed=options.seed)
    rows = [
        {"prompt_id": one.prompt.id, "completion_id": one.completion.id, "score": None if math.isnan(value) else value}
        for one, value in zip(found.items, scores, strict=True)
    ]
    summary = [f"{name}: {measure}" for name, measure in metrics.items()]
    summary += [f"{found.num_skipped} broken rows skipped"] if found.num_skipped else []
    data: dict[str, Any] = {"metrics": {name: measure._asdict() for name, measure in metrics.items()}}
    data["num_skipped"] = found.num_skipped
    if config.to is not None:
        write_jsonl(config.to, rows)
        return CommandResult("\n".join([*summary, str(config.to)]), data | {"to": str(config.to)})
    lines = [
        f"{value:9.3f}  {one.completion.id}  {visible(' '.join(one.completion.text.split()))[:80]}"
        for one, value in zip(found.items, scores, strict=True)
    ]
    return CommandResult("\n".join([*lines, *summary]), data | {"scores": rows})


def scorable(path: Path, on_bad: OnBad) -> Scorable:
    """Return the completions of a file: those of its comparisons, else its demonstrations, else bare completions.

    Raises `InputError` for broken rows, unless they are to be skipped, and where there is nothing to score.
    """
    contents = parse_files(path)
    if contents.broken and on_bad == "stop":
        raise InputError(f"{contents.broken[0].line()} ({len(contents.broken)} findings; or --on-bad skip)")
    comparisons = [group for parsed in contents.parsed for group in parsed.comparisons]
    items = [Answered(group.prompt, one) for group in comparisons for one in group.completions]
    if not items:
        items = [Answered(*one) for parsed in contents.parsed for one in parsed.demonstrations]
    if not items:
        items = bare_completions(path)
    if not items:
        raise InputError(f"{path}: holds no completion; expected demonstrations, comparisons or sampled completions")
    return Scorable(items, comparisons, len(contents.broken))


def bare_completions(path: Path) -> list[Answered]:
    """Return the completions among our own records that no comparison refers to, such as `qinglan sample` wrote."""
    prompts: dict[str, Prompt] = {}
    completions: list[Completion] = []
    for row in (row for file in list_files(path).files for row in read_rows(file)):
        if not isinstance(row, Row):
            continue
        try:
            record = record_of(row.fields)
        except RowProblem:  # a broken row, which was named or counted before, or a row of another format
            continue
        if isinstance(record, Prompt):
            prompts[record.id] = record
        elif isinstance(record, Completion):
            completions.append(record)
    absent = [one.id for one in completions if one.prompt_id not in prompts]
    if absent:
        raise InputError(
            f"{path}: completion {absent[0]}: its prompt is not in the file ({len(absent)} such completions); expected "
            "both, as qinglan sample --to writes them"
        )
    return [Answered(prompts[one.prompt_id], one) for one in completions]


# -------------------------------------------------------------------------------------------------------- evaluate


class EvaluateCommand(Config):
    """What a model is worth: by the built-in world's answer key, or a reward model by comparisons."""

    model: str | None = None
    """A causal LM directory or built-in size, graded on prompts of the built-in world's held-out users."""
    reward_model: Path | None = None
    """Directory of a reward model, tested on `comparisons`."""
    comparisons: Path | None = None
    """Comparisons that the reward model was not trained on."""
    num_prompts: int = Field(default=200, ge=1)
    """Prompts of the built-in world."""
    template: TemplateName = "own"
    """Chat template: the model's own, or plain "User: ... Assistant:" text for models without one."""
    device: str = "auto"
    """cpu, cuda or auto."""
    on_bad: OnBad = "stop"
    """Broken rows of comparisons: stop and name them, or skip and count them."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=48)
    """How the model's completions are drawn: once at temperature 1 and once greedily."""

    @model_validator(mode="after")
    def _one_subject(self) -> Self:
        if (self.model is None) == (self.reward_model is None):
            raise ValueError("wants a subject: give either --model, or --reward-model with --comparisons")
        if (self.reward_model is None) != (self.comparisons is None):
            raise ValueError("--reward-model and --comparisons belong together: give both or neither")
        return self


def evaluate(config: EvaluateCommand, options: Options) -> CommandResult:
    """Measure a model, with intervals; the data have the form of a run's report.json."""
    prepare_process()
    started, seed, device = time.monotonic(), options.seed, Device.detect(config.device)
    metrics: dict[str, Measure] = {}
    unscored = 0
    if config.model is not None:
        lm = load_language_model(resolve_model(config.model), device, template=config.template)
        world = draw_prompts(config.num_prompts, seed, "test")
        answers = answer(lm, world.prompts, config.sampling, seed)
        for name, completions in (("sampled", answers.sampled), ("greedy", answers.greedy)):
            graded = grade_all(world, world.prompts, completions)
            metrics |= rates(graded, Graded([], []), name, seed)
            metrics |= {f"gold_score/{name}/{case}": one for case, one in graded.by_use_case(seed).items()}
        rows = {"student": metrics["gold_score/sampled"]}
    else:
        assert config.reward_model is not None and config.comparisons is not None  # _one_subject
        scalar = load_scalar_model(config.reward_model, device, template=config.template)
        loaded = load_comparisons(config.comparisons, on_bad=config.on_bad)
        judged = judge_reward_model(loaded.records, as_scorer(scalar), seed)
        metrics, rows, unscored = judged.metrics, judged.rows, judged.unscored + len(loaded.skipped)
    settings = hash_of(config.model_dump(mode="json"))
    report = Report("evaluate", time.monotonic() - started, settings, metrics, rows, [], unscored)
    return CommandResult(headline(report, list(metrics)), report.to_json())


# ---------------------------------------------------------------------------------------------------------- report


class ReportCommand(Config):
    """The headline of a finished run."""

    run: Path
    """The run's folder."""
    markdown: bool = False
    """Print every metric as a Markdown table, for a pull request or a notebook."""


def report(config: ReportCommand, options: Options) -> CommandResult:
    """Print what a run's report.json says."""
    file = config.run / "report.json"
    if not file.is_file():
        raise InputError(
            f"{config.run}: holds no report.json; expected a finished run; --resume lets a stopped one go on"
        )
    data = read_json(file)
    found = report_from(data, file)
    if config.markdown:
        return CommandResult(markdown_summary(found).rstrip(), data)
    names = HEADLINE if found.recipe == "instruct-gpt" else list(found.metrics)
    return CommandResult(f"{headline(found, names)}\n{config.run / 'report.html'}", data)


def report_from(data: Any, file: Path) -> Report:
    """Return the contents of a report.json as a report. Raises `InputError` where they are none."""

    def measures(values: dict[str, dict[str, Any]]) -> dict[str, Measure]:
        return {name: Measure(**value) for name, value in values.items()}

    try:
        return Report(**{**data, "metrics": measures(data["metrics"]), "rows": measures(data["rows"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: is no report of a run ({error}); expected the file that a run wrote") from error
