"""`Budget`: the length of a run as an amount of steps, tokens, FLOPs or seconds."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from mor.errors import ConfigError

Unit = Literal["steps", "tokens", "flops", "seconds"]

_FORM = re.compile(
    r"\s*(?P<number>\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(?P<scale>[kKMBGTPE]?)\s*"
    r"(?P<unit>(?i:steps?|tokens?|flops?|seconds?|minutes?|min|hours?))\s*",
    re.ASCII,
)
_SCALES: Mapping[str, float] = MappingProxyType(
    {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
)
_SECONDS: Mapping[str, float] = MappingProxyType(
    {"second": 1, "minute": 60, "min": 60, "hour": 3600}
)


@dataclass(frozen=True)
class Budget:
    """An amount and its unit; `str` of it can be parsed again."""

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Parse `300 steps`, `20M tokens`, `1e15 flops`, `90 seconds`, `5 minutes`, `1.5 hours`.

        K, M, B or G, T, P, E before a unit stand for 1e3, 1e6, 1e9, 1e12, 1e15, 1e18.

        Raises:
            ConfigError: another form, an amount of 0, or a part of a step.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"budget={text!r} is no amount with a unit: write it like '300 steps', "
                "'20M tokens', '1e15 flops' or '5 minutes'."
            )
        amount = float(found["number"].replace("_", "")) * _SCALES[found["scale"]]
        name = found["unit"].lower().removesuffix("s")
        if not 0 < amount < math.inf:
            raise ConfigError(f"budget={text!r} must be above 0 and finite.")
        if name in _SECONDS:
            return cls(amount * _SECONDS[name], "seconds")
        if name == "step":
            if not amount.is_integer():
                raise ConfigError(f"budget={text!r} must be a whole number of steps.")
            return cls(amount, "steps")
        return cls(amount, "tokens" if name == "token" else "flops")

    def __str__(self) -> str:
        return f"{self.amount!r} {self.unit}"
