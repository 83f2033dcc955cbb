"""One tiny trained run that the tests of all verbs look at, and a way to call `mor` in-process."""

import random
from pathlib import Path

import pytest
import torch
from cli_helpers import Called, Mor, TinyRun, invoke

from mor import MoRConfig, MoRModel, Tokenizer, save
from peak import one_gemm_peak

__all__ = ["one_gemm_peak"]

WORDS = ("def", "return", "数学", "über", "café", "🙂", "while", "print", "self", "import", "value")
CONFIG = """\
model:
  hidden_size: 32
  intermediate_size: 64
  num_attention_heads: 4
  num_key_value_heads: 2
  max_position_embeddings: 64
  num_block_layers: 1
  num_recursions: 2
data: {data}
sequence_length: 32
batch_size: 4
steps: {steps}
lr: 1.0e-2
eval_every: 3
eval_windows: 4
calibration_windows: 2
device: cpu
"""


@pytest.fixture
def mor(capsys: pytest.CaptureFixture[str]) -> Mor:
    """Call `mor` in this process, and see what it prints."""

    def call(*args: object) -> Called:
        capsys.readouterr()
        status = invoke(*args)
        return Called(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Text, its corpus, and a run of six steps on it."""
    root = tmp_path_factory.mktemp("tiny")
    text, corpus, config, run = root / "text", root / "corpus", root / "tiny.yaml", root / "run"
    text.mkdir()
    draw = random.Random(0)
    for number in range(30):
        words = " ".join(draw.choice(WORDS) for _ in range(100))
        (text / f"{number:02}.txt").write_text(words + "\n", encoding="utf-8")
    build = ("data", "build", text, "--out", corpus, "--train-tokenizer", 300)
    assert invoke(*build, "--valid-fraction", 0.2) == 0
    config.write_text(CONFIG.format(data=corpus, steps=6))
    assert invoke("train", config, "--out", run) == 0
    return TinyRun(text, corpus, config, run)


def untrained(tiny: TinyRun, **fields: object) -> MoRModel:
    """A model of the run's size and vocabulary."""
    torch.manual_seed(0)
    values = {
        "vocab_size": Tokenizer.load(tiny.corpus).vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "num_block_layers": 1,
    }
    return MoRModel(MoRConfig.from_dict({**values, **fields}))


@pytest.fixture(scope="session")
def zero_head(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vanilla checkpoint whose logits are all 0: greedily it says id 0, the end of text."""
    model = untrained(tiny, num_recursions=1, routing="none", tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    folder = tmp_path_factory.mktemp("zero") / "model"
    save(model, folder, Tokenizer.load(tiny.corpus))
    return folder


@pytest.fixture(scope="session")
def scattered(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random routing: one, two and three recursions in every text."""
    folder = tmp_path_factory.mktemp("scattered") / "model"
    save(untrained(tiny, router_type="random"), folder, Tokenizer.load(tiny.corpus))
    return folder
