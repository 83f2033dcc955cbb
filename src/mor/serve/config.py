"""`ServeConfig`: how the server behaves. How the model is run is the engine's `EngineConfig`."""

from dataclasses import dataclass, field

from mor.errors import ConfigError

_AT_MIN = (("max_waiting", 0), ("max_body_bytes", 1024), ("max_model_len", 2))
_SECONDS = ("request_timeout", "body_timeout", "send_timeout", "drain_timeout")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of the server.

    Raises:
        ConfigError: a value is out of its range.
    """

    model_names: tuple[str, ...]
    """Names that requests may give the model; answers carry the first."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of them opens every route; without one everybody may come in."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; None: what the model takes."""
    max_waiting: int = 512
    """Sequences that may wait for one of the engine's places; more are refused with 429."""
    request_timeout: float = 600.0
    """Seconds after which a request is given up."""
    body_timeout: float = 30.0
    """Seconds that a request's body may take to arrive."""
    send_timeout: float = 30.0
    """Seconds that a client may take to read what is streamed to it."""
    drain_timeout: float = 120.0
    """Seconds that running requests have to finish after SIGTERM."""
    max_body_bytes: int = 8 * 2**20
    chat_template: str | None = field(default=None, repr=False)
    """Jinja template of a conversation; None: the model's own."""

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ConfigError("--served-model-name must not be empty.")
        for key in self.api_keys:
            if not (key.isascii() and key.isprintable()) or not key.strip():
                raise ConfigError("an API key must be printable ASCII text, and not empty.")
            if key != key.strip():
                raise ConfigError("an API key must not begin or end with a blank.")
        for name, minimum in _AT_MIN:
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"{name}={value} must be at least {minimum}.")
        for name in _SECONDS:
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} must be a time in seconds.")
