"""The README's commands exist, its files are there, and its Python runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mor.cli.main import VERBS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    lines = "\n".join(blocks(path, "sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_first_lines_show_both_commands_and_a_picture() -> None:
    start = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    for words in ("make demo", "make test", "docs/img/report.png", "passed", "NLL, threshold"):
        assert words in start


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_commands_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for words in commands(path):
        if words[0] == "mor":
            assert words[1] in VERBS, words
        if words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= targets, words


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"(?<![\w/])((?:configs|src|tests|docs)/[\w./-]*\w)", text)
    for link in links:
        assert (path.parent / link).exists(), link
    for name in named:
        assert (ROOT / name).exists() or "NAME" in name, name


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor(")
    assert (tmp_path / "tiny-mor" / "model.safetensors").exists()
