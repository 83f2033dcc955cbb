"""Reading golden files: outputs of the reference implementation (see their README in the docs)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One file: configurations, and tensors by key."""

    llama: dict[str, Any]
    cfg: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> "Golden":
        with safe_open(str(path), "pt") as file:
            meta = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return cls(json.loads(meta["llama"]), json.loads(meta["cfg"]), tensors)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose key starts with the prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def files() -> Iterator[Path]:
    return iter(sorted(FOLDER.glob("*.safetensors")))
