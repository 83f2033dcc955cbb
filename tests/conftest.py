"""Fixtures and options of the whole test suite.

Shape and type checks come from `make test` (`--jaxtyping-packages`), so nothing here imports mor.
"""

import os

import hypothesis
import pytest

from checked import check_less_often

FIRST = (
    "engine/test_engine_cpu.py",  # compiles the kernels, which the other worker then finds
    "engine/test_engine_machine.py::test_any_course_of_events",
    "engine/test_engine_triton.py",
    "ops/test_triton_kernels.py",
)
"""What takes longest, in the order in which workers are to begin it."""
RANDOM_IN_A_STRATEGY = "Do not use the `random` module inside strategies"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow, too")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the hypothesis profiles, before `--hypothesis-profile` is looked at."""
    if config.getoption("--jaxtyping-packages"):
        # beartype looks at a random item of a list, also where a strategy builds a config.
        config.addinivalue_line("filterwarnings", f"ignore:{RANDOM_IN_A_STRATEGY}")
        check_less_often()
    base = hypothesis.settings(deadline=None, derandomize=True, database=None)
    for name, most in (("default", 12), ("slow", 25), ("thorough", 250)):
        hypothesis.settings.register_profile(name, base, max_examples=most)
    hypothesis.settings.load_profile("slow" if config.getoption("--runslow") else "default")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is slow; deal the rest to the workers by file, so that each sets up once."""
    for item in items:
        place = next((first for first in FIRST if first in item.nodeid), item.nodeid.split("::")[0])
        item.add_marker(pytest.mark.xdist_group(place))
    items.sort(key=lambda item: _turn(item.nodeid))
    if config.getoption("--runslow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: give --runslow to run it"))


def _turn(name: str) -> int:
    """The place in FIRST, or behind all of them."""
    return next((i for i, first in enumerate(FIRST) if first in name), len(FIRST))


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread_per_worker() -> None:
    """Keep the workers of pytest-xdist from spinning on each other's cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)
