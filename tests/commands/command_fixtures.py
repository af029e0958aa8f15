"""What the tests of commands share: tiny model directories, small files, and a way to run a command.

A plugin that each test module names, and no conftest.py: tests elsewhere import from the one at the top by that name.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from qinglan import cli
from qinglan.models.heads import save_scalar_model, scalar_model_from
from qinglan.models.language_model import save_language_model

WORDS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lynx")
DEMONSTRATIONS = [{"prompt": f"What is a {word}?", "completion": f"{word}!"} for word in WORDS]
COMPARISONS = [
    {"prompt": f"What is a {word}?", "completions": [word, f"{word} yes", "no"], "ranking": [[0], [1, 2]]}
    for word in WORDS
]


@pytest.fixture
def run(capsys):
    """Return a function that runs `qinglan ...` and returns exit code, standard output and standard error."""

    def run(*arguments):
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def refused(run):
    """Return a function that runs a command which must be refused: exit code 2, one line, and no folder `out`."""

    def refused(*arguments, out=None):
        answer = run(*arguments, *(["--out", out] if out else []))
        lines = [line for line in answer.err.splitlines() if line.startswith("qinglan: ")]
        assert (answer.code, answer.out, len(lines)) == (2, "", 1), answer.err
        assert answer.err.splitlines()[-1] == lines[0]
        assert out is None or not Path(out).exists()
        return lines[0]

    return refused


@pytest.fixture(scope="session")
def made() -> dict[str, Path]:
    """Model directories that were made already, by name."""
    return {}


@pytest.fixture
def model_dir(tiny_lm, tmp_path_factory, made):
    """Return the factory of tiny model directories: `model_dir("gpt2", pad_is_eos=True)`."""

    def make(architecture="llama", **options) -> Path:
        name = "-".join([architecture, *(f"{key}={value}" for key, value in options.items())])
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / architecture
            save_language_model(tiny_lm(architecture, **options), made[name])
        return made[name]

    return make


@pytest.fixture
def reward_dir(tiny_lm, tmp_path_factory, made):
    """Return the factory of tiny reward model directories."""

    def make(architecture="llama", **options) -> Path:
        name = "-".join(["reward", architecture, *(f"{key}={value}" for key, value in options.items())])
        if name not in made:
            made[name] = tmp_path_factory.mktemp("rewards") / architecture
            save_scalar_model(scalar_model_from(tiny_lm(architecture, **options), seed=1), made[name])
        return made[name]

    return make


@pytest.fixture
def write(tmp_path):
    """Return a function that writes rows (or lines of text) to a file of JSON lines."""

    def write(name, rows) -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return write


@pytest.fixture
def demonstrations(write) -> Path:
    """A file of twelve demonstrations."""
    return write("demonstrations.jsonl", DEMONSTRATIONS)


@pytest.fixture
def comparisons(write) -> Path:
    """A file of twelve comparisons of three completions, two of them tied."""
    return write("comparisons.jsonl", COMPARISONS)
