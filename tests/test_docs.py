"""Promises of the documentation that a program can check: names, links, examples, and pages drawn from the code."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import settings_page

from qinglan.cli import COMMANDS
from qinglan.core.config import Config
from qinglan.core.records import Completion, Message, Prompt
from qinglan.data.check import check_file
from qinglan.data.formats import FORMATS
from qinglan.evals.instruct_gpt import HEADLINE
from qinglan.learn.reward_function import load_reward_function
from qinglan.recipes.instruct_gpt_config import InstructGPTConfig

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "qinglan"
DOCS = ROOT / "docs"
PAGES = sorted(path for path in (*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "LOG.md") if path.is_file())
TEXT_SUFFIXES = {
    ".md",
    ".py",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
    ".html",
    ".css",
    ".js",
    ".jinja",
    ".json",
    ".jsonl",
    "",
}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def backticked(text: str) -> set[str]:
    """Return what stands in backticks outside blocks of code."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)))


# ---------------------------------------------------------------------------------------------- commands and settings


def test_the_page_of_settings_is_up_to_date() -> None:
    assert read(settings_page.PAGE) == settings_page.page(), (
        f"docs/settings.md does not say what the configuration classes say; write it again with "
        f"{settings_page.HOW_TO_UPDATE}"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_its_settings_are_documented(name: str) -> None:
    text = read(settings_page.PAGE)
    assert f"\n### qinglan {name}\n" in text
    for kind in (settings_page.config_of(name), *settings_page.parts_of(settings_page.config_of(name))):
        for field in kind.model_fields:
            assert f"`{field}`" in text or f"`{field}.*`" in text or f"`--{field.replace('_', '-')}" in text, field


def test_every_configuration_class_belongs_to_a_command() -> None:
    known = {settings_page.CommonOptions, *(settings_page.config_of(name) for name in COMMANDS)}
    known |= {part for kind in list(known) for part in settings_page.parts_of(kind)}
    names = {kind.__name__ for kind in known} | {Config.__name__}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.ClassDef) and any(
                isinstance(base, ast.Name) and base.id in names for base in node.bases
            ):
                assert node.name in names, (
                    f"{path}: {node.name} can be set by no command, so docs/settings.md has it not"
                )


# ------------------------------------------------------------------------------------------------- names in the texts


@cache
def defined_in(path: Path) -> set[str]:
    """Return every function, class, method and assigned name of a file."""
    found = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@cache
def names_of_tests() -> set[str]:
    """Return the names of all test functions."""
    return {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in defined_in(path) if name.startswith("test_")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_functions_and_tests_named_in_the_texts_exist(page: Path) -> None:
    for name in backticked(read(page)):
        place = re.fullmatch(r"([\w/.]+\.py)(?::(\w+))?", name)
        if place and "/" in place[1]:
            path = next((base / place[1] for base in (SOURCE, ROOT) if (base / place[1]).is_file()), None)
            assert path is not None, f"{page.name}: no file {place[1]}"
            assert place[2] is None or place[2] in defined_in(path), f"{page.name}: {place[1]} defines no {place[2]}"
        if re.fullmatch(r"test_\w+", name):
            assert name in names_of_tests(), f"{page.name}: there is no test {name}"


def test_settings_named_by_the_recipes_page_exist() -> None:
    rows = re.findall(r"^\| `([a-z_]+(?:\.[a-z_]+)+)`", read(DOCS / "instruct_gpt.md"), flags=re.MULTILINE)
    assert len(rows) > 20
    values = dict(settings_page.leaves(InstructGPTConfig().model_dump()))
    for path in rows:
        assert path in values, f"docs/instruct_gpt.md: instruct-gpt has no setting {path}"


@pytest.mark.parametrize("name", HEADLINE)
def test_every_headline_metric_is_explained(name: str) -> None:
    assert f"`{name}`" in read(DOCS / "instruct_gpt.md")


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    text = read(DOCS / "dependencies.md")
    for requirement in wanted:
        name = re.split(r"[<>=~!\[; ]", requirement)[0]
        assert f"| `{name}` |" in text, f"docs/dependencies.md: no row for {name}"
    versions = dict(
        line.split("==") for line in read(ROOT / "constraints.txt").splitlines() if "==" in line and line[0] != "#"
    )
    assert f"torch=={versions['torch']}" in text


# ----------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("name", [one.name for one in FORMATS])
def test_the_example_of_every_format_is_read_as_such(name: str, tmp_path: Path) -> None:
    section = re.search(rf"^### `{name}`\n(.*?)(?=^##)", read(DOCS / "data.md"), flags=re.DOTALL | re.MULTILINE)
    assert section, f"docs/data.md has no section on the format {name}"
    example = re.search(r"```jsonl\n(.*?)```", section[1], flags=re.DOTALL)
    assert example and len(example[1].splitlines()) >= 2
    file = tmp_path / "example.jsonl"
    file.write_text(example[1], encoding="utf-8")
    found = check_file(file)
    assert found.formats == (name,) and not found.broken
    kinds = next(one.kinds for one in FORMATS if one.name == name)
    assert found.num_prompts
    assert bool(found.num_demonstrations) == ("demonstrations" in kinds)
    assert bool(found.num_comparisons) == ("comparisons" in kinds) or name == "qinglan_records"


def test_the_reward_function_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", read(DOCS / "data.md"), flags=re.DOTALL)
    assert example
    (tmp_path / "my_rewards.py").write_text(example[1], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    common = {"source": "human", "producer_id": "ann", "prompt_group_id": "ann"}
    prompt = Prompt(id="p", messages=(Message(role="user", content="Hi!"),), **common)
    completions = [
        Completion(id=text, prompt_id="p", text=text, **common) for text in ("One two three four five.", "One.")
    ]
    assert load_reward_function("my_rewards:brevity")([prompt, prompt], completions) == [0, -4]


# ------------------------------------------------------------------------------------------------------------ links


def anchors_of(page: Path) -> set[str]:
    """Return the link targets of a page's headings, as Markdown viewers make them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: link to {target}, which is not there"
        assert not anchor or anchor in anchors_of(there), f"{page.name}: {there.name} has no heading for #{anchor}"


# ------------------------------------------------------------------------------------------------------- the file tree


def tree_of_the_readme() -> list[tuple[str, list[Path]]]:
    """Return the names in the README's file tree, each with the places where it may lie.

    Indentation says in which folder a line stands. Names further right in a line lie in the folder that the line begins
    with, or beside what it begins with.
    """
    assert (ROOT / "README.md").is_file(), "README.md is missing"
    section = re.search(
        r"^## The house\n.*?^```\w*\n(.*?)^```", read(ROOT / "README.md"), flags=re.DOTALL | re.MULTILINE
    )
    assert section, "README.md: no section '## The house' with the file tree as a block of code"
    found: list[tuple[str, list[Path]]] = []
    folders: list[tuple[int, Path]] = [(-1, ROOT)]
    for line in section[1].splitlines():
        plain = re.sub("[│├└─|]", " ", line)
        names = re.findall(
            r"(?<![\w/.-])[\w./-]+/(?![\w.])|(?<![\w/.-])[\w./-]*\w\.(?:py|md|toml|txt|html|css|yaml)\b", plain
        )
        if not plain.strip():
            continue
        indent = len(plain) - len(plain.lstrip())
        while folders[-1][0] >= indent:
            folders.pop()
        beside = folders[-1][1]
        first = plain.split()[0]
        if first.endswith("/"):
            folders.append((indent, beside / first))
        for name in names:
            places = [beside / name] if name == first else [folders[-1][1] / name, beside / name]
            found.append((name, places))
    return found


def test_the_readmes_tree_names_what_is_there_and_every_package() -> None:
    tree = tree_of_the_readme()
    for name, places in tree:
        assert any(place.exists() for place in places), f"README.md, The house: {name} is not there"
    named = {place.resolve() for _, places in tree for place in places if place.is_dir()}
    for package in [path.parent for path in SOURCE.rglob("__init__.py")]:
        assert package.resolve() in named or package == SOURCE, f"README.md, The house: {package.name}/ is missing"


# ---------------------------------------------------------------------------------------------- nothing of our workshop


def test_no_path_of_the_machines_that_it_was_written_on() -> None:
    foreign = [
        "/wo" + "rk/",
        "shared" + "/data",
        "shared" + "/reference",
        "DESI" + "GN.md",
        "ROAD" + "MAP.md",
        "/tm" + "p/contract",
    ]
    folders = [SOURCE, DOCS, ROOT / "tests", ROOT / "benchmarks", ROOT / ".ci"]
    files = [file for folder in folders for file in folder.rglob("*")] + list(ROOT.glob("*"))
    for file in files:
        if (
            not file.is_file()
            or file.suffix not in TEXT_SUFFIXES
            or "__pycache__" in file.parts
            or file.name in (".ready", ".git")
        ):
            continue
        text = read(file)
        for name in foreign:
            is_known = file == ROOT / ".ci" / "run" and name == "shared" + "/data"
            assert name not in text or is_known, f"{file.relative_to(ROOT)}: names {name}"
