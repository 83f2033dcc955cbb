"""Finding and reading documents: every format, and every complaint with its file and line."""

import json
import os
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.data.sources import Document, SourceDocuments
from mor.errors import DataError, MissingExtraError

Texts = st.lists(st.text(min_size=1), min_size=1, max_size=8)


def read(*sources: Path, text_field: str = "text") -> list[tuple[str, str]]:
    documents = SourceDocuments(sources, text_field=text_field)
    return [(document.name, document.text) for document in documents]


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


# What can be read


@settings(deadline=None, max_examples=60)
@given(texts=Texts, ascii_only=st.booleans())
def test_json_lines_hold_any_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_only: bool
) -> None:
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    rows = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
    file.write_bytes("\n".join(rows).encode())  # without a line end after the last
    assert read(file) == [(f"a.jsonl:{n}", text) for n, text in enumerate(texts, start=1)]


@settings(deadline=None, max_examples=30)
@given(texts=Texts, cut=st.integers(0, 400))
def test_packed_lines_equal_plain_ones_in_any_number_of_frames(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    data = json_lines(texts)
    (folder / "a.jsonl").write_bytes(data)
    pack = zstandard.ZstdCompressor().compress
    (folder / "a.jsonl.zst").write_bytes(pack(data[:cut]) + pack(data[cut:]))
    plain, packed = read(folder / "a.jsonl"), read(folder / "a.jsonl.zst")
    assert [text for _, text in packed] == [text for _, text in plain] == texts


def test_packed_lines_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    texts = [os.urandom(150_000).hex(), "short", os.urandom(70_000).hex()]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(json_lines(texts)))
    assert [text for _, text in read(tmp_path)] == texts


def test_long_window_frames_are_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = packed.compress(json_lines(["far"])) + packed.flush()
    assert zstandard.get_frame_parameters(data).window_size == 2**27
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert read(tmp_path) == [("a.jsonl.zst:1", "far")]


def test_text_files_are_kept_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\nb\rc\n\n".encode())
    assert read(tmp_path) == [("a.txt", "\ufeffé\r\nb\rc\n\n")]


def test_folders_are_read_in_order_and_named_from_within(tmp_path: Path) -> None:
    (tmp_path / "b" / "inner").mkdir(parents=True)
    for name in ("z.TXT", "b/inner/m.md", "b/a.rst", "a.py"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "b" / "lines.jsonl").write_bytes(b'\n{"text": "one"}\n  \r\n{"text": "two"}')
    for name in ("image.png", "notes.json", "a.txt.zst", "lines.jsonl.gz"):
        (tmp_path / name).write_bytes(b"\xff")
    (tmp_path / "folder.txt").mkdir()
    expected = [
        ("a.py", "text of a.py"),
        ("b/a.rst", "text of b/a.rst"),
        ("b/inner/m.md", "text of b/inner/m.md"),
        ("b/lines.jsonl:2", "one"),
        ("b/lines.jsonl:4", "two"),
        ("z.TXT", "text of z.TXT"),
    ]
    assert read(tmp_path) == expected
    both = read(tmp_path / "z.TXT", tmp_path / "b")
    names = ["z.TXT", "a.rst", "inner/m.md", "lines.jsonl:2", "lines.jsonl:4"]
    assert [name for name, _ in both] == names


def test_documents_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    documents = SourceDocuments([tmp_path])
    assert list(documents) == list(documents) == [Document("a.txt", "a")]


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": 3}')
    assert read(tmp_path, text_field="content") == [("a.jsonl:1", "x")]


# What cannot


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not valid JSON .*each line must hold one JSON object"),
        (b"text", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'\xef\xbb\xbf{"text": "a"}', "not valid JSON .*BOM"),
        (b'["a"]', "value of type list: each line must hold one JSON object .*'text'"),
        (b'"a"', "value of type str"),
        (b"null", "value of type NoneType"),
        (b'{"texts": "a"}', "has no field 'text': set text_field .*did you mean 'texts'"),
        (b'{"title": "a", "zz": 1}', "has no field 'text'.*known keys: title, zz"),
        (b'{"text": 3}', "the field 'text' holds a value of type int: it must hold a string"),
        (b'{"text": null}', "value of type NoneType: it must hold a string"),
        (b'{"text": "\xe9"}', "not valid UTF-8 .byte 0xe9.*iconv"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str, packed: bool) -> None:
    data = b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n'
    file = tmp_path / ("a.jsonl.zst" if packed else "a.jsonl")
    file.write_bytes(zstandard.compress(data) if packed else data)
    with pytest.raises(DataError, match=rf"{file}, line 3: .*{message}"):
        read(file)


@pytest.mark.parametrize("escape", ["\\ud800", "\\udfff tail", "\\udc00\\ud800"])
def test_half_a_surrogate_pair_is_named(tmp_path: Path, escape: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "ok"}}\n{{"text": "{escape}"}}')
    with pytest.raises(DataError, match=r"document 'a\.jsonl:2': not valid Unicode"):
        read(tmp_path)


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\ntwo\ncaf\xe9\nfour")
    with pytest.raises(DataError, match=rf"{file}, line 3: not valid UTF-8 \(byte 0xe9.*iconv"):
        read(file)


@pytest.mark.parametrize("keep", [0.3, 0.9])
@pytest.mark.parametrize("num_frames", [1, 2])
def test_a_packed_file_that_is_cut_off_is_named(
    tmp_path: Path, keep: float, num_frames: int
) -> None:
    whole = zstandard.compress(json_lines(["whole"]))
    last = zstandard.compress(json_lines([f"{n} {n * n}" for n in range(1000)]))
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(whole * (num_frames - 1) + last[: int(keep * len(last))])
    with pytest.raises(DataError, match=rf"{file}: ends in the middle of a zstd frame"):
        read(file)


@pytest.mark.parametrize("prefix", [b"", zstandard.compress(b'{"text": "a"}\n')])
def test_a_file_that_is_not_packed_is_named(tmp_path: Path, prefix: bytes) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(prefix + b'{"text": "plain"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: not readable as zstd .*copy or pack"):
        read(tmp_path)


def test_zstandard_is_asked_for_only_when_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["plain"]))
    assert read(tmp_path) == [("a.jsonl:1", "plain")]
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b""))
    with pytest.raises(MissingExtraError, match=r"zstandard .*mixture-of-recursions\[data\]"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.csv", "a", "a.txt.zst", "a.zst", "a.arrow"])
def test_unknown_suffixes_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=rf"{name}: unknown suffix: files named \*\.txt.*rename"):
        read(tmp_path / name)


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: does not exist"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="sources: none given"):
        read()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder holds no text: files named \*\.txt"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_sources_without_text_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"a\.jsonl, .*b\.txt: no document has text"):
        read(tmp_path / "a.jsonl", tmp_path / "b.txt")


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x")
    documents = SourceDocuments([file])
    file.unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(No such file"):
        list(documents)
