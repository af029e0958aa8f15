"""Flags of a command, drawn from its configuration class: `--training.pack true` is `{"training": {"pack": "true"}}`.

Names are the fields' paths with hyphens (underscores are taken too). A value follows the flag or an equals sign, lists
take every value up to the next flag, switches are `--ship` or `--no-ship`, and `none` empties a field that may be
empty. Values stay text here: the configuration class converts and checks them, as it does those of a `--config` file.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic_core import PydanticUndefined

from qinglan.core.config import Config
from qinglan.core.errors import InputError, nearest


class CommonOptions(Config):
    """What every command takes beside its own configuration."""

    out: Path | None = None
    """Run folder; commands that keep none write what --json prints into this folder."""
    seed: int = 0
    """Decides every random draw; one in the `--config` file stands in for it where it is not given."""
    resume: bool = False
    """Go on with a run folder that was stopped; what is finished in it is kept."""
    as_json: bool = Field(default=False, alias="json")
    """Print one JSON object on standard output; everything else goes to standard error."""
    config: Path | None = None
    """YAML file with settings, such as a run's config.yaml; flags win over it."""
    preset: str | None = None
    """Named settings to start from, where the command has some."""


class Flag(NamedTuple):
    """One flag: where its value goes, and what kinds of value it takes."""

    path: tuple[str, ...]
    kinds: tuple[Any, ...]
    """The types of the field; several where it is a union."""

    @property
    def is_switch(self) -> bool:
        """True if the flag may stand without a value."""
        return bool in self.kinds

    @property
    def is_list(self) -> bool:
        """True if the flag takes any number of values."""
        return any(get_origin(kind) is tuple for kind in self.kinds)


def flags_of(kind: type[BaseModel], path: tuple[str, ...] = ()) -> dict[str, Flag]:
    """Return the flags of a configuration class by name, those of its parts as "part.field"."""
    flags: dict[str, Flag] = {}
    for field, info in kind.model_fields.items():
        here = (*path, info.alias or field)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            flags |= flags_of(info.annotation, here)
            continue
        is_union = get_origin(info.annotation) in (Union, types.UnionType)
        kinds = get_args(info.annotation) if is_union else (info.annotation,)
        flags[".".join(here).replace("_", "-")] = Flag(here, kinds)
    return flags


def read_flags(flags: Mapping[str, Flag], arguments: Sequence[str], where: str) -> dict[str, Any]:
    """Return the values that arguments give, nested by path; the last of repeated flags counts.

    Raises `InputError` for an unknown flag, with the nearest name, and for a value that is missing or has no flag.
    """
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise InputError(f"{where}: '{token}' belongs to no option; see qinglan {where} --help")
        name, has_value, value = token[2:].partition("=")
        flag, is_off = find_flag(flags, name.replace("_", "-"), where)
        taken: Any
        if is_off:
            taken = "false"
        elif has_value:
            taken = [value] if flag.is_list else value
        elif flag.is_list:
            taken = [*take_values(rest)]
        elif flag.is_switch:
            taken = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif rest and not rest[0].startswith("--"):
            taken = rest.pop(0)
        else:
            raise InputError(f"{where}: --{name}: no value given; expected one; see qinglan {where} --help")
        if types.NoneType in flag.kinds and taken in ("none", "None", "null"):
            taken = None
        inside = values
        for key in flag.path[:-1]:
            inside = inside.setdefault(key, {})
        inside[flag.path[-1]] = taken
    return values


def find_flag(flags: Mapping[str, Flag], name: str, where: str) -> tuple[Flag, bool]:
    """Return the flag of this name, and whether the name turns a switch off ("no-ship", "training.no-pack")."""
    if name in flags:
        return flags[name], False
    part, dot, last = name.rpartition(".")
    switched = f"{part}{dot}{last.removeprefix('no-')}"
    if last.startswith("no-") and switched in flags and flags[switched].is_switch:
        return flags[switched], True
    inside = [flag for flag in flags if flag.endswith(f".{name}") or flag.startswith(f"{name}.")]
    meant = f"; did you mean '--{inside[0]}'?" if inside else nearest(f"--{name}", [f"--{flag}" for flag in flags])
    raise InputError(f"{where}: --{name}: no such option{meant or f'; see qinglan {where} --help'}")


def take_values(rest: list[str]) -> Iterator[str]:
    """Take and yield the values before the next flag."""
    while rest and not rest[0].startswith("--"):
        yield rest.pop(0)


def defaults_of(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the defaults of a configuration class as nested values; required fields are left out."""
    defaults = {name: info.get_default(call_default_factory=True) for name, info in kind.model_fields.items()}
    plain = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in defaults.items()}
    return {name: value for name, value in plain.items() if value is not PydanticUndefined}
