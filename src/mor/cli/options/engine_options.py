"""Options that become an `EngineConfig`, under its fields' names, and the choice of a device."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import torch

from mor.cli.options.config_options import OptionGroup, add_field_options, field_values
from mor.engine.config import EngineConfig
from mor.errors import ConfigError

_DTYPES: Mapping[str, Any] = MappingProxyType(  # vLLM's other names
    {"auto": None, "half": "float16", "float": "float32"}
)
_HELPS: Mapping[str, str] = MappingProxyType(
    {
        "device": "auto (a GPU, if there is one), cpu or cuda",
        "dtype": "of the weights: auto (the model's own), float32, bfloat16 or float16",
    }
)


def add_engine_options(
    p: OptionGroup,
    names: Iterable[str] | None = None,
    *,
    helps: Mapping[str, str] = MappingProxyType({}),
    **defaults: Any,
) -> None:
    """Add an option for each named field of `EngineConfig`; None: for all of them.

    Args:
        helps: what a verb says instead of a field's docstring.
        defaults: of this verb, where they are not those of the fields.
    """
    chosen = [f.name for f in fields(EngineConfig)] if names is None else names
    add_field_options(
        p,
        EngineConfig,
        chosen,
        defaults={"device": "auto"} | defaults,
        helps={**_HELPS, **helps},
    )


def engine_settings(options: Any) -> dict[str, Any]:
    """The fields of `EngineConfig` that a verb has options for, not yet checked but for the device.

    Raises:
        ConfigError: there is no such device.
    """
    settings = field_values(options, EngineConfig)
    if "dtype" in settings:
        settings["dtype"] = _DTYPES.get(settings["dtype"], settings["dtype"])
    if "device" in settings:
        settings["device"] = select_device(settings["device"])
    return settings


def engine_config(options: Any, **settings: Any) -> EngineConfig:
    """The config that the options of a verb make, with settings of the verb's own.

    Raises:
        ConfigError: a value is out of its range; the message names the field.
    """
    return EngineConfig(**(engine_settings(options) | settings))


def select_device(name: str | None) -> str:
    """`cuda` or `cpu`, for what `--device` says; None is `auto`: a GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name not in (None, "auto", "cpu", "cuda"):
        raise ConfigError(f"device={name!r} is unknown: use auto, cpu or cuda.")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("device='cuda': torch sees no GPU here; use --device cpu.")
    return "cuda" if has_gpu and name != "cpu" else "cpu"
