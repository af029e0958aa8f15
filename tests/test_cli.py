"""The command line itself: help, precedence of settings, exit codes, one JSON object, and rules for every field."""

import ast
import errno
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from pydantic import BaseModel, Field, model_validator

from qinglan import cli
from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.flags import CommonOptions, flags_of

SOURCE = Path(__file__).parent.parent / "src" / "qinglan"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from qinglan import cli; code = cli.run(['--help']);"
        "print([m for m in ('torch', 'transformers', 'tyro', 'pydantic', 'numpy', 'yaml') if m in sys.modules], code)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[] 0"
    assert all(name in answer.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_shows_every_flag(name, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in flags_of(config_of(name)) | flags_of(CommonOptions):
        assert f"--{flag}" in shown
    assert cli.COMMANDS[name].summary in " ".join(shown.split())


def config_of(name: str) -> type[Config]:
    command = cli.COMMANDS[name]
    return getattr(importlib.import_module(f"qinglan.{command.module}"), command.config)


# ------------------------------------------------------------------------------------------- a command made for tests


class Inner(Config):
    rate: float = Field(default=0.5, ge=0)
    steps: int = 1
    pack: bool = True


class Probe(Config):
    file: Path
    limit: int | None = 3
    names: tuple[str, ...] = ("a",)
    kind: Literal["x", "y"] = "x"
    inner: Inner = Inner(steps=7)

    @classmethod
    def presets(cls):
        return {"small": {}, "large": {"inner": {"steps": 100, "rate": 2.0}}}

    @model_validator(mode="after")
    def _check(self):
        if self.limit == 13:
            raise ValueError("limit 13 brings bad luck; choose another")
        return self


@pytest.fixture
def probe(monkeypatch, capsys):
    """Return a function that runs `qinglan probe ...` and returns (exit code, configuration, stdout, stderr)."""
    seen = {}

    def work(config, options):
        seen.update(config=config, options=options)
        print("a line that a library prints")
        if error := seen.get("raise"):
            raise error
        return cli.CommandResult("done", {"limit": config.limit}, seen.get("code", 0))

    monkeypatch.setitem(sys.modules, "qinglan.probe", SimpleNamespace(Probe=Probe, work=work))
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe", "Probe", "work", "look", ("file",)))

    def run(*arguments, **settings):
        seen.clear()
        seen.update(settings)
        code = cli.run(["probe", *map(str, arguments)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, config=seen.get("config"), options=seen.get("options"), out=out, err=err)

    return run


def test_defaults_and_every_kind_of_flag(probe, tmp_path) -> None:
    assert probe("f").config == Probe(file=Path("f"))
    given = probe(
        "--file", "g", "--limit", "none", "--names", "b", "-c", "--inner.no-pack", "--inner.rate=1e-3", "--kind", "y"
    )  # fmt: skip
    inner = Inner(rate=1e-3, steps=7, pack=False)
    assert given.config == Probe(file=Path("g"), limit=None, names=("b", "-c"), kind="y", inner=inner)
    assert probe("f", "--limit", "-4", "--limit", "5", "--names", "--inner.pack", "false").config == Probe(
        file=Path("f"), limit=5, names=(), inner=Inner(steps=7, pack=False)
    )
    given = probe("f", "--seed", "9", "--resume", "--out", tmp_path / "o")
    assert given.options == cli.Options(tmp_path / "o", 9, True, False)


def test_precedence_is_defaults_preset_file_flags(probe, tmp_path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("file: from-file\nlimit: 5\ninner:\n  rate: 0.25\n")
    assert probe("--config", settings).config == Probe(file=Path("from-file"), limit=5, inner=Inner(rate=0.25, steps=7))
    large = probe("--preset", "large", "--config", settings, "--limit", "6", "--inner.steps", "8")
    assert large.config == Probe(file=Path("from-file"), limit=6, inner=Inner(rate=0.25, steps=8))
    assert probe("f", "--preset", "large").config.inner == Inner(rate=2.0, steps=100)
    assert probe("mine", "--config", settings).config.file == Path("mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["f", "--limt", "3"], "--limt: no such option; did you mean '--limit'?"),
        (["f", "--steps", "3"], "--steps: no such option; did you mean '--inner.steps'?"),
        (["f", "--inner", "3"], "--inner: no such option; did you mean '--inner.rate'?"),
        (["f", "--no-limit"], "--no-limit: no such option; did you mean '--limit'?"),
        (["f", "--qqqqqq"], "--qqqqqq: no such option; see qinglan probe --help"),
        (["f", "--limit"], "--limit: no value given; expected one; see qinglan probe --help"),
        (["f", "g"], "'g' belongs to no option; see qinglan probe --help"),
        (["f", "--limit", "three"], "limit: Input should be a valid integer"),
        (["f", "--inner.rate", "-1"], "inner.rate: Input should be greater than or equal to 0 (got '-1')"),
        (["f", "--kind", "z"], "kind: Input should be 'x' or 'y' (got 'z')"),
        (["f", "--limit", "13"], "configuration: limit 13 brings bad luck; choose another"),
        ([], "file: is required, but not given"),
        (["f", "--seed", "x"], "seed: Input should be a valid integer"),
        (["f", "--preset", "huge"], "--preset huge: no such preset; expected one of: small, large"),
    ],
)
def test_bad_flags_say_so_in_one_line(probe, arguments, message) -> None:
    answer = probe(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err
    assert answer.err.startswith("qinglan: probe: ") and answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner:\n  rat: 1\n", "inner.rat: no such field; did you mean 'rate'?"),
        ("1: 2\n", "1: no such field"),
        ("limit: [\n", ":2: not YAML"),
        ("a: \x01", "not YAML"),
        ("- 1\n", "expected a mapping of field names to values, got list"),
        ("inner: 3\n", "inner: Input should be a valid dictionary or instance of Inner (got 3)"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_bad_config_files_say_so_in_one_line(probe, tmp_path, text, message) -> None:
    file = tmp_path / "settings.yaml"
    if text is not None:
        file.write_text(text)
    answer = probe("f", "--config", file)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err and answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaple"], "'smaple' is no command; did you mean 'sample'?; see qinglan --help"),
        (["xyzzy"], "'xyzzy' is no command; see qinglan --help"),
        (["data"], "'data' is no command; expected one of: data check, data import, data export"),
        (["world", "shwo"], "'world shwo' is no command; did you mean 'world show'?; expected one of: world show"),
    ],
)
def test_unknown_commands(arguments, message, capsys) -> None:
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_exit_codes(probe) -> None:
    assert probe("f").code == 0
    assert probe("f", code=2).code == 2
    wrong = probe("f", **{"raise": InputError("file: wrong; mend it")})
    assert (wrong.code, wrong.err.splitlines()[-1]) == (2, "qinglan: file: wrong; mend it")
    stopped = probe("f", **{"raise": KeyboardInterrupt()})
    assert stopped.code == 1 and "go on with --resume" in stopped.err
    full = probe("f", **{"raise": OSError(errno.ENOSPC, "No space left on device", "/x/metrics.jsonl")})
    assert full.code == 1 and "the disk is full (/x/metrics.jsonl)" in full.err
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback, and Python exits with 1
        probe("f", **{"raise": ZeroDivisionError()})


def test_json_is_all_of_standard_output(probe, tmp_path) -> None:
    answer = probe("f", "--json", "--out", tmp_path / "kept")
    assert answer.out == '{"limit": 3}\n' and "a line that a library prints" in answer.err
    assert json.loads((tmp_path / "kept" / "probe.json").read_text()) == {"limit": 3}
    assert probe("f").out == "done\n"


# ------------------------------------------------------------------------------------------------- rules for fields


def parts_of(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """Return a configuration class and all classes of its parts."""
    inner = (info.annotation for info in kind.model_fields.values())
    classes = [one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)]
    return {kind}.union(*map(parts_of, classes))


@pytest.fixture(scope="module")
def all_fields() -> list[tuple[str, str, str | None]]:
    kinds = {part for name in cli.COMMANDS for part in parts_of(config_of(name))} | {CommonOptions}
    fields = [(kind.__name__, name, info.description) for kind in kinds for name, info in kind.model_fields.items()]
    return sorted(fields)


def test_every_field_has_a_sentence(all_fields) -> None:
    assert not [f"{kind}.{name}" for kind, name, text in all_fields if not text or text.rstrip()[-1] not in ".?!"]


def test_every_field_is_read_somewhere(all_fields) -> None:
    read = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    assert not [f"{kind}.{name}" for kind, name, _ in all_fields if name not in read]
