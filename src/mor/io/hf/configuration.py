"""`MoRPretrainedConfig`: what `transformers` calls the configuration of a MoR model.

`mor.io.hf` puts this file, together with those it imports, into every exported folder.
"""

from dataclasses import fields
from typing import Any, ClassVar

from transformers.configuration_utils import PretrainedConfig

from mor.model.config import MoRConfig


class MoRPretrainedConfig(PretrainedConfig):
    """The fields of `MoRConfig` under the same names, checked when the config is built.

    Args:
        use_cache: whether the model returns its keys and values where nothing else is said.
        **kwargs: fields of `MoRConfig`, and what `transformers` knows for every model.

    Raises:
        ConfigError: a value or a combination cannot work.
    """

    model_type = "mor"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "hidden_states",
        "recursion_counts",
        "aux_loss",
    ]

    def __init__(self, *, use_cache: bool = True, **kwargs: Any) -> None:
        names = [f.name for f in fields(MoRConfig)]
        kwargs.pop("num_hidden_layers", None)  # follows from the others
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        config = MoRConfig.from_dict(given)
        self.use_cache = use_cache
        self.num_hidden_layers = config.num_hidden_layers
        """Effective layers, prelude + R * block + coda: what third-party tools read."""
        super().__init__(**config.to_dict(), **kwargs)

    def to_mor(self) -> MoRConfig:
        """The configuration that the model itself is built from.

        Raises:
            ConfigError: a field was changed to something that cannot work.
        """
        values = {f.name: getattr(self, f.name) for f in fields(MoRConfig)}
        return MoRConfig.from_dict(values)
