"""Reading shards takes next to nothing of a step, and the measurement would see it if it did."""

import json
import time
from pathlib import Path

import pytest
import torch

from mor.bench import data_loading as data_share
from mor.bench.train_ab import Comparison
from mor.data.batches import Batches, TokenShards
from mor.model.config import MoRConfig
from tiny import tiny_config


def comparison(config: MoRConfig, size: int, length: int) -> Comparison:
    shape = {"batch_size": size, "sequence_length": length, "time_bar": 1.1, "memory_bar": None}
    return Comparison(name="here", a=config, b=config, **shape)


def test_reading_takes_less_than_a_hundredth_of_a_step() -> None:
    """Of the demo's model, whose steps are the shortest that anybody trains with.

    Three tries: a busy neighbor may take the core from the one and not from the other.
    """
    demo = MoRConfig.preset("demo", num_recursions=3, vocab_size=4096)
    for _ in range(3):
        result = data_share.measure(comparison(demo, 4, 256), rounds=3)
        json.dumps(result)
        assert result["data_share"].keys() == {"corpus", "mixture"}
        if result["data_ok"]:
            break
    assert result["data_ok"], result


def test_slow_reading_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    window = TokenShards.window

    def slow(self: TokenShards, start: int, length: int) -> object:
        time.sleep(0.001)
        return window(self, start, length)

    monkeypatch.setattr(TokenShards, "window", slow)
    monkeypatch.setattr(data_share, "_READS", 2)
    config = tiny_config("expert", vocab_size=64)
    result = data_share.measure(comparison(config, 4, 16), rounds=1)
    assert min(result["read_s"].values()) >= 0.004
    assert not result["data_ok"]


def test_the_corpus_is_one_that_training_reads(tmp_path: Path) -> None:
    folder = data_share.write_random_corpus(tmp_path / "corpus", 70_000, tokens=20_000)
    shards = TokenShards.open(folder, verify=True)
    assert shards.num_tokens >= 20_000
    assert shards.num_documents == -(-20_000 // 700)
    assert len(list(folder.glob("*.bin"))) == 4
    batches = Batches(shards, sequence_length=64, batch_size=8, seed=0)
    assert not torch.equal(batches.at(0), batches.at(1))
