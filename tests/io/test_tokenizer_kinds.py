"""Any tokenizer.json: texts come back, and no piece of a stream is half a character."""

from collections.abc import Callable
from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mor.io.detokenizer import IncrementalDetokenizer
from mor.io.tokenizer import Tokenizer

SAMPLE = "the cat sat on the mat; naïve café 猫が座った 😀🎉 the cat\n"
TEXT = st.text(st.one_of(st.sampled_from(SAMPLE), st.characters(codec="utf-8")), max_size=40)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def byte_level() -> Tokenizer:
    return Tokenizer.train([SAMPLE * 3], 300)


def byte_fallback() -> Tokenizer:
    """Like Llama's: words begin with an underline, unknown characters are bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    words += sorted(set("the cat sat on mat;") - {" "})
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "t"), ("c", "at")]
    words += ["".join(merge) for merge in merges]
    vocabulary = {word: i for i, word in enumerate(words)}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


def word_piece() -> Tokenizer:
    """Like BERT's: it loses blanks and unknown words, so only decoding is told of."""
    words = ["[UNK]", "the", "cat", "sat", "on", "mat", ";", "##s", "##t", "caf", "##é", "猫", "😀"]
    piece = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(piece)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return Tokenizer(backend)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "word_piece": word_piece,
}


@cache
def tokenizer(kind: str) -> Tokenizer:
    return KINDS[kind]()


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=TEXT)
def test_texts_come_back_byte_for_byte(kind: str, text: str) -> None:
    words = tokenizer(kind)
    again = Tokenizer(tokenizers.Tokenizer.from_str(words.to_json()))
    text = text.replace("\u2581", "_")  # stands for a blank in the second kind
    assert words.decode(words.encode(text)) == text
    assert again.encode(text) == words.encode(text)


@pytest.mark.parametrize("kind", KINDS)
@given(before=TEXT, text=TEXT)
def test_a_stream_gives_whole_characters_that_join_to_the_text(
    kind: str, before: str, text: str
) -> None:
    words = tokenizer(kind)
    context, ids = words.encode(before), words.encode(text)
    stream = IncrementalDetokenizer(words, context)
    pieces = [stream.push(token) for token in ids]
    broken = [piece for piece in pieces if REPLACEMENT in piece]
    assert not broken or REPLACEMENT in before + text
    last = stream.flush()
    whole = words.decode([*context, *ids])
    assert whole == words.decode(context) + "".join(pieces) + last
    assert "".join(words.pieces(ids)) == words.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_comes_with_its_last_token(kind: str) -> None:
    words = tokenizer(kind)
    ids = words.encode("𝄞")
    assert len(ids) > 3
    stream = IncrementalDetokenizer(words, words.encode("the"))
    pieces = [stream.push(token) for token in ids]
    assert pieces[-1].endswith("𝄞")
    assert not any(pieces[-4:-1])
