"""The floors of the house, kept by a test: a file imports only lower floors, and some imports have one home."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "qinglan"
FLOORS = {
    "core": 0,
    "models": 1,
    "data": 1,
    "learn": 2,
    "supervisors": 2,
    "tasks": 3,
    "evals": 3,
    "app": 3,
    "recipes": 4,
    "commands": 4,
}
BESIDE = {("evals", "tasks")}
"""Folders of one floor that may import each other, one way only."""
FILES = sorted(SOURCE.rglob("*.py"))


def folder_of(path: Path) -> str:
    """Return the floor's folder of a file, or its own name at the top (cli)."""
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Return every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_lower_floors(path: Path) -> None:
    here = folder_of(path)
    if here in ("__init__", "__main__", "cli"):
        return
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] != "qinglan" or len(parts) < 2 or parts[1] == here:
            continue
        there = parts[1]
        if there == "cli":
            assert FLOORS[here] == 4, f"{path}: imports the command line from floor {FLOORS[here]}"
            continue
        is_lower = FLOORS[there] < FLOORS[here]
        assert is_lower or (here, there) in BESIDE, (
            f"{path}: imports {module}, which is not on a lower floor than {here}"
        )


@pytest.mark.parametrize("folder", ["learn", "supervisors"])
def test_the_answer_key_lives_upstairs(folder: str) -> None:
    for path in (SOURCE / folder).glob("*.py"):
        truth = {module for module in imports_of(path) if module.startswith(("qinglan.tasks", "qinglan.evals"))}
        assert not truth, f"{path}: training code reaches for the answer key: {truth}"


def test_only_the_device_knows_torch_distributed() -> None:
    for path in FILES:
        if path.name != "device.py":
            assert not any(module.startswith("torch.distributed") for module in imports_of(path)), path


def test_only_chat_touches_a_chat_template() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "apply_chat_template" not in text or path.name == "chat.py", path


def test_nothing_imports_recipes_but_the_command_line() -> None:
    for path in FILES:
        if folder_of(path) not in ("recipes", "cli"):
            assert not any(module.startswith("qinglan.recipes") for module in imports_of(path)), path


def test_only_the_app_imports_the_web_framework() -> None:
    for path in FILES:
        if folder_of(path) != "app":
            frameworks = {"fastapi", "starlette", "uvicorn"}
            assert not frameworks & {module.split(".")[0] for module in imports_of(path)}, path


def test_recipes_tell_their_story_on_a_page() -> None:
    for path in (SOURCE / "recipes").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 200, path


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > 400}
