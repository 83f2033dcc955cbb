"""The share of a training step that reading its batch from shards takes.

A corpus of random tokens is written into a temporary folder, in several shards, and read as
training reads it: shuffled windows, a batch at a time, one corpus or a mixture of three. The file
cache is warm, as it is for any corpus that fits into memory.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mor.bench.timing import timed
from mor.bench.train_ab import Comparison, Stepper
from mor.data.batches import Batches, TokenShards
from mor.data.mixture import MixedBatches
from mor.data.shards import INDEX_FILE, CorpusIndex, ShardWriter

BAR = 0.01
"""Share of a step's time that reading its batch may take at most."""
_TOKENS, _SHARDS, _DOCUMENT = 2**21, 4, 700
_READS = 50  # batches that are read for each step that is timed: one takes too little time


def write_random_corpus(folder: Path, vocab_size: int, tokens: int = _TOKENS) -> Path:
    """A corpus whose training split is random tokens, and whose validation split is empty."""
    folder.mkdir(parents=True)
    index, draw = CorpusIndex(vocab_size, 0, {}), np.random.default_rng(0)
    with ShardWriter(folder, "train", index, tokens // _SHARDS) as writer:
        for _ in range(0, tokens, _DOCUMENT):
            writer.write(draw.integers(1, vocab_size, _DOCUMENT - 1), ends_document=True)
    index = CorpusIndex(vocab_size, 0, {"train": tuple(writer.shards), "valid": ()})
    (folder / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")
    return folder


def measure(comparison: Comparison, *, rounds: int) -> dict[str, Any]:
    """Time steps of the comparison's model A and reads of its batches, in turns; a JSON object."""
    size, length = comparison.batch_size, comparison.sequence_length
    stepper = Stepper(comparison.a, size, length)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_random_corpus(Path(folder) / "corpus", comparison.a.vocab_size)
        shards = TokenShards.open(corpus)
        parts = [
            Batches(shards, sequence_length=length, batch_size=size, seed=0, stream=stream)
            for stream in range(3)
        ]
        mixture = MixedBatches(parts, [3, 2, 1], batch_size=size, seed=0)
        stepper.step()
        reads: dict[str, list[float]] = {"corpus": [], "mixture": []}
        steps: list[float] = []
        for number in range(rounds):
            steps.append(timed(stepper.step))
            for name, at in (("corpus", parts[0].at), ("mixture", mixture.at)):
                reads[name].append(_read_s(at, number * _READS, stepper.batch.device))
    step_s = statistics.median(steps)
    read_s = {name: statistics.median(values) for name, values in reads.items()}
    shares = {name: value / step_s for name, value in read_s.items()}
    return {
        "name": comparison.name,
        "step_s": step_s,
        "read_s": read_s,
        "data_share": shares,
        "data_bar": BAR,
        "data_ok": max(shares.values()) <= BAR,
    }


def _read_s(at: Callable[[int], torch.Tensor], first: int, device: torch.device) -> float:
    """Seconds that reading a batch and copying it to the device takes, mean of `_READS`."""

    def read() -> None:
        for index in range(first, first + _READS):
            at(index).to(device)

    return timed(read) / _READS
