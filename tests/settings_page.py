"""The page docs/settings.md: every command and every setting, drawn from the configuration classes.

After a change of settings:   .venv/bin/python tests/settings_page.py
"""

import importlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qinglan.cli import COMMANDS
from qinglan.core.config import Config, overlay
from qinglan.core.flags import CommonOptions, defaults_of

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HOW_TO_UPDATE = ".venv/bin/python tests/settings_page.py"
PLAIN = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    types.NoneType: "none",
}
BOUNDS = {
    annotated_types.Ge: ("ge", "at least"),
    annotated_types.Gt: ("gt", "above"),
    annotated_types.Le: ("le", "at most"),
    annotated_types.Lt: ("lt", "below"),
}
INTRODUCTION = f"""\
# Settings

Every command and every setting with its default. This page is drawn from the configuration classes; do not edit it.
After a change there, write it again with `{HOW_TO_UPDATE}`.

Settings are laid over each other in this order: defaults, then `--preset NAME`, then `--config FILE.yaml`, then flags.
A flag is the path of a field with hyphens: the field `learning_rate` of the part `ppo` is `--ppo.learning-rate 1e-4`.
Lists take every value up to the next flag, a switch is `--name` or `--no-name`, and `none` empties a setting that may
be empty. In a YAML file parts are nested mappings; a run's own `config.yaml` is such a file and repeats the run.
A name that does not exist stops the command with the nearest one that does. Exit codes: 0 done, 1 failed, 2 bad input
or configuration.
"""


def page() -> str:
    """Return the whole page as Markdown."""
    kinds = [config_of(name) for name in COMMANDS]
    parts = [part for part in dict.fromkeys(part for kind in kinds for part in parts_of(kind)) if part not in kinds]
    sections = [INTRODUCTION, "## Options of every command\n", table(CommonOptions, "--"), "## Commands\n"]
    described: dict[type[BaseModel], str] = {}
    for name, command in COMMANDS.items():
        kind = config_of(name)
        places = "".join(f" {field.upper()}" for field in command.positional)
        sections.append(f"### qinglan {name}\n\n`qinglan {name}{places} [options]`: {command.summary}.\n")
        if kind in described:
            sections.append(f"Options as for [qinglan {described[kind]}](#{anchor(f'qinglan {described[kind]}')}).\n")
            continue
        described[kind] = name
        sections += [table(kind, "--"), *presets(kind)]
    sections.append(
        "## Parts\n\nClasses of settings that commands contain. A command may set other defaults: see there.\n"
    )
    for part in sorted(parts, key=lambda one: one.__name__):
        module = part.__module__.removeprefix("qinglan.").replace(".", "/")
        sections.append(f"### {part.__name__}\n\n{first_line(part)} Defined in `{module}.py`.\n")
        sections.append(table(part, ""))
    return "\n".join(sections)


def config_of(name: str) -> type[Config]:
    """Return a command's configuration class."""
    command = COMMANDS[name]
    return getattr(importlib.import_module(f"qinglan.{command.module}"), command.config)


def parts_of(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield every configuration class inside another, at any depth."""
    for info in kind.model_fields.values():
        for inner in inner_types(info.annotation):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield inner
                yield from parts_of(inner)


def inner_types(annotation: Any) -> Iterator[Any]:
    """Yield a type and those that it is made of."""
    yield annotation
    for one in get_args(annotation):
        yield from inner_types(one)


def table(kind: type[BaseModel], dashes: Literal["--", ""]) -> str:
    """Return a class's fields as a Markdown table, as flags or as names."""
    lines = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for field, info in kind.model_fields.items():
        name = info.alias or field
        part = part_of(info)
        shown = f"`{dashes}{name.replace('_', '-') if dashes else name}{'.*' if part else ''}`"
        values = f"see [{part.__name__}](#{anchor(part.__name__)})" if part else values_of(info)
        cells = shown, values, default_of(info), " ".join((info.description or "").split())
        assert cells[-1], f"{kind.__name__}.{field} has no docstring"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def part_of(info: FieldInfo) -> type[BaseModel] | None:
    """Return the class of a field that is a part of its own."""
    is_part = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    return info.annotation if is_part else None


def values_of(info: FieldInfo) -> str:
    """Return what a field may hold, in words, with its bounds."""
    bounds = []
    for constraint in info.metadata:
        for kind, (key, word) in BOUNDS.items():
            if isinstance(constraint, kind):
                bounds.append(f"{word} {text_of(getattr(constraint, key))}")
    return ", ".join([words_of(info.annotation), *bounds])


def words_of(annotation: Any) -> str:
    """Return a type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(words_of(one) for one in inner)
    if origin is tuple:
        several = inner[-1] is Ellipsis
        return f"list of {words_of(inner[0])}" if several else f"{len(inner)} times {words_of(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{anchor(annotation.__name__)})"
    return PLAIN[annotation]


def default_of(info: FieldInfo) -> str:
    """Return a field's default; of a part, the settings that differ from that part's own defaults."""
    value = info.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        changed = dict(differences(type(value).model_construct().model_dump(), value.model_dump()))
        return ", ".join(f"{name} `{text_of(found)}`" for name, found in changed.items()) or "as there"
    return f"`{text_of(value)}`"


def presets(kind: Any) -> list[str]:
    """Return the table of what a command's presets set otherwise than its defaults, one column each."""
    if not hasattr(kind, "presets"):
        return []
    given = {name: one if isinstance(one, dict) else one.model_dump() for name, one in kind.presets().items()}
    usual = defaults_of(kind)
    resolved = {name: dict(leaves(overlay(usual, changes))) for name, changes in given.items()}
    names = list(resolved)
    changed = [path for path in resolved[names[0]] if len({repr(one.get(path)) for one in resolved.values()}) > 1]
    head = ["| setting | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    rows = [
        f"| `{path}` | " + " | ".join(f"`{text_of(resolved[name].get(path))}`" for name in names) + " |"
        for path in changed
    ]
    return [f"Presets (the first is the default), where they differ:\n\n{chr(10).join(head + rows)}\n"]


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every setting in nested mappings."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def differences(usual: dict[str, Any], values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of the settings that differ."""
    before = dict(leaves(usual))
    return ((path, value) for path, value in leaves(values) if path not in before or before[path] != value)


def text_of(value: Any) -> str:
    """Return a value as it is written on the command line; of a list of classes, their names."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " ".join(getattr(one, "name", None) or text_of(one) for one in value) or "empty"
    return str(value)


def first_line(kind: type[BaseModel]) -> str:
    """Return the first paragraph of a class's docstring on one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def anchor(heading: str) -> str:
    """Return a heading's link target."""
    return heading.lower().replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
