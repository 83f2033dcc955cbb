"""Options made from the fields of a config: the flag is the field's name, the help its docstring.

`max_num_seqs` becomes `--max-num-seqs`. Only the type is checked here; ranges and choices are left
to the config, whose message names the field as it was typed.
"""

import argparse
import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, Protocol, get_args, get_origin, runtime_checkable

from mor.validation import base_type


@runtime_checkable
class OptionGroup(Protocol):
    """A parser, or a group of its options."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an option, as argparse does."""
        ...


def add_field_options(
    p: OptionGroup,
    config_class: type,
    names: Iterable[str],
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    helps: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add one option for each named field of a dataclass.

    Args:
        defaults: what the command line takes instead of a field's own default.
        helps: what it says instead of a field's docstring.
    """
    known: dict[str, Field[Any]] = {f.name: f for f in fields(config_class)}
    for name in names:
        annotation = known[name].type
        default = defaults.get(name, known[name].default)
        assert default is not MISSING, f"{name} needs a default on the command line"
        text = helps.get(name) or field_help(known[name], config_class)
        settings = _value_settings(annotation, default)
        p.add_argument(flag(name), default=default, help=text, **settings)


def field_values(options: Any, config_class: type) -> dict[str, Any]:
    """The values of a dataclass's fields that a command line has options for."""
    return {
        f.name: getattr(options, f.name) for f in fields(config_class) if hasattr(options, f.name)
    }


def flag(name: str) -> str:
    """The option of a field: `--max-num-seqs` of `max_num_seqs`."""
    return f"--{name.replace('_', '-')}"


@cache
def field_docs(config_class: type) -> Mapping[str, str]:
    """The docstring below each field, on one line; Python itself does not keep them."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, doc in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[field.target.id] = " ".join(str(doc.value.value).split())
    return MappingProxyType(docs)


def field_help(field: Field[Any], config_class: type) -> str:
    """A field's docstring in words of the command line, with the choices of a Literal."""
    text = field_docs(config_class)[field.name].replace("None: ", "Default: ")
    kind = base_type(field.type)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return f"{text} Choices: {', '.join(choices)}." if choices else text


def _value_settings(annotation: Any, default: Any) -> dict[str, Any]:
    """How `add_argument` reads a value of the annotated type."""
    kind = base_type(annotation)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction if default else "store_true"}
    if get_origin(kind) is tuple:  # tuple[T, ...]
        return {"nargs": "+", "type": base_type(get_args(kind)[0])}
    if kind is str or get_origin(kind) is Literal:
        return {}  # text; the config knows the choices
    return {"type": kind | None if default is None else kind}
