"""glibc's allocator keeps or returns freed memory, as it is told."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

from mor.ops.malloc import retain_freed_memory


def printed_by(script: str) -> list[int]:
    """The numbers that a fresh process prints, with glibc's malloc as it comes."""
    env = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_stays_with_the_process() -> None:
    """A tensor after a larger one costs no new pages.

    One of the same size may: the heap has room for it only when nothing small came to lie behind
    the freed one, which even the size of the environment decides.
    """
    script = (
        "import resource, torch; from mor.ops.malloc import retain_freed_memory\n"
        "def faults():\n"
        "    torch.ones(2**24)\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(10 * 2**20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first, again = faults(), faults(); assert retain_freed_memory()\n"
        "print(first, again, faults(), faults())"
    )
    first, again, *kept = printed_by(script)
    assert again > first / 2
    assert max(kept) < again / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_can_be_given_back_at_once() -> None:
    """Every tensor costs its pages again, also one of the size of one that was freed."""
    script = (
        "import resource, torch; from mor.ops.malloc import return_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(4 * 2**20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "assert return_freed_memory(); print(*(faults() for _ in range(4)))"
    )
    faults = printed_by(script)
    assert min(faults) > max(faults) / 2 > 1


class OtherAllocator:
    """glibc's options next to a malloc that is not glibc's."""

    def __init__(self, address: int | None) -> None:
        self.mallopt, self.free = Mock(return_value=1), Mock()
        self.malloc, self.mallinfo = Mock(return_value=address), Mock()
        self.mallinfo.return_value.in_use = 7


@pytest.mark.parametrize("address", [1, None])
def test_another_allocator_is_not_said_to_keep_memory(
    address: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = OtherAllocator(address)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    assert not retain_freed_memory()
    library.free.assert_called_once_with(address)


def test_a_library_without_the_options_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not retain_freed_memory()
