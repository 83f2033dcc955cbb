"""Values that a command line gives to the fields of a configuration."""

from collections.abc import Sequence
from typing import Any

import yaml

from mor.errors import ConfigError

_PREFIX = "--model."


def model_fields(args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The other arguments, and what `--model.FIELD VALUE` says by field.

    Raises:
        ConfigError: a field comes without a value.
    """
    others: list[str] = []
    fields: dict[str, Any] = {}
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith(_PREFIX):
            others.append(arg)
            continue
        key, given, value = arg.removeprefix(_PREFIX).partition("=")
        if not given and not rest:
            raise ConfigError(f"{arg} needs a value.")
        fields[key] = yaml_value(value if given else rest.pop(0))
    return others, fields


def yaml_value(text: Any) -> Any:
    """A command line's value as YAML reads it, `1e-3` as a number."""
    value = yaml.safe_load(text) if isinstance(text, str) else text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
