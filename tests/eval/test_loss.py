"""Loss on text: windows are those of a corpus, bytes those of the text."""

import json
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mor.data.batches import TokenShards, sequential_windows
from mor.data.corpus import build_from_documents
from mor.data.sources import Document
from mor.errors import ConfigError, DataError
from mor.eval.loss import (
    TextLoss,
    batched,
    check_length,
    check_vocabulary,
    evaluate_windows,
    perplexity,
    text_windows,
)
from mor.io.tokenizer import Tokenizer
from mor.model.transformer import MoRModel
from mor.train.evaluate import evaluate
from tiny import tiny_model

TEXTS = ("def 数学(x): return x * 2\n", "", "🙂🙂🙂 über " * 9, "a", "while True:\n\tpass\n" * 5)
DOCUMENTS = [Document(str(number), text) for number, text in enumerate(TEXTS)]
TOKENIZER = Tokenizer.train(TEXTS, 290)
VOCAB = TOKENIZER.vocab_size


def evaluate_text(
    model: MoRModel,
    documents: Iterable[Document],
    *,
    sequence_length: int | None = None,
    max_windows: int | None = None,
) -> TextLoss:
    """Loss on documents, as `mor eval` computes it for a file of text."""
    length = sequence_length or model.config.max_position_embeddings
    windows = islice(text_windows(TOKENIZER, documents, length), max_windows)
    return evaluate_windows(model, TOKENIZER, batched(windows))


@pytest.mark.parametrize("length", [1, 7, 32])
def test_windows_are_those_of_the_corpus(tmp_path: Path, length: int) -> None:
    file = TOKENIZER.save(tmp_path)
    build_from_documents(DOCUMENTS, tmp_path / "corpus", tokenizer=file, valid_fraction=0)
    expected = list(sequential_windows(TokenShards.open(tmp_path / "corpus"), length))
    found = list(text_windows(TOKENIZER, DOCUMENTS, length))
    assert len(found) > 1
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))


def test_a_short_text_is_one_window_of_its_own_length() -> None:
    (window,) = text_windows(TOKENIZER, [Document("a", "hello")], 1000)
    assert window.tolist() == [*TOKENIZER.encode("hello"), TOKENIZER.eos_id]
    assert list(text_windows(TOKENIZER, [Document("a", "")], 1000)) == []


def test_a_window_needs_a_length() -> None:
    with pytest.raises(ConfigError, match="sequence_length=0"):
        list(text_windows(TOKENIZER, DOCUMENTS, 0))


def test_batches_hold_all_windows_in_order() -> None:
    windows = [np.arange(n, n + 5) for n in range(10)]
    batches = list(batched(windows, batch_tokens=17))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert torch.cat(batches)[:, 0].tolist() == list(range(10))
    assert [len(batch) for batch in batched(windows, batch_tokens=1)] == [1] * 10


def test_bytes_are_those_of_the_predicted_text_whatever_the_windows() -> None:
    model = tiny_model("expert", vocab_size=VOCAB)
    total = sum(len(text.encode()) for text in TEXTS)
    first = len(TOKENIZER.decode(TOKENIZER.encode(TEXTS[0])[:1]).encode())  # input only
    for length, batch_tokens in ((1, 8), (1, 8192)):
        windows = text_windows(TOKENIZER, DOCUMENTS, length)
        loss = evaluate_windows(model, TOKENIZER, batched(windows, batch_tokens))
        assert loss.num_bytes == total - first
        assert loss.num_windows == loss.evaluation.tokens


def test_a_uniform_model_knows_its_bits_per_byte() -> None:
    model = tiny_model("vanilla", vocab_size=VOCAB, tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    loss = evaluate_text(model, DOCUMENTS, sequence_length=8)
    found = loss.as_dict()
    assert found["nll_topk"] == pytest.approx(math.log(VOCAB))
    assert found["perplexity_threshold"] == pytest.approx(VOCAB)
    bits = found["tokens"] * math.log2(VOCAB) / found["bytes"]
    assert found["bits_per_byte_topk"] == pytest.approx(bits)
    assert (found["nll_gap"], found["mean_recursions"], loss.mean_recursions) == (0, 1, 1)
    assert json.loads(json.dumps(found)).keys() == found.keys()


def test_text_is_evaluated_like_its_windows() -> None:
    model = tiny_model("expert", vocab_size=VOCAB)
    windows = list(batched(text_windows(TOKENIZER, DOCUMENTS, 16)))
    expected = evaluate(model, windows)
    loss = evaluate_text(model, DOCUMENTS, sequence_length=16)
    assert loss.evaluation == expected
    assert expected.nll_topk != expected.nll_threshold
    assert loss.as_dict()["nll_gap"] == expected.nll_threshold - expected.nll_topk
    means = sum(n * share for n, share in enumerate(expected.depth_histogram))
    assert 1 < loss.mean_recursions == pytest.approx(means)
    one = evaluate_text(model, DOCUMENTS, sequence_length=16, max_windows=1)
    assert (one.num_windows, one.evaluation.tokens) == (1, 16)


def test_without_a_length_windows_are_as_long_as_the_model_takes() -> None:
    model = tiny_model("expert", vocab_size=VOCAB, max_position_embeddings=24)
    assert evaluate_text(model, DOCUMENTS, max_windows=1).evaluation.tokens == 24


def test_no_text_is_an_error() -> None:
    model = tiny_model("expert", vocab_size=VOCAB)
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate_text(model, [Document("a", "")])


def test_perplexity_ends_in_infinity() -> None:
    assert perplexity(0) == 1
    assert perplexity(1e6) == math.inf


def test_what_does_not_fit_is_named() -> None:
    model = tiny_model("expert", vocab_size=VOCAB)
    for length in (0, 97):
        with pytest.raises(ConfigError, match=f"sequence_length={length} .*=96"):
            check_length(model, length)
    check_length(model, 96)
    with pytest.raises(DataError, match=f"data/x: .*{VOCAB + 1} .*vocab_size={VOCAB}"):
        check_vocabulary(model, VOCAB + 1, "data/x")
    check_vocabulary(model, VOCAB, "data/x")
