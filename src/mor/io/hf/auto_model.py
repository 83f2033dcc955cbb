"""`MoRForCausalLM` where mor is installed: what it saves loads where mor is not."""

from pathlib import Path
from typing import Any

from mor.io.hf import modeling
from mor.io.hf_export import AUTO_MAP, write_code


class MoRForCausalLM(modeling.MoRForCausalLM):
    """The model, whose saved folder brings its code files."""

    def save_pretrained(self, save_directory: Path | str, *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel` does, and write the two code files beside the weights."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_code(Path(save_directory))
