"""`qinglan world ...`: show the built-in world, make its base models, probe what they can do."""

import random
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field

from qinglan.cli import CommandResult, Options
from qinglan.core.config import Config
from qinglan.core.device import Device, prepare_process
from qinglan.core.errors import InputError, nearest
from qinglan.core.rng import stream_seed
from qinglan.core.run import Measure, Run
from qinglan.evals.bug_surprisal import bug_surprisal, planted_bugs
from qinglan.evals.capability import WITHOUT_EXTRAS, probe_capabilities
from qinglan.evals.capability_picture import check_ending, draw_capabilities
from qinglan.learn.pretrain import Probe, pretrain
from qinglan.learn.pretrain_config import PretrainConfig
from qinglan.models.language_model import LanguageModel, completion_logprobs, load_language_model
from qinglan.tasks import corpus, demonstrators
from qinglan.tasks.assistant import TASKS, draw_prompts, grade, make_item, overall
from qinglan.tasks.base_models import CONTEXT, base_tokenizer, build, resolve_model, ship, shipped_sizes, size_of
from qinglan.tasks.chess_probes import CHESS_PROBES
from qinglan.tasks.chess_rules import chess_library
from qinglan.tasks.item import Draw


class ShowCommand(Config):
    """What to show."""

    what: Literal["all", "prompts", "corpus", "demonstrations"] = "all"
    """Prompts with their graded replies, documents of the pretraining corpus, or demonstrations."""
    per_kind: int = 1
    """Samples of each use case or kind of document."""
    split: Literal["train", "test"] = "train"
    """Test prompts use held-out entities and wordings."""


def show(config: ShowCommand, options: Options) -> CommandResult:
    """Print samples of prompts, demonstrations and documents."""
    rng = random.Random(stream_seed(options.seed, "show"))
    draw = Draw(rng, config.split == "test")
    lines: list[str] = []
    data: dict[str, list[dict[str, object]]] = {"prompts": [], "corpus": [], "demonstrations": []}
    if config.what in ("all", "prompts"):
        for use_case in TASKS:
            for _ in range(config.per_kind):
                item = make_item(draw, use_case)
                lines += [
                    "",
                    f"[{', '.join(item.tags)}]",
                    *(f"  {turn.role}: {turn.content}" for turn in item.messages),
                ]
                replies = {"good": item.good[0], **item.faulty}
                graded = {kind: {"text": text, "gold": overall(grade(item, text))} for kind, text in replies.items()}
                lines += [f"    {kind:<9} {one['gold']:.2f}  {one['text']}" for kind, one in graded.items()]
                turns = [turn.model_dump() for turn in item.messages]
                data["prompts"].append({"use_case": use_case, "tags": item.tags, "messages": turns, "replies": graded})
    if config.what in ("all", "demonstrations"):
        world = draw_prompts(8 * config.per_kind, options.seed, config.split)
        shown = demonstrators.demonstrate(world, world.prompts, demonstrators.DemonstratorConfig(), options.seed)
        lines += ["", "Demonstrations, uneven as people are:"]
        for pair in shown:
            text, gold = pair.demonstration.text, overall(world.grade(pair.prompt, pair.demonstration))
            lines += [
                f"  {pair.prompt.messages[-1].content}",
                f"    {gold:.2f}  {text}  ({pair.demonstration.producer_id})",
            ]
            data["demonstrations"].append({"prompt": pair.prompt.messages[-1].content, "text": text, "gold": gold})
    if config.what in ("all", "corpus"):
        lines += ["", "Documents of the pretraining corpus:"]
        for kind, share in corpus.MIX.items():
            for _ in range(config.per_kind):
                text = " ".join(span.text for span in corpus.make_document(rng, kind))
                lines.append(f"  {kind} ({share:.0%}): {text}")
                data["corpus"].append({"kind": kind, "share": share, "text": text})
    return CommandResult("\n".join(lines).strip(), data)


class PretrainCommand(Config):
    """Which base models to make, and how."""

    sizes: tuple[str, ...] = ("nano", "micro", "mini")
    """Names in the table of sizes (`tasks/base_models.py`)."""
    training: PretrainConfig = PretrainConfig(num_tokens=10_000_000, context=CONTEXT)
    """The training loop."""
    early_fraction: float = 0.1
    """Share of the tokens, at the start, in which half of the documents are induction."""
    device: str = "auto"
    """cpu, cuda or auto."""
    num_probe_items: int = Field(default=100, ge=0)
    """Items of each capability probe on the way and at the end; 0 probes nothing."""
    parts: tuple[str, ...] = corpus.FAMILY_PARTS
    """Parts of the corpus to train on: plain, induction, judging, code, chess (which needs an extra)."""
    ship: bool = False
    """Copy the result into the package, in bfloat16, with its card; for developers of Qinglan."""


def pretrain_sizes(config: PretrainCommand, options: Options) -> CommandResult:
    """Pretrain each size in a folder below `--out`; finished ones are kept, stopped ones go on by --resume."""
    for size in config.sizes:
        size_of(size)
    for part in config.parts:
        if part not in corpus.PARTS:
            expected = ", ".join(corpus.PARTS)
            raise InputError(
                f"parts: no part {part} of the corpus; expected of {expected}{nearest(part, corpus.PARTS)}"
            )
    if config.training.context > CONTEXT:
        raise InputError(
            f"training.context: {config.training.context} tokens, but base models take {CONTEXT} at the most; lower it"
        )
    if "chess" in config.parts:
        chess_library()
    prepare_process()
    tokenizer = base_tokenizer()
    device = Device.detect(config.device)
    data: dict[str, dict[str, dict[str, object]]] = {}
    lines = []
    for size in config.sizes:
        out = (options.out or Path("runs/pretrain")) / size
        run = Run.open(out, config, seed=options.seed, recipe=f"pretrain {size}", resume=options.resume)
        stage = run.stage("pretrain", config.training)
        num_early = round(config.early_fraction * config.training.num_tokens / config.training.context)
        source = corpus.CorpusBlocks(
            tokenizer._tokenizer, options.seed, config.training.context, num_early, config.parts
        )
        fresh = build(size, tokenizer, options.seed, device=device)
        has_probes = config.num_probe_items > 0
        probe = _probe_rates(config, options.seed) if has_probes else None
        lm = pretrain(fresh, source, config.training, stage=stage, seed=options.seed, probe=probe)
        stage.finish()
        measures = probe_capabilities(lm, num_items=config.num_probe_items, seed=options.seed) if has_probes else {}
        if config.ship:
            rates = {name: measure._asdict() for name, measure in measures.items()}
            lines.append(f"shipped to {ship(out, size, probes=rates)}")
        lines += [f"{size}:", *_rows(measures)]
        data[size] = {name: measure._asdict() for name, measure in measures.items()}
    return CommandResult("\n".join(lines), data)


def _probe_rates(config: PretrainCommand, seed: int) -> Probe:
    def rates(lm: LanguageModel) -> dict[str, float]:
        measures = probe_capabilities(lm, num_items=config.num_probe_items, seed=seed)
        return {f"probe/{name}": measure.value for name, measure in measures.items() if measure.value is not None}

    return rates


class EvaluateCommand(Config):
    """Which base models to probe, and for what."""

    models: tuple[str, ...] = ()
    """Size names or model directories; default: all shipped sizes."""
    probes: tuple[str, ...] = ()
    """Names of probes; default: all whose package is installed (those of chess need an extra)."""
    num_items: int = 200
    """Items of each probe."""
    picture: Path | None = None
    """Draw capability against size into this file, .png or .svg."""


def evaluate(config: EvaluateCommand, options: Options) -> CommandResult:
    """Return `capability/<probe>/<model>` for every probe and model, and `surprisal/...` of planted bugs."""
    prepare_process()
    names = config.models or tuple(shipped_sizes())
    if not names:
        raise InputError("world evaluate: no base model is shipped; name a directory with --models")
    if config.picture is not None:
        check_ending(config.picture)
    has_chess = find_spec("chess") is not None
    probes = config.probes or (*WITHOUT_EXTRAS, *(CHESS_PROBES if has_chess else ()))
    metrics: dict[str, Measure] = {}
    sizes: dict[str, int] = {}
    lines = []
    for name in names:
        lm = load_language_model(resolve_model(name), Device.detect("cpu"))
        sizes[name] = sum(parameter.numel() for parameter in lm.model.parameters())
        measures = probe_capabilities(lm, probes, num_items=config.num_items, seed=options.seed)
        metrics |= {f"capability/{probe}/{name}": measure for probe, measure in measures.items()}
        if not config.probes:
            planted = bug_surprisal(
                lm.tokenizer,
                partial(completion_logprobs, lm),
                planted_bugs(config.num_items, options.seed),
                seed=options.seed,
            )
            bugs = {f"bug_surprisal_{key}": measure for key, measure in planted._asdict().items()}
            metrics |= {f"capability/{key}/{name}": measure for key, measure in bugs.items()}
            measures |= bugs
        lines += [f"{name} ({sizes[name]:,} parameters):", *_rows(measures)]
    if not config.probes and not has_chess:
        lines.append("Not measured: chess; its rules need the extra, install qinglan[chess].")
    if config.picture is not None:
        draw_capabilities(metrics, sizes, config.picture)
        lines.append(str(config.picture))
    data = {"metrics": {key: measure._asdict() for key, measure in metrics.items()}, "parameters": sizes}
    return CommandResult("\n".join(lines), data)


def _rows(measures: dict[str, Measure]) -> list[str]:
    return [f"  {name:<24} {measure}" for name, measure in measures.items()]
