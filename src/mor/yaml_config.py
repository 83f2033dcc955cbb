"""Reading configuration files: YAML in, plain data out, overridden from the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mor.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        ConfigError: the file cannot be read, or is no mapping of names; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{path}{where}: {problem}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, not {values!r}.")
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {key!r} must be text.")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, mappings merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if nested else value
    return merged


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of plain data, keys in their order."""
    return yaml.safe_dump(_plain(values), sort_keys=False)


def _plain(value: Any) -> Any:
    """Tuples to lists and paths to strings, which YAML's safe dumper insists on."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
