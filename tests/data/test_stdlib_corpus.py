"""The standard library as text: a fixed order, tests left out, an error where there is none."""

from itertools import islice
from pathlib import Path

import pytest

from mor.data.stdlib_corpus import stdlib_documents
from mor.errors import DataError


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def test_order_goes_by_path_and_not_by_creation(tmp_path: Path) -> None:
    names = ["b.py", "a/z.py", "a/b.py", "c.py", "a.py"]
    one = write(tmp_path / "one", {name: f"# {name}\n" for name in names})
    other = write(tmp_path / "other", {name: f"# {name}\n" for name in reversed(names)})
    documents = list(stdlib_documents(one))
    assert documents == list(stdlib_documents(other))
    assert [d.name for d in documents] == ["a/b.py", "a/z.py", "a.py", "b.py", "c.py"]
    assert [d.text for d in documents] == [f"# {d.name}\n" for d in documents]


def test_tests_and_foreign_code_are_left_out(tmp_path: Path) -> None:
    kept = ["json/decoder.py", "unittest/case.py", "testing.py", "doctest.py"]
    dropped = [
        "test/test_json.py",
        "json/tests/test_decoder.py",
        "idlelib/idle_test/test_run.py",
        "site-packages/torch/nn.py",
        "lib2to3/pgen.py",
        "turtledemo/clock.py",
        "json/__pycache__/decoder.py",
    ]
    root = write(tmp_path, dict.fromkeys([*kept, *dropped], "x = 1\n"))
    assert sorted(d.name for d in stdlib_documents(root)) == sorted(kept)


def test_what_is_no_text_is_passed_over(tmp_path: Path) -> None:
    files = {"latin.py": b"# caf\xe9\n", "empty.py": "", "blank.py": " \n\n", "notes.txt": "x"}
    root = write(tmp_path, {**files, "good.py": "# café\n"})
    (root / "folder.py").mkdir()
    (root / "broken.py").symlink_to(root / "nowhere.py")
    documents = list(stdlib_documents(root))
    assert [(d.name, d.text) for d in documents] == [("good.py", "# café\n")]


@pytest.mark.parametrize("files", [{}, {"notes.txt": "x"}, {"test/a.py": "x = 1"}, {"a.py": ""}])
def test_an_interpreter_without_source_is_named(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    with pytest.raises(DataError, match=rf"{tmp_path} holds no Python source: .*mor data build"):
        list(stdlib_documents(tmp_path))


def test_this_interpreters_library() -> None:
    first = list(islice(stdlib_documents(), 40))
    assert first == list(islice(stdlib_documents(), 40))
    names = [d.name for d in first]
    assert names[0] == "__future__.py"
    assert "argparse.py" in names
    assert not any("test" in name.split("/") for name in names)
    assert "import" in first[names.index("argparse.py")].text
