"""Fixtures of all tests that read a corpus or train: `tests/data`, `tests/train`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import run_helpers as runs


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, written once."""
    return runs.write_corpus(tmp_path_factory.mktemp("runs") / "corpus")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in a fixed order, so that two runs can be equal to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
