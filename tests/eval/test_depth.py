"""Depths of tokens: histograms, means, and who goes deep."""

from collections import defaultdict

import pytest
import torch

from mor.eval.depth import (
    TokenDepth,
    depth_histogram,
    extremes,
    mean_recursions,
    recursion_counts,
    tokens_by_depth,
)
from mor.io.tokenizer import Tokenizer
from tiny import tiny_model

TOKENIZER = Tokenizer.train(["def return while 🙂 " * 5], 280)
VOCAB = TOKENIZER.vocab_size


def token(number: int, mean: float, occurrences: int) -> TokenDepth:
    return TokenDepth(
        token_id=number, piece=str(number), mean_recursions=mean, occurrences=occurrences
    )


def test_a_histogram_has_a_place_for_every_count() -> None:
    assert depth_histogram([1, 3, 3, 2], 3) == (0, 0.25, 0.25, 0.5)
    assert depth_histogram([0, 2], 2) == (0.5, 0, 0.5)
    assert depth_histogram([], 2) == (0, 0, 0)
    with pytest.raises(IndexError):
        depth_histogram([4], 3)


def test_the_mean_weighs_counts_by_their_shares() -> None:
    counts = [1, 3, 3, 2, 0]
    assert mean_recursions(depth_histogram(counts, 3)) == pytest.approx(sum(counts) / 5)
    assert mean_recursions((0, 0, 0)) == 0


def test_tokens_have_the_mean_of_their_counts() -> None:
    model = tiny_model("expert", vocab_size=VOCAB)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 40, (size, 25), generator=generator) for size in (3, 1, 2)]
    counts = defaultdict[int, list[int]](list)
    for batch in batches:
        out = model(batch[:, :-1], selection="threshold")
        pairs = zip(batch[:, :-1].flatten(), out.recursion_counts.flatten(), strict=True)
        for token_id, count in pairs:
            counts[int(token_id)].append(int(count))

    found = tokens_by_depth(model, TOKENIZER, batches)
    assert {t.token_id for t in found} == set(counts)
    for t in found:
        assert t.occurrences == len(counts[t.token_id])
        assert t.mean_recursions == pytest.approx(sum(counts[t.token_id]) / t.occurrences)
        assert t.piece == TOKENIZER.decode([t.token_id])
    means = [t.mean_recursions for t in found]
    assert means == sorted(means, reverse=True)
    assert len(set(means)) > 1


def test_one_sequence_has_the_counts_of_the_model() -> None:
    model = tiny_model("expert")
    ids = torch.arange(30)[None] % 61
    expected = model(ids, selection="threshold").recursion_counts[0].tolist()
    model.train()
    assert recursion_counts(model, ids[0].tolist()) == expected
    assert len(set(expected)) > 1
    assert model.training, "left as it was"
    tokens_by_depth(model, TOKENIZER, [])
    assert model.training, "left as it was"


def test_extremes_leave_rare_tokens_out_and_name_none_twice() -> None:
    tokens = [token(0, 3.0, 1), token(1, 2.5, 9), token(2, 2.5, 20), token(3, 1.5, 6)]
    tokens += [token(4, 1.0, 5), token(5, 1.0, 50), token(6, 1.0, 4)]
    deep, shallow = extremes(tokens, 2, min_occurrences=5)
    assert [t.token_id for t in deep] == [2, 1]
    assert [t.token_id for t in shallow] == [5, 4]
    deep, shallow = extremes(tokens, 20, min_occurrences=5)
    assert [t.token_id for t in deep] == [2, 1, 3]
    assert [t.token_id for t in shallow] == [5, 4]
    assert extremes(tokens, 3, min_occurrences=99) == ([], [])
    assert extremes(tokens[1:2], 3, min_occurrences=1) == ([tokens[1]], [])
