"""Mixture-of-Recursions language models: train, evaluate, convert and serve them.

config = mor.MoRConfig.preset("360m", num_recursions=3)
model = mor.MoRModel(config)
mor.save(model, "dir")
model = mor.load("dir")
"""

from mor import io
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
from mor.model.generation import Completion, SamplingParams, generate
from mor.model.mor import MoRModel, MoROutput

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DataError",
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
