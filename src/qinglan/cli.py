"""The command line: every command, its options, its exit code. Heavy modules are imported when a command runs.

Precedence of settings: defaults or `--preset` < `--config file.yaml` < flags. Exit codes: 0 done, 1 failed, 2 bad input
or configuration. With `--json` one JSON object goes to standard output; progress always goes to standard error.
"""

import contextlib
import errno
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qinglan.core.errors import InputError, nearest


class Command(NamedTuple):
    """Where a command lives and what it is for."""

    module: str
    """Module with the class named by `config` and the function named by `function`."""
    config: str
    function: str
    summary: str
    positional: tuple[str, ...] = ()
    """Configuration fields that may be given without a flag, in order."""
    keeps_run: bool = False
    """Works in a run folder of its own; other commands write their JSON object to `--out`, where it is given."""


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "recipes.instruct_gpt",
        "InstructGPTConfig",
        "quickstart",
        "the InstructGPT loop on the built-in world",
        keeps_run=True,
    ),
    "instruct-gpt": Command(
        "recipes.instruct_gpt",
        "InstructGPTConfig",
        "main",
        "demonstrations, rankings, reward model and PPO in one run",
        keeps_run=True,
    ),
    "weak-to-strong": Command(
        "recipes.weak_to_strong",
        "WeakToStrongConfig",
        "main",
        "how much of a strong model's gap a weak supervisor recovers",
        keeps_run=True,
    ),
    "sft": Command("commands.train", "SFTCommand", "sft", "fine-tune a model on demonstrations", keeps_run=True),
    "reward": Command(
        "commands.train", "RewardCommand", "reward", "train a reward model on comparisons", keeps_run=True
    ),
    "ppo": Command("commands.ppo", "PPOCommand", "ppo", "train a policy by reward model or function", keeps_run=True),
    "dpo": Command("commands.dpo", "DPOCommand", "dpo", "train a policy on comparisons directly", keeps_run=True),
    "classify": Command(
        "commands.classify",
        "ClassifyCommand",
        "classify",
        "train a classifier, or a linear probe, on texts with labels",
        keeps_run=True,
    ),
    "sample": Command("commands.use", "SampleCommand", "sample", "complete prompts with a model"),
    "score": Command("commands.use", "ScoreCommand", "score", "score completions with a reward model"),
    "evaluate": Command(
        "commands.use", "EvaluateCommand", "evaluate", "grade a model, or a reward model on comparisons"
    ),
    "report": Command("commands.use", "ReportCommand", "report", "show the headline of a finished run", ("run",)),
    "data check": Command(
        "commands.data", "CheckCommand", "check", "say what a data file holds and what is broken", ("file",)
    ),
    "data import": Command("commands.data", "ImportCommand", "import_data", "turn a data file into records", ("file",)),
    "data export": Command(
        "commands.data", "ExportCommand", "export_data", "turn a data file into TRL or K-wise columns", ("file",)
    ),
    "world show": Command("commands.world", "ShowCommand", "show", "print samples of the built-in world"),
    "world pretrain": Command(
        "commands.world",
        "PretrainCommand",
        "pretrain_sizes",
        "make the base models of the built-in world",
        keeps_run=True,
    ),
    "world evaluate": Command("commands.world", "EvaluateCommand", "evaluate", "probe what base models can do"),
}
GROUPS = sorted({name.split()[0] for name in COMMANDS if " " in name})


class Options(NamedTuple):
    """The options that every command takes."""

    out: Path | None
    seed: int
    resume: bool
    json: bool


class CommandResult(NamedTuple):
    """What a command answers: text for people, data for `--json`."""

    text: str
    data: dict[str, Any]
    exit_code: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; a defect raises, which makes Python exit with 1."""
    try:
        wants_help = not arguments or arguments[0] in ("-h", "--help")
        if wants_help or (arguments[0] in GROUPS and arguments[1:2] in (["-h"], ["--help"])):
            print(overview())
            return 0
        if arguments[0] == "--version":
            import qinglan

            print(qinglan.__version__)
            return 0
        return run_command(*split_command(arguments))
    except InputError as error:
        print(f"qinglan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qinglan: interrupted; finished stages are kept, go on with --resume", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"qinglan: the disk is full ({error.filename}); free some space and go on with --resume", file=sys.stderr)
        return 1


def overview() -> str:
    """Return the help text of `qinglan` itself, without importing anything heavy."""
    width = max(len(name) for name in COMMANDS) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Qinglan aligns language models, also when the model outgrows its supervisors.",
            "",
            "usage: qinglan COMMAND [options]",
            "",
            *lines,
            "",
            "All take --out DIR, --seed N, --resume, --json, --config FILE.yaml, --preset NAME;",
            "qinglan COMMAND --help lists the rest.",
        ]
    )


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the command's full name ("world show") and the remaining arguments. Raises `InputError`."""
    name, rest = arguments[0], arguments[1:]
    if name in GROUPS:
        members = [command for command in COMMANDS if command.startswith(f"{name} ")]
        full = f"{name} {rest[0]}" if rest else name
        if full not in COMMANDS:
            meant = nearest(full, members) if rest else ""
            raise InputError(f"'{full}' is no command{meant}; expected one of: {', '.join(members)}")
        name, rest = full, rest[1:]
    if name not in COMMANDS:
        raise InputError(f"'{name}' is no command{nearest(name, COMMANDS)}; see qinglan --help")
    return name, rest


def run_command(name: str, arguments: list[str]) -> int:
    """Read a command's settings, run it, and print its result; return its exit code."""
    command = COMMANDS[name]
    module = importlib.import_module(f"qinglan.{command.module}")
    kind = getattr(module, command.config)
    if "-h" in arguments or "--help" in arguments:
        print_help(name, command, kind)
        return 0
    config, options = read_settings(name, command, kind, arguments)
    with contextlib.redirect_stdout(sys.stderr):  # whatever a library or a user's function prints is no result
        result: CommandResult = getattr(module, command.function)(config, options)
    if options.out is not None and not command.keeps_run:
        from qinglan.core.files import write_json

        write_json(options.out / f"{name.replace(' ', '-')}.json", result.data)
    print(json.dumps(result.data, ensure_ascii=False, allow_nan=False) if options.json else result.text)
    return result.exit_code


def read_settings(name: str, command: Command, kind: Any, arguments: list[str]) -> tuple[Any, Options]:
    """Return a command's configuration and the common options: defaults or preset, then `--config`, then flags."""
    from qinglan.core.config import build, check_keys, overlay, read_config_file
    from qinglan.core.flags import CommonOptions, defaults_of, flags_of, read_flags

    given, arguments = take_positional(command.positional, arguments)
    flags = flags_of(kind) | flags_of(CommonOptions)
    values = overlay(given, read_flags(flags, arguments, name))
    common_keys = [info.alias or field for field, info in CommonOptions.model_fields.items()]
    common = build(CommonOptions, {key: values.pop(key) for key in common_keys if key in values}, name)

    presets = kind.presets() if hasattr(kind, "presets") else {}
    if common.preset is not None and common.preset not in presets:
        known = f"expected one of: {', '.join(presets)}" if presets else "this command has no presets"
        raise InputError(f"{name}: --preset {common.preset}: no such preset; {known}")
    preset = presets.get(common.preset or next(iter(presets), ""), {})
    settings = overlay(defaults_of(kind), preset if isinstance(preset, dict) else preset.model_dump())
    if common.config is not None:
        changes = read_config_file(common.config)
        if "seed" in changes:  # a run's config.yaml tells it; the flag wins
            seed = build(CommonOptions, {"seed": changes.pop("seed")}, f"--config {common.config}").seed
            common = common if "seed" in common.model_fields_set else common.model_copy(update={"seed": seed})
        check_keys(kind, changes, f"--config {common.config}")
        settings = overlay(settings, changes)
    config = build(kind, overlay(settings, values), name)
    return config, Options(common.out, common.seed, common.resume, common.as_json)


def take_positional(fields: tuple[str, ...], arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return leading arguments without a flag as the fields they stand for, and the other arguments."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    for field in fields:
        if rest and not rest[0].startswith("-"):
            values[field] = rest.pop(0)
    return values, rest


def print_help(name: str, command: Command, kind: Any) -> None:
    """Print a command's own options, drawn by tyro from its configuration class, and the common ones."""
    import tyro

    from qinglan.core.flags import CommonOptions

    presets = f" Presets: {', '.join(kind.presets())}; the first is the default." if hasattr(kind, "presets") else ""
    usage = "".join(f" {field.upper()}" for field in command.positional)
    with contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=f"qinglan {name}{usage}", description=f"{command.summary}.{presets}")
    print("options of every command:")
    for field, info in CommonOptions.model_fields.items():
        print(f"  --{info.alias or field:<10} {info.description}")
