"""Fixtures and options of the whole test suite.

Shape and type checks come from `make test` (`--jaxtyping-packages`), so nothing here imports mor.
"""

import os

import hypothesis
import pytest

RANDOM_IN_A_STRATEGY = "Do not use the `random` module inside strategies"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow, too")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the hypothesis profiles, before `--hypothesis-profile` is looked at."""
    if config.getoption("--jaxtyping-packages"):
        # beartype looks at a random item of a list, also where a strategy builds a config.
        config.addinivalue_line("filterwarnings", f"ignore:{RANDOM_IN_A_STRATEGY}")
    default = hypothesis.settings(deadline=None, max_examples=25, derandomize=True, database=None)
    hypothesis.settings.register_profile("default", default)
    thorough = hypothesis.settings(default, max_examples=10 * default.max_examples)
    hypothesis.settings.register_profile("thorough", thorough)
    hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runslow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: give --runslow to run it"))


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread_per_worker() -> None:
    """Keep the workers of pytest-xdist from spinning on each other's cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)
