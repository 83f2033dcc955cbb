"""A small corpus for all tests of the session."""

from pathlib import Path

import pytest

import run_helpers as runs
from peak import one_gemm_peak

__all__ = ["one_gemm_peak"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_corpus(tmp_path_factory.mktemp("runs") / "corpus")
