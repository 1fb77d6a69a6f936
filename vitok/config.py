"""Configs are frozen, keyword-only dataclasses that are written as JSON and read back strictly."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

ConfigT = TypeVar("ConfigT")

# As in Annotated[int, UNLESS_EMPTY]: the field is written only where it says something, so that
# files that are older than it, and digests of them, stay what they are.
UNLESS_EMPTY = Field(exclude_if=lambda value: not value)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[ConfigT]) -> type[ConfigT]:
    """Make a class a frozen, keyword-only dataclass that refuses unknown keys in JSON."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def require_choice(name: str, value: object, choices: object) -> None:
    """Check a value against a Literal type.

    Raises:
        ValueError: it is none of the choices.
    """
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, allowed))}")


def to_dict(value: Any) -> dict[str, Any]:
    """Return a config as plain JSON types (tuples become lists, paths strings)."""
    return _adapter(type(value)).dump_python(value, mode="json")


def flatten(value: Any) -> dict[str, Any]:
    """Return a config as one flat mapping with dotted names, as trackers show it."""

    def walk(prefix: str, node: Any) -> dict[str, Any]:
        if isinstance(node, dict):
            items = list(node.items())
        elif isinstance(node, list) and node and isinstance(node[0], dict):
            items = [(str(index), item) for index, item in enumerate(node)]
        else:
            return {prefix: node}
        flat: dict[str, Any] = {}
        for name, item in items:
            flat |= walk(f"{prefix}.{name}" if prefix else name, item)
        return flat

    return walk("", to_dict(value))


def write_config(path: Path, value: Any) -> None:
    """Write a config as indented JSON."""
    path.write_text(json.dumps(to_dict(value), indent=2) + "\n")


def parse_config(cls: type[ConfigT], fields: Any, source: str) -> ConfigT:
    """Build a config from JSON types.

    Raises:
        ValueError: an unknown, missing or wrong field; `source` says where it came from.
    """
    try:
        return _adapter(cls).validate_python(fields)
    except ValidationError as error:
        complaints = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or cls.__name__}: {item['msg']}"
            for item in error.errors()
        )
        raise ValueError(f"{source} is no {cls.__name__}: {complaints}") from error


def parse_json(cls: type[ConfigT], text: str, source: str) -> ConfigT:
    """Build a config from the text of a JSON file.

    Raises:
        ValueError: it is no JSON, or has an unknown, missing or wrong field; `source` says where
            it came from.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    return parse_config(cls, fields, source)


def read_config(path: Path, cls: type[ConfigT]) -> ConfigT:
    """Read a config that `write_config` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or has an unknown, missing or wrong field.
    """
    return parse_json(cls, path.read_text(), str(path))


def describe_difference(old: Any, new: Any) -> list[str]:
    """List the fields in which two configs differ, as `name: old -> new`."""
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


_adapters: dict[type, TypeAdapter[Any]] = {}


def _adapter(cls: type) -> TypeAdapter[Any]:
    """Return what reads and writes a class: made once, as that takes longer than its use."""
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]
