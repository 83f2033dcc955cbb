"""For tests that train: the rate of a matrix product is measured once, not in every run."""

from collections.abc import Iterator
from functools import cache

import pytest

from mor.train import throughput


@pytest.fixture(scope="session", autouse=True)
def one_gemm_peak() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "gemm_peak", cache(throughput.gemm_peak))
        yield
