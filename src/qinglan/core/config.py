"""Configuration: frozen pydantic classes, a sentence under each field, checks at construction.

Precedence: defaults (or a preset) < `--config file.yaml` < flags. Unknown keys fail with their full path and the
nearest valid name. The flags of the command line are drawn from the same classes (`flags.py`), their help by tyro.
"""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from qinglan.core.errors import InputError, nearest


class Config(BaseModel):
    """Base of every configuration: immutable, unknown keys refused, field docstrings kept as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises `InputError` that names the file and line."""
    path = Path(path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path}: not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"--config {path}{line}: not YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config {path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(value, dict):
        raise InputError(f"--config {path}: expected a mapping of field names to values, got {type(value).__name__}")
    return value


def merge(base: C, changes: dict[str, Any], where: str) -> C:
    """Return `base` with nested `changes` laid over it.

    Raises `InputError` with `where`, the full path of the field, what was expected and the nearest valid name.
    """
    check_keys(type(base), changes, where)
    values = overlay(base.model_dump(), changes)
    return build(type(base), values, where)


def build(kind: type[C], values: dict[str, Any], where: str) -> C:
    """Construct a configuration; pydantic's errors become one `InputError` line each."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(describe(error, where)) from error


def describe(error: ValidationError, where: str) -> str:
    """Return pydantic's findings as lines "where: path.to.field: what is wrong (got value)"."""
    lines = []
    for finding in error.errors():
        path = ".".join(str(part) for part in finding["loc"]) or "configuration"
        is_missing = finding["type"] == "missing"
        message = "is required, but not given" if is_missing else finding["msg"].removeprefix("Value error, ")
        got = finding.get("input")
        shown = f" (got {got!r})" if isinstance(got, str | int | float | bool | None) else ""
        lines.append(f"{where}: {path}: {message}{shown}")
    return "\n".join(lines)


def check_keys(kind: type[BaseModel], changes: dict[str, Any], where: str, path: str = "") -> None:
    """Raise `InputError` for the first key that is no field of `kind`, with its path and the nearest valid name."""
    for key, value in changes.items():
        full = f"{path}{key}"
        field = kind.model_fields.get(key)
        if field is None:
            raise InputError(f"{where}: {full}: no such field{nearest(str(key), kind.model_fields)}")
        inner = field.annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            check_keys(inner, value, where, f"{full}.")


def overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, key by key in nested mappings."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def to_yaml(config: Config, seed: int) -> str:
    """Return the seed and the resolved configuration as YAML that `--config` reads back."""
    values = {"seed": seed} | config.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
