"""Cached machine code never outlives the sources that it was compiled from."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

from mor.ops.cpu.code_cache import STAMP, drop_stale_code


def test_code_of_other_sources_is_dropped_once(tmp_path: Path) -> None:
    sources = [tmp_path / "a.py", tmp_path / "b.py"]
    for source in sources:
        source.write_text("x = 1")
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("a.f.nbi", "a.f.1.nbc", "other.pyc"):
        (cache / name).write_text("code")
    assert drop_stale_code(cache, sources)  # from who knows which sources
    assert sorted(path.name for path in cache.iterdir()) == [STAMP, "other.pyc"]
    (cache / "a.f.nbi").write_text("code")
    assert not drop_stale_code(cache, reversed(sources))
    assert (cache / "a.f.nbi").exists()
    sources[1].write_text("x = 2")
    assert drop_stale_code(cache, sources)
    assert not (cache / "a.f.nbi").exists()


def test_a_cache_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    assert not drop_stale_code(tmp_path / "missing", [])


def test_a_change_in_a_called_file_reaches_its_callers(tmp_path: Path) -> None:
    """What Numba alone does not do: the caller's machine code holds that of the called function."""
    (tmp_path / "inner.py").write_text(
        "from numba import njit\n@njit(cache=True)\ndef f():\n    return 1\n"
    )
    (tmp_path / "outside.py").write_text(
        "from numba import njit\nfrom inner import f\n@njit(cache=True)\ndef g():\n    return f()\n"
    )
    script = dedent(
        """
        import sys
        from pathlib import Path
        from mor.ops.cpu.code_cache import drop_stale_code
        import outside
        folder = Path(outside.__file__).parent
        drop_stale_code(Path(outside.g.stats.cache_path), folder.glob("*.py"))
        print(outside.g())
        """
    )

    def run() -> str:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run() == "1"
    inner = tmp_path / "inner.py"
    inner.write_text(inner.read_text().replace("return 1", "return 2"))
    assert run() == "2"
