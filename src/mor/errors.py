"""The exceptions that a user of mor can cause.

    MorError
    |-- ConfigError       a configuration or an option that cannot work
    |-- DataError         text, shards or tokenizers that cannot be read
    |-- CheckpointError   a checkpoint that cannot be read, written or matched to a model
    |-- RequestError      a generation request that cannot be served as asked
    `-- CapacityError     no memory, disk or pages left for what was asked

Each message names the field, the value and what would be right. Whatever a user can cause raises
one of these; `assert` is for our own invariants.
"""

import difflib
from collections.abc import Iterable


class MorError(Exception):
    """Base of every error that mor raises on purpose."""


class ConfigError(MorError, ValueError):
    """A configuration value that cannot work."""


class DataError(MorError, ValueError):
    """Text, token shards or a tokenizer that cannot be used."""


class CheckpointError(MorError, ValueError):
    """A checkpoint that cannot be read, written or matched to a model."""


class RequestError(MorError, ValueError):
    """A generation request that cannot be served as asked."""


class CapacityError(MorError, RuntimeError):
    """Memory, disk space or cache pages ran out."""


class MissingExtraError(MorError, ImportError):
    """A module needs a package that only an extra installs."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed: run `pip install 'mixture-of-recursions[{extra}]'`."
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the known key nearest to `name`, or all known keys if none is near."""
    keys = sorted(known)
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(keys)}."
