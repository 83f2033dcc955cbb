"""Tokenizers: exact round trips, text that is only text, files that say what is wrong with them."""

import errno
import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from mor.errors import CapacityError, ConfigError, DataError
from mor.io.tokenizer import END_OF_TEXT, MIN_VOCAB_SIZE, TOKENIZER_FILE, Tokenizer

PROSE = [
    "The quick brown fox jumps over the lazy dog, and the dog lets it.\n",
    "def quick(fox: int) -> int:\n    return fox + 1\n",
    "Crème brûlée costs 7 €; 茶 is free. 😀\n",
] * 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(PROSE, 320)


def test_training_learns_merges_and_keeps_the_ids_in_range(tokenizer: Tokenizer) -> None:
    text = PROSE[0]
    ids = tokenizer.encode(text)
    assert MIN_VOCAB_SIZE < tokenizer.vocab_size <= 320
    assert len(ids) < len(text) / 2
    assert all(0 < token_id < tokenizer.vocab_size for token_id in ids)
    assert tokenizer.eos_id == 0


def test_training_is_deterministic() -> None:
    texts = [f"{a}{b} {b}{a}" for a in "abcdefgh" for b in "ijklmnop"]  # full of ties
    first, second = (Tokenizer.train(iter(texts), 400).to_json() for _ in range(2))
    assert first == second


def test_training_on_nothing_knows_every_byte() -> None:
    tokenizer = Tokenizer.train([], 300)
    assert tokenizer.vocab_size == MIN_VOCAB_SIZE
    assert len(tokenizer.encode("é€😀")) == len("é€😀".encode())


@pytest.mark.parametrize("vocab_size", [-1, 0, 256])
def test_vocabulary_without_room_for_the_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"vocab_size: {vocab_size} .*257"):
        Tokenizer.train(PROSE, vocab_size)


@settings(deadline=None, max_examples=150)
@given(st.text())
@example(END_OF_TEXT)
@example("\r\n\t \x00 \u2028\ufeff")
@example(" leading and trailing  ")
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert bool(ids) == bool(text)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(), max_size=8))
def test_a_batch_equals_its_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_the_name_of_the_end_of_text_is_plain_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert len(ids) > 3
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == f"a{END_OF_TEXT}b{END_OF_TEXT}"


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_pieces_join_to_the_text_of_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=100)
@given(st.text())
def test_pieces_join_to_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(tokenizer.pieces(tokenizer.encode(text))) == text


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    tokenizer = Tokenizer.train([], MIN_VOCAB_SIZE)  # every token is one byte
    assert tokenizer.pieces(tokenizer.encode("a€😀")) == ["a", "", "", "€", "", "", "", "😀"]
    assert tokenizer.pieces(tokenizer.encode("a€")[:-1]) == ["a", "", "\ufffd"]
    broken = [*tokenizer.encode("€")[:1], *tokenizer.encode("ab")]
    assert tokenizer.pieces(broken) == ["", "\ufffda", "b"]


def test_pieces_keep_spaces_that_a_decoder_strips_at_the_start() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"▁a": 0, "▁b": 1, "</s>": 2}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend)
    assert tokenizer.eos_id == 2
    assert tokenizer.decode([0, 1, 1, 0]) == "a b b a"
    assert tokenizer.pieces([0, 1, 1, 0]) == ["a", " b", " b", " a"]


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="text 1 is not valid Unicode"):
        tokenizer.encode_batch(["fine", "a\ud800"])
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("\udfff")
    with pytest.raises(DataError, match="not valid Unicode"):
        Tokenizer.train(["a\ud800"], 300)


@pytest.mark.parametrize("name", ["model", "model/special.json"])
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    file = tokenizer.save(tmp_path / name)
    assert file == (tmp_path / name if name.endswith(".json") else tmp_path / name / TOKENIZER_FILE)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    loaded = Tokenizer.load(tmp_path / name)
    text = f"The quick 茶 {END_OF_TEXT}"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, 0)


def test_loading_turns_off_truncation_and_padding(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    (tmp_path / TOKENIZER_FILE).write_text(backend.to_str())
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_batch(["x", PROSE[0]]) == tokenizer.encode_batch(["x", PROSE[0]])


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}/tokenizer\.json: there is no .*mor data"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=r"other\.json: there is no tokenizer here"):
        Tokenizer.load(tmp_path / "other.json")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b'{"model": 1}'])
def test_damaged_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / TOKENIZER_FILE).write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_truncated_tokenizer_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_FILE).write_text(tokenizer.to_json()[:-20])
    with pytest.raises(DataError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_empty_vocabulary_is_named(tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_FILE).write_text(tokenizers.Tokenizer(models.BPE()).to_str())
    with pytest.raises(DataError, match=r"tokenizer\.json: the vocabulary is empty"):
        Tokenizer.load(tmp_path)


def test_vocabulary_without_an_end_of_text_is_said() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 4}, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size == 5
    with pytest.raises(DataError, match=r"no end-of-text token.*<\|endoftext\|>"):
        _ = tokenizer.eos_id


def test_a_failed_save_keeps_the_old_file(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tokenizer.save(tmp_path)
    before = file.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match=r"tokenizer\.json: No space left"):
        Tokenizer.train([], 257).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [TOKENIZER_FILE]
    assert file.read_bytes() == before
    assert json.loads(before)["added_tokens"][0]["content"] == END_OF_TEXT


def test_saving_below_a_file_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        tokenizer.save(tmp_path / "file" / "folder")


def test_bytes_of_tokens_join_to_the_text() -> None:
    text = "naïve café 猫😀\x00\x7f\xad and so on"
    tokenizer = Tokenizer.train([text], 280)
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    every = {tokenizer.token_bytes(i) for i in range(1, 257)}
    assert every == {bytes([byte]) for byte in range(256)}
    assert tokenizer.token_bytes(0) == b"<|endoftext|>"
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.special_tokens == {"<|endoftext|>": 0}
