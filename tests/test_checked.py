"""What `make test` checks at run time: types everywhere, axes where they are named."""

import dataclasses

import pytest
import torch

from mor.engine.pages import PagePool
from mor.model.ragged_batch import RaggedBatch

CALLS = {
    "a type": lambda: PagePool("x"),
    "a type next to a name that comes later": lambda: RaggedBatch.full("x", 2, torch.device("cpu")),
    "a number of axes": lambda: RaggedBatch.full(2, 3, torch.device("cpu")).to_padded(
        torch.zeros(6, 2)
    ),
    "axes that must agree": lambda: dataclasses.replace(
        RaggedBatch.full(2, 3, torch.device("cpu")), positions=torch.zeros(4, dtype=torch.long)
    ),
}


@pytest.mark.parametrize("wrong", CALLS)
def test_what_is_wrong_is_noticed(wrong: str, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--jaxtyping-packages"):
        pytest.skip("needs --jaxtyping-packages, which `make test` gives")
    with pytest.raises(Exception, match=r"violates type hint|Type-check error"):
        CALLS[wrong]()
