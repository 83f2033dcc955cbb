"""What `import mor` offers, and what importing any part of it does not load."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from syntax import read_sources

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("transformers", "pyarrow", "fastapi", "lm_eval", "matplotlib", "zstandard")
# Their modules are written with FastAPI and with transformers; whoever uses these imports them.
WRITTEN_WITH_EXTRAS = ("mor.serve.", "mor.io.hf.")
PROMISED = frozenset(("MoRConfig", "MoRModel", "load", "save"))
# Runs in a fresh interpreter. `Watch` also sees an import of an extra that is not installed here.
IMPORT_EVERYTHING = """
import importlib, json, sys, traceback

modules, extras, written = json.loads(sys.argv[1])
written = tuple(written)
asked = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in extras:
            frame = sys._getframe(1)
            while frame.f_globals.get("__name__", "").startswith("importlib"):
                frame = frame.f_back
            module = frame.f_globals.get("__name__", "")
            if module.split(".")[0] == "mor" and not f"{module}.".startswith(written):
                asked.append(f"{module} imports {name}")

sys.meta_path.insert(0, Watch())
failed = {}
loaded = None
for module in sorted(modules, key=lambda module: f"{module}.".startswith(written)):
    if f"{module}.".startswith(written) and loaded is None:
        loaded = [name for name in extras if name in sys.modules]
    try:
        importlib.import_module(module)
    except BaseException:
        failed[module] = traceback.format_exc()
import mor
names = list(getattr(mor, "__all__", []))
print(json.dumps({
    "failed": failed,
    "asked": asked,
    "loaded": loaded,
    "all": names,
    "missing": [name for name in names if not hasattr(mor, name)],
}))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Import every module of mor in one fresh interpreter and report what happened."""
    modules = [source.module for source in read_sources(ROOT, "src/mor")]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    argument = json.dumps(
        [[m for m in modules if not m.endswith("__main__")], EXTRAS, WRITTEN_WITH_EXTRAS]
    )
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, argument],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_every_module_imports(report: dict[str, Any]) -> None:
    assert not report["failed"], "\n".join(report["failed"].values())


def test_importing_loads_no_extra(report: dict[str, Any]) -> None:
    assert report["asked"] == []
    assert report["loaded"] == []


def test_the_public_names_are_sorted_and_resolve(report: dict[str, Any]) -> None:
    kind = {name: 2 - name[0].isupper() - name.isupper() for name in report["all"]}  # as ruff sorts
    assert report["all"] == sorted(report["all"], key=lambda name: (kind[name], name))
    assert report["missing"] == []
    assert set(report["all"]) >= PROMISED
