"""The command line: every command, its options, its exit code. Heavy modules are imported when a command runs.

Precedence of settings: defaults or `--preset` < `--config file.yaml` < flags. Exit codes: 0 done, 1 failed, 2 bad input
or configuration. With `--json` one JSON object goes to standard output; progress always goes to standard error.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qinglan.core.errors import InputError, nearest


class Command(NamedTuple):
    """Where a command lives and what it is for."""

    module: str
    """Module with a class `Config`-like named by `config` and a function named by `function`."""
    config: str
    function: str
    summary: str
    positional: tuple[str, ...] = ()
    """Configuration fields that may be given without a flag, in order."""


COMMANDS: dict[str, Command] = {
    "quickstart": Command("recipes.instruct_gpt", "InstructGPTConfig", "quickstart", "the InstructGPT loop on the built-in world, minutes on two cores"),
    "instruct-gpt": Command("recipes.instruct_gpt", "InstructGPTConfig", "main", "demonstrations, rankings, reward model, PPO; built-in world or your files"),
    "sft": Command("commands.train", "SFTCommand", "sft", "fine-tune on demonstrations"),
    "reward": Command("commands.train", "RewardCommand", "reward", "train a reward model on comparisons"),
    "ppo": Command("commands.train", "PPOCommand", "ppo", "train a policy against a reward model or a Python function"),
    "sample": Command("commands.use", "SampleCommand", "sample", "complete prompts with a model"),
    "score": Command("commands.use", "ScoreCommand", "score", "score completions with a reward model"),
    "evaluate": Command("commands.use", "EvaluateCommand", "evaluate", "grade a model on the built-in world, or a reward model on comparisons"),
    "report": Command("commands.use", "ReportCommand", "report", "show the headline rows of a finished run", ("run",)),
    "data check": Command("commands.data", "CheckCommand", "check", "say what a data file holds and which rows are broken", ("file",)),
    "data import": Command("commands.data", "ImportCommand", "import_data", "turn a data file into Qinglan's records", ("file",)),
    "data export": Command("commands.data", "ExportCommand", "export_data", "turn records into TRL columns or K-wise rows", ("file",)),
    "world show": Command("commands.world", "ShowCommand", "show", "print samples of the built-in world"),
    "world pretrain": Command("commands.world", "PretrainCommand", "pretrain_sizes", "make the base models of the built-in world"),
    "world evaluate": Command("commands.world", "EvaluateCommand", "evaluate", "probe what base models can do"),
}
GROUPS = sorted({name.split()[0] for name in COMMANDS if " " in name})


class Options(NamedTuple):
    """The options that every command takes."""

    out: Path | None
    seed: int
    resume: bool
    json: bool


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(overview())
            return 0
        if arguments[0] == "--version":
            import qinglan

            print(qinglan.__version__)
            return 0
        name, rest = split_command(arguments)
        return run_command(name, rest)
    except InputError as error:
        print(f"qinglan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qinglan: interrupted; finished stages are kept, go on with --resume", file=sys.stderr)
        return 1


def overview() -> str:
    """Return the help text of `qinglan` itself, without importing anything heavy."""
    width = max(len(name) for name in COMMANDS) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["Qinglan aligns language models, also when the model outgrows its supervisors.", "", "usage: qinglan COMMAND [options]", ""]
        + lines
        + ["", "All take --out DIR, --seed N, --resume, --json, --config FILE.yaml, --preset NAME; COMMAND --help lists the rest."]
    )


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the command's full name ("world show") and the remaining arguments. Raises `InputError` for unknown ones."""
    name, rest = arguments[0], arguments[1:]
    if name in GROUPS:
        members = [command for command in COMMANDS if command.startswith(f"{name} ")]
        if not rest or f"{name} {rest[0]}" not in COMMANDS:
            got = f"'{name} {rest[0]}'" if rest else f"'{name}' alone"
            raise InputError(f"{got} is no command; expected one of: {', '.join(members)}")
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        raise InputError(f"'{name}' is no command{nearest(name, COMMANDS)}; see qinglan --help")
    return name, rest


def run_command(name: str, arguments: list[str]) -> int:
    """Parse a command's options, run it, and print its result."""
    command = COMMANDS[name]
    common, rest = common_parser(name).parse_known_args(arguments)
    options = Options(common.out, common.seed, common.resume, common.json)
    module = importlib.import_module(f"qinglan.{command.module}")
    config = parse_config(name, command, getattr(module, command.config), common, rest)
    result = getattr(module, command.function)(config, options)
    if options.json:
        print(json.dumps(result.data, ensure_ascii=False))
    else:
        print(result.text)
    return int(result.exit_code)


class CommandResult(NamedTuple):
    """What a command answers: text for people, data for `--json`."""

    text: str
    data: dict[str, Any]
    exit_code: int = 0


def common_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of the options that every command takes."""
    parser = argparse.ArgumentParser(prog=f"qinglan {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--preset")
    return parser


def parse_config(name: str, command: Command, kind: Any, common: argparse.Namespace, arguments: list[str]) -> Any:
    """Return the configuration: preset, then `--config`, then flags (drawn by tyro from the class)."""
    import tyro

    from qinglan.core.config import describe, merge, read_config_file

    presets = kind.presets() if "presets" in vars(kind) else {}
    if common.preset is not None and common.preset not in presets:
        known = f"expected one of: {', '.join(presets)}" if presets else "this command has no presets"
        raise InputError(f"--preset {common.preset}: no such preset; {known}")
    chosen = common.preset or next(iter(presets), None)
    base = presets[chosen] if chosen is not None else None
    positional, arguments = take_positional(command.positional, arguments)
    changes = read_config_file(common.config) if common.config else {}
    if base is None and (changes or positional):
        from qinglan.core.config import build, check_keys

        check_keys(kind, changes, f"--config {common.config}")
        base = build(kind, {**changes, **positional}, f"qinglan {name}") if complete(kind, {**changes, **positional}) else None
    elif base is not None:
        base = merge(base, {**changes, **positional}, f"--config {common.config}" if common.config else f"qinglan {name}")
    from pydantic import ValidationError

    try:
        return tyro.cli(
            kind, args=arguments, default=base if base is not None else tyro.MISSING_NONPROP, prog=f"qinglan {name}",
            description=f"{command.summary}. Also: --out DIR, --seed N, --resume, --json, --config FILE.yaml, --preset NAME.",
        )  # fmt: skip
    except ValidationError as error:
        raise InputError(describe(error, f"qinglan {name}")) from error


def complete(kind: Any, values: dict[str, Any]) -> bool:
    """True if the values cover every required field of a configuration class."""
    return all(field in values or not info.is_required() for field, info in kind.model_fields.items())


def take_positional(fields: tuple[str, ...], arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return leading arguments without a flag as the fields they stand for, and the other arguments."""
    values: dict[str, str] = {}
    rest = list(arguments)
    for field in fields:
        if rest and not rest[0].startswith("-"):
            values[field] = rest.pop(0)
    return values, rest
