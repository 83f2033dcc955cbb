"""Our models as `transformers` sees them, for the tests beside this file."""

from typing import Any

import torch
from torch import Tensor

from mor.io.hf.auto_model import MoRForCausalLM
from mor.io.hf.configuration import MoRPretrainedConfig
from mor.model.transformer import MoRModel
from tiny import tiny_model


def wrapped(model: MoRModel) -> MoRForCausalLM:
    """The same parameters in the class for `transformers`, in evaluation mode."""
    hf = MoRForCausalLM(MoRPretrainedConfig(**model.config.to_dict()))
    hf = hf.to(model.embed_tokens.weight.dtype)
    hf.model.load_state_dict(model.state_dict())
    return hf.eval()


def tiny_pair(kind: str = "expert", **overrides: Any) -> tuple[MoRModel, MoRForCausalLM]:
    """A float64 model, and the same in the class for `transformers`."""
    model = tiny_model(kind, **overrides)
    return model, wrapped(model)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids of the tiny vocabulary."""
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of a batch that is padded on the left, with token 0."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }
