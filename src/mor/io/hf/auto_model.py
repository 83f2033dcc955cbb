"""`MoRForCausalLM` where mor is installed: what it saves loads where mor is not."""

from pathlib import Path
from typing import Any

from mor.io.hf import AUTO_MAP, modeling, write_code


class MoRForCausalLM(modeling.MoRForCausalLM):
    """The model, whose saved folder brings its code files."""

    def save_pretrained(self, save_directory: Path | str, *args: Any, **kwargs: Any) -> None:
        """See `PreTrainedModel`; writes `modeling_mor.py` and `configuration_mor.py`, too."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_code(Path(save_directory))
