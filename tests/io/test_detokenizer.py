"""Text as it comes: never half a character, nothing of a stop text, nothing lost."""

from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from mor.io.detokenizer import StopDetokenizer
from mor.io.tokenizer import Tokenizer

SAMPLE = "the cat sat on the mat, the cat ate; naïve café. " * 3 + "猫が座った。😀🎉 " * 2
# A space and the first byte of a sign are a token here: it holds a whole character and a third.
SIGNS = " ".join(chr(0x2600 + n) for n in range(160))
TEXTS = st.text(
    st.sampled_from("the cat sonm,;. é猫が😀🎉\ufffd\u0301\n") | st.characters(codec="utf-8")
)


@cache
def trained() -> Tokenizer:
    return Tokenizer.train([SAMPLE, SIGNS], 320)


def feed(stream: StopDetokenizer, ids: list[int]) -> list[str]:
    """What comes out, the flush at the end included; stops where the stream stops."""
    deltas: list[str] = []
    for token in ids:
        deltas.append(stream.push(token))
        if stream.stopped:
            break
    deltas.append(stream.flush())
    assert "".join(deltas) == stream.text
    return deltas


@given(text=TEXTS)
def test_any_text_comes_through(text: str) -> None:
    assert "".join(feed(StopDetokenizer(trained()), trained().encode(text))) == text


@given(ids=st.lists(st.integers(0, 319) | st.integers(128, 256), max_size=30))
def test_any_tokens_come_through(ids: list[int]) -> None:
    assert "".join(feed(StopDetokenizer(trained()), ids)) == trained().decode(ids)


@given(text=TEXTS, more=TEXTS)
def test_text_goes_on_after_a_prompt(text: str, more: str) -> None:
    tokenizer = trained()
    before = tokenizer.encode(text)
    assert "".join(feed(StopDetokenizer(tokenizer, (), before), tokenizer.encode(more))) == more


def test_a_character_comes_when_it_is_whole() -> None:
    ids = trained().encode("a🦊é")
    assert len(ids) > 4  # the fox takes several tokens
    deltas = feed(StopDetokenizer(trained()), ids)
    assert "🦊" in deltas
    assert not any("\ufffd" in delta for delta in deltas)


def test_a_decoder_that_drops_the_first_space() -> None:
    vocab = {"▁the": 0, "▁cat": 1, "s": 2, "<0xC3>": 3, "<0xA9>": 4, "<unk>": 5}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    tokenizer = Tokenizer(backend)
    assert feed(StopDetokenizer(tokenizer), [1, 2, 3, 4, 0]) == ["cat", "s", "", "é", " the", ""]
    assert feed(StopDetokenizer(tokenizer, (), [0]), [1, 3, 4, 2]) == [" cat", "", "é", "s", ""]


def test_half_a_character_at_the_end_is_shown_as_broken() -> None:
    ids = trained().encode("a🦊")[:-1]
    deltas = feed(StopDetokenizer(trained()), ids)
    assert "".join(deltas) == trained().decode(ids) == "a\ufffd"
    assert deltas[-1] == "\ufffd"


def expected(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text up to a stop text, looked for after each piece in all that there is."""
    text = ""
    for piece in pieces:
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], True
    return text, False


@given(
    text=st.text("abc é猫\n", max_size=30),
    stops=st.lists(st.text("abc é猫\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_texts_end_the_text(text: str, stops: list[str]) -> None:
    ids = trained().encode(text)
    stream = StopDetokenizer(trained(), tuple(stops))
    feed(stream, ids)
    assert (stream.text, stream.stopped) == expected(trained().pieces(ids), tuple(stops))
    assert not any(stop in stream.text for stop in stops)


def test_a_stop_text_may_span_tokens() -> None:
    ids = trained().encode("the cat sat on")
    stream = StopDetokenizer(trained(), ("at sat",))
    deltas = [stream.push(token) for token in ids if not stream.stopped]
    assert len(deltas) < len(ids)
    assert (stream.text, stream.stopped, stream.flush()) == ("the c", True, "")


def test_what_could_become_a_stop_text_is_held_back() -> None:
    stream = StopDetokenizer(trained(), ("at z",))
    deltas = [stream.push(token) for token in trained().encode("the cat")]
    assert "".join(deltas) == "the c"
    assert "".join(stream.push(token) for token in trained().encode(" sat")) == "at s"
    assert stream.flush() == "at"
    assert (stream.text, stream.stopped) == ("the cat sat", False)


@pytest.mark.parametrize("stop", [" ", "e "])
def test_a_stop_text_before_half_a_character_is_not_part_of_the_text(stop: str) -> None:
    tokenizer = trained()
    half = tokenizer.encode(" \u2600")[0]
    assert tokenizer.decode([half]) == " \ufffd"
    stream = StopDetokenizer(tokenizer, (stop,))
    feed(stream, [*tokenizer.encode("mate"), half])
    assert stream.stopped
    assert stream.text == "mate".removesuffix(stop.strip())
