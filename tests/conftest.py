"""Fixtures and options of the whole test suite.

Shape and type checks come from `make test` (`--jaxtyping-packages`), so nothing here imports mor.
"""

import os

import hypothesis
import pytest

from checked import check_less_often

FIRST = (
    "test_engine_cpu.py",  # compiles the kernels, which the other worker then finds
    "test_trainer.py",
    "test_engine_machine.py",
    "test_engine_triton.py",
    "test_trainer_killed.py",
    "test_experiment_cli.py",
)
"""Files that take longest, in the order in which workers are to begin them."""
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
    base = hypothesis.settings(
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a neighbor's load is no fault
    )
    for name, maximum in (("default", 8), ("slow", 25), ("thorough", 250)):
        hypothesis.settings.register_profile(name, base, max_examples=maximum)
    hypothesis.settings.load_profile("slow" if config.getoption("--runslow") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest, skip what is slow."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else 99)
    if config.getoption("--runslow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: give --runslow to run it"))


@pytest.fixture(autouse=True)
def _one_torch_thread_per_worker() -> None:
    """Keep the workers of pytest-xdist from spinning on each other's cores.

    Before each test: the first compiled kernel has OpenMP take all cores, for torch as well.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)
