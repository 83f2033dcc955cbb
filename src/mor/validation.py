"""Checks of configs: type, choices and range of a value stand beside the field they belong to.

    max_num_seqs: PositiveInt = 64
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    dtype: Literal["float32", "bfloat16"] | None = None

`check_fields` compares each value of a config (a frozen dataclass) with its field's annotation, and
says in one sentence which field is wrong, with which value, and what would be right. A rule about
several fields stays code in the config's `__post_init__`.

The names are those of pydantic and annotated-types. Neither is used: this file is also part of the
folders that `mor convert to-hf` writes, which need nothing but torch and transformers.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from mor.errors import MorError, nearest


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number: greater or equal, greater than, less or equal, less than."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def words(self, *, integer: bool) -> str:
        """`>= 1`, `> 0`, `in 0..20` (integers) or `in [0, 1)`; empty without bounds."""
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if low is not None and high is not None:
            if integer:
                first = low if self.gt is None else low + 1
                last = high if self.lt is None else high - 1
                return f"in {first}..{last}"
            opening = "[" if self.gt is None else "("
            closing = "]" if self.lt is None else ")"
            return f"in {opening}{low}, {high}{closing}"
        if low is not None:
            return f"{'>=' if self.gt is None else '>'} {low}"
        if high is not None:
            return f"{'<=' if self.lt is None else '<'} {high}"
        return ""


@dataclass(frozen=True)
class Rule:
    """What a value of the annotated type must be besides, and the words for the whole."""

    wanted: str
    """Follows `must be` in the message."""
    holds: Callable[[Any], bool] | None = None
    """Whether a value of the right type will do; None: each does."""


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]


class FieldRule(NamedTuple):
    """What the annotation of one field demands."""

    name: str
    accepts: Callable[[Any], bool]
    wanted: str
    """Follows `must be` in the message."""
    choices: tuple[str, ...]
    """Values of a Literal; empty for other types."""
    is_shown: bool
    """Whether the message may show the value: keys of an API must not get into a log."""


def check_fields(config: Any, error: type[MorError], skip: Iterable[str] = ()) -> None:
    """Raise `error` for the first field whose value does not fit its annotation.

    Args:
        config: an instance of a dataclass.
        skip: fields that the config checks itself, since their form depends on other fields.
    """
    for rule in field_rules(type(config)):
        value = getattr(config, rule.name)
        if rule.name in skip or rule.accepts(value):
            continue
        shown = f"{rule.name}={value!r}" if rule.is_shown else rule.name
        if rule.choices:
            raise error(f"{shown} is not a choice: {nearest(str(value), rule.choices)}")
        raise error(f"{shown} must be {rule.wanted}.")


def check_keys(values: Iterable[Any], config_class: type, kind: str, error: type[MorError]) -> None:
    """Raise `error` for the first key that is no field of the config; the nearest one is named.

    Args:
        kind: what the message calls a key, such as `engine setting`.
    """
    known = {f.name for f in fields(config_class)}
    for key in values:
        if key not in known:
            raise error(f"{kind} {key!r} is unknown: {nearest(str(key), known)}")


@cache
def field_rules(config_class: type) -> tuple[FieldRule, ...]:
    """The rules of all fields of a dataclass, in their order."""
    rules = []
    for f in fields(config_class):
        accepts, wanted = _type_rule(f.type)
        kind = base_type(f.type)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        rules.append(FieldRule(f.name, accepts, wanted, choices, f.repr))
    return tuple(rules)


@cache
def float_fields(config_class: type) -> tuple[str, ...]:
    """Names of the fields that hold a float, never None."""
    return tuple(
        f.name
        for f in fields(config_class)
        if base_type(f.type) is float and not is_optional(f.type)
    )


def range_of(config_class: type, name: str) -> Range:
    """The range that a field's annotation declares; one without bounds if there is none."""
    (annotation,) = (f.type for f in fields(config_class) if f.name == name)
    (kind, *_) = [*_members(annotation), annotation]
    return next((mark for mark in _marks(kind) if isinstance(mark, Range)), Range())


def base_type(annotation: Any) -> Any:
    """An annotation without its marks and without None: `int` of `Annotated[int, ..] | None`."""
    kinds = [kind for kind in _members(annotation) if kind is not NoneType]
    if len(kinds) == 1:  # `X | None`
        return base_type(kinds[0])
    if get_origin(annotation) is Annotated:
        return base_type(get_args(annotation)[0])
    return annotation


def is_optional(annotation: Any) -> bool:
    """Whether None is a value of the annotated type."""
    return NoneType in _members(annotation)


# -- from annotations to predicates and words -----------------------------------------------------


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; empty for other annotations."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()


def _marks(annotation: Any) -> tuple[Any, ...]:
    """What stands behind the type in `Annotated[...]`."""
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _type_rule(annotation: Any) -> tuple[Callable[[Any], bool], str]:
    """Whether a value fits an annotation, and the words for what fits."""
    if members := _members(annotation):
        rules = [_type_rule(kind) for kind in members if kind is not NoneType]
        if len(rules) == 1:  # `X | None`: the words are those of X
            (accepts, wanted) = rules[0]
            return (lambda value: value is None or accepts(value)), wanted
        wanted = " or ".join(words for _, words in rules)
        return (lambda value: any(accepts(value) for accepts, _ in rules)), wanted
    if marks := _marks(annotation):
        return _marked_rule(get_args(annotation)[0], marks)
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return (lambda value: value in choices), f"one of {', '.join(map(str, choices))}"
    if get_origin(annotation) is tuple:
        accepts_entry, wanted = _type_rule(get_args(annotation)[0])  # tuple[T, ...]
        return (
            lambda value: isinstance(value, tuple) and all(map(accepts_entry, value))
        ), f"a list, each of its entries {wanted}"
    return _plain_rule(get_origin(annotation) or annotation)


def _marked_rule(annotation: Any, marks: tuple[Any, ...]) -> tuple[Callable[[Any], bool], str]:
    """The rule of a type with its ranges and rules, which are looked at in their order."""
    accepts, wanted = _type_rule(annotation)
    for mark in marks:
        if isinstance(mark, Range):
            accepts = _both(accepts, mark.__contains__)
            wanted = f"{wanted} {mark.words(integer=annotation is int)}"
        elif isinstance(mark, Rule):
            accepts = _both(accepts, mark.holds) if mark.holds is not None else accepts
            wanted = mark.wanted
    return accepts, wanted


def _both(first: Callable[[Any], bool], second: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: first(value) and second(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # also for integers beyond any float


def _plain_rule(kind: type) -> tuple[Callable[[Any], bool], str]:
    """The rule of a type without parameters; what `list` and `dict` hold is not looked at."""
    if kind is int:
        return _is_integer, "an integer"
    if kind is float:
        return _is_finite, "a finite number"
    words = {
        bool: "true or false",
        str: "a text",
        Path: "a path",
        list: "a list",
        dict: "a mapping of names to values",
    }
    return (lambda value: isinstance(value, kind)), words[kind]
