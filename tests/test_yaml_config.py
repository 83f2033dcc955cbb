"""YAML in and out: one mapping, errors that name file and line, merging key by key."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.errors import ConfigError
from mor.yaml_config import dump_yaml, merge, read_yaml

Scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
Plain = st.recursive(
    Scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
Mappings = st.dictionaries(st.text(), Plain, max_size=5)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("yaml") / "config.yaml"


@given(values=Mappings)
def test_what_is_written_is_read(file: Path, values: dict[str, Any]) -> None:
    file.write_text(dump_yaml(values), encoding="utf-8")
    again = read_yaml(file)
    assert again == values
    assert list(again) == list(values)


def test_a_file_by_hand(file: Path) -> None:
    file.write_text(
        "# a run\nmodel:\n  preset: 360m\n  capacities: [1.0, 0.5]\nsteps: 10\nlr: 3.0e-3\n"
    )
    assert read_yaml(file) == {
        "model": {"preset": "360m", "capacities": [1.0, 0.5]},
        "steps": 10,
        "lr": 0.003,
    }


def test_tuples_and_paths_become_plain() -> None:
    text = dump_yaml({"out": Path("runs/a"), "deep": {"table": (1.0, (2, 3))}, "none": None})
    assert text == "out: runs/a\ndeep:\n  table:\n  - 1.0\n  - - 2\n    - 3\nnone: null\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", r"config\.yaml line 3: "),
        ("a: 1\n\tb: 2\n", r"config\.yaml line 2: found character '\\t'"),
        ("a: b: c\n", r"config\.yaml line 1: mapping values are not allowed here"),
        ("a: !!python/object:os.system x\n", r"config\.yaml line 1: could not determine"),
        ("", r"must hold a mapping of keys to values, not None"),
        ("- a\n- b\n", r"must hold a mapping of keys to values, not \['a', 'b'\]"),
        ("just text\n", r"must hold a mapping of keys to values, not 'just text'"),
        ("steps: 1\n3: 4\n", r"config\.yaml: the key 3 must be text"),
        ("a: \x07\n", r"config\.yaml: not valid YAML"),
    ],
)
def test_a_broken_file_is_named_with_its_line(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_yaml(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"cannot read {tmp_path}/no\.yaml: No such file"):
        read_yaml(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match=rf"cannot read {tmp_path}: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"bytes\.yaml is not UTF-8 text \(byte 6\)"):
        read_yaml(tmp_path / "bytes.yaml")


def test_merging_goes_key_by_key() -> None:
    base = {"model": {"preset": "360m", "deep": {"a": 1}}, "steps": 10}
    over = {"model": {"deep": {"b": 2}, "preset": "135m"}, "lr": 0.1}
    merged = merge(base, over)
    assert merged == {
        "model": {"preset": "135m", "deep": {"a": 1, "b": 2}},
        "steps": 10,
        "lr": 0.1,
    }
    assert merge({"model": {"a": 1}}, {"model": None}) == {"model": None}
    assert merge({"model": 3}, {"model": {"a": 1}}) == {"model": {"a": 1}}
    assert merge({"a": [1, 2]}, {"a": [3]}) == {"a": [3]}


@given(base=Mappings, over=Mappings)
def test_merging_changes_neither_side_and_the_later_wins(
    base: dict[str, Any], over: dict[str, Any]
) -> None:
    before = dump_yaml(base), dump_yaml(over)
    merged = merge(base, over)
    assert (dump_yaml(base), dump_yaml(over)) == before
    assert set(merged) == set(base) | set(over)
    assert merge(base, {}) == base
    assert merge({}, over) == over
    assert merge(merged, over) == merged
    for key, value in over.items():
        if not isinstance(value, dict) or not isinstance(base.get(key), dict):
            assert merged[key] == value
