"""`ServeConfig`: how the server behaves. How the model is run is the engine's `EngineConfig`."""

from dataclasses import dataclass, field
from typing import Annotated

from mor.errors import ConfigError
from mor.validation import NonNegativeInt, PositiveFloat, Range, check_fields


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of the server; options of `mor serve` under the same names, but for the first.

    Raises:
        ConfigError: a value is out of its range.
    """

    model_names: tuple[str, ...]
    """Names that requests may give the model; answers carry the first (`--served-model-name`)."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys of which a client must send one. Empty: every client is served."""
    max_model_len: Annotated[int, Range(ge=2)] | None = None
    """Tokens of prompt and output together. None: what the model takes."""
    max_waiting: NonNegativeInt = 512
    """Sequences that may wait until the engine runs them; more are refused with status 429."""
    request_timeout: PositiveFloat = 600.0
    """Seconds after which a request is given up."""
    body_timeout: PositiveFloat = 30.0
    """Seconds that a request's body may take to arrive."""
    send_timeout: PositiveFloat = 30.0
    """Seconds that a client may take to read what is streamed to it."""
    drain_timeout: PositiveFloat = 120.0
    """Seconds that running requests have to finish after SIGTERM."""
    max_body_bytes: Annotated[int, Range(ge=1024)] = 8 * 2**20
    """Bytes of a request's body, at most."""
    chat_template: str | None = field(default=None, repr=False)
    """Jinja template of a conversation. None: the model's own."""

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if not self.model_names or not all(self.model_names):
            raise ConfigError("--served-model-name must not be empty.")
        for key in self.api_keys:
            if not (key.isascii() and key.isprintable()) or not key.strip():
                raise ConfigError("an API key must be printable ASCII text, and not empty.")
            if key != key.strip():
                raise ConfigError("an API key must not begin or end with a blank.")
