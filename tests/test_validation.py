"""Annotations of a config's fields as checks: every kind of type, and the words for it."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from mor.errors import ConfigError, RequestError
from mor.model.sampling import SamplingParams
from mor.validation import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Rule,
    base_type,
    check_fields,
    check_keys,
    float_fields,
    is_optional,
    range_of,
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A field of each kind."""

    count: PositiveInt = 1
    some: NonNegativeInt | None = None
    among: Annotated[int, Range(gt=2, lt=6)] = 3
    number: float = 0.5
    above: PositiveFloat = 0.5
    half_open: Annotated[float, Range(gt=0, le=1)] = 1.0
    at_most: Annotated[float, Range(le=2)] | None = None
    below: Annotated[float, Range(lt=2)] = 0.0
    flag: bool = False
    text: str = ""
    place: Path | None = None
    either: str | list[int] = ""
    table: dict[str, Any] = field(default_factory=dict)
    texts: Annotated[tuple[str, ...], Rule("texts, none of them empty", all)] = ()
    ids: tuple[NonNegativeInt, ...] = ()
    choice: Literal["cycle", "sequence"] = "cycle"
    maybe: Literal["cycle", "sequence"] | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)


@pytest.mark.parametrize(
    "values",
    [
        {"count": 2**80},
        {"some": 0},
        {"among": 5},
        {"number": -3},
        {"above": 5e-324},
        {"half_open": 1},
        {"at_most": -1e300},
        {"flag": True},
        {"place": Path("a")},
        {"either": [1]},
        {"either": "a"},
        {"texts": ("a", "b")},
        {"ids": (0, 7)},
        {"choice": "sequence"},
        {"maybe": "cycle"},
    ],
)
def test_what_fits_is_taken(values: dict[str, Any]) -> None:
    (name,) = values
    assert getattr(Example(**values), name) == values[name]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("count", 0, "count=0 must be an integer >= 1."),
        ("count", True, "count=True must be an integer >= 1."),
        ("count", 1.0, "count=1.0 must be an integer >= 1."),
        ("count", None, "count=None must be an integer >= 1."),
        ("some", "true", "some='true' must be an integer >= 0."),
        ("among", 2, "among=2 must be an integer in 3..5."),
        ("number", math.nan, "number=nan must be a finite number."),
        ("number", 10**400, f"number={10**400} must be a finite number."),
        ("number", False, "number=False must be a finite number."),
        ("above", 0, "above=0 must be a finite number > 0."),
        ("half_open", 0.0, "half_open=0.0 must be a finite number in (0, 1]."),
        ("at_most", 3, "at_most=3 must be a finite number <= 2."),
        ("below", 2, "below=2 must be a finite number < 2."),
        ("flag", 1, "flag=1 must be true or false."),
        ("text", 1, "text=1 must be a text."),
        ("place", "a", "place='a' must be a path."),
        ("either", 1, "either=1 must be a text or a list."),
        ("table", [], "table=[] must be a mapping of names to values."),
        ("texts", ("a", ""), "texts=('a', '') must be texts, none of them empty."),
        ("texts", ["a"], "texts=['a'] must be texts, none of them empty."),
        ("ids", (-1,), "ids=(-1,) must be a list, each of its entries an integer >= 0."),
        ("choice", "cycles", "choice='cycles' is not a choice: did you mean 'cycle'?"),
        ("choice", None, "choice=None is not a choice: known keys: cycle, sequence."),
        ("maybe", 7, "maybe=7 is not a choice: known keys: cycle, sequence."),
        ("secrets", ("key", 1), "secrets must be a list, each of its entries a text."),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(name: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Example(**{name: value})
    assert str(caught.value) == words


def test_the_error_is_the_configs_own_and_some_fields_can_be_left_out() -> None:
    broken = object.__new__(Example)
    for name, value in {**vars(Example()), "count": 0}.items():
        object.__setattr__(broken, name, value)
    with pytest.raises(RequestError, match="count=0"):
        check_fields(broken, RequestError)
    assert check_fields(broken, RequestError, skip=("count",)) is None


def test_an_unknown_key_names_the_nearest() -> None:
    assert check_keys({"count": 1}, Example, "field", ConfigError) is None
    with pytest.raises(ConfigError, match=r"^field 'cuont' is unknown: did you mean 'count'\?$"):
        check_keys({"cuont": 1}, Example, "field", ConfigError)
    with pytest.raises(ConfigError, match=r"^field 3 is unknown: known keys: above, among,"):
        check_keys({3: 1}, Example, "field", ConfigError)


def test_what_an_annotation_says() -> None:
    assert base_type(PositiveInt | None) is int
    assert base_type(Annotated[str | list[int], Rule("x")]) == str | list[int]
    assert is_optional(PositiveInt | None)
    assert not is_optional(PositiveInt)
    assert range_of(SamplingParams, "min_p") == Range(ge=0, le=1)
    assert range_of(SamplingParams, "seed") == Range(ge=0, lt=2**63)
    assert range_of(SamplingParams, "ignore_eos") == Range()
    assert float_fields(Example) == ("number", "above", "half_open", "below")
