"""Mixture-of-Recursions language models: train, evaluate, convert and serve them.

    config = mor.MoRConfig.preset("360m", num_recursions=3)
    model = mor.MoRModel(config)
    mor.save(model, "dir")
    model = mor.load("dir")
    completions = mor.LLM("dir").generate(["Once upon a time"])

Names are imported when they are first used, so that `mor --help` does not wait for torch.
"""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor import io
    from mor.engine.config import EngineConfig
    from mor.engine.llm import LLM
    from mor.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DataError,
        MorError,
        RequestError,
    )
    from mor.io.checkpoint import load, save
    from mor.io.tokenizer import Tokenizer
    from mor.model.config import MoRConfig
    from mor.model.generation import generate
    from mor.model.sampling import Completion, SamplingParams
    from mor.model.transformer import MoRModel, MoROutput

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CapacityError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DataError",
    "EngineConfig",
    "MoRConfig",
    "MoRModel",
    "MoROutput",
    "MorError",
    "RequestError",
    "SamplingParams",
    "Tokenizer",
    "generate",
    "io",
    "load",
    "save",
]

_HOMES: Mapping[str, str] = MappingProxyType(
    {
        "EngineConfig": "mor.engine.config",
        "LLM": "mor.engine.llm",
        "CapacityError": "mor.errors",
        "CheckpointError": "mor.errors",
        "ConfigError": "mor.errors",
        "DataError": "mor.errors",
        "MorError": "mor.errors",
        "RequestError": "mor.errors",
        "load": "mor.io.checkpoint",
        "save": "mor.io.checkpoint",
        "Tokenizer": "mor.io.tokenizer",
        "MoRConfig": "mor.model.config",
        "generate": "mor.model.generation",
        "MoRModel": "mor.model.transformer",
        "MoROutput": "mor.model.transformer",
        "Completion": "mor.model.sampling",
        "SamplingParams": "mor.model.sampling",
    }
)


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name == "io":
        return importlib.import_module("mor.io")
    if name not in _HOMES:
        raise AttributeError(f"module 'mor' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
