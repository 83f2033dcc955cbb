"""`mor bench eval`: both sides score the same items alike."""

import json
from pathlib import Path

import pytest
import torch

from mor.bench.harness import measure
from mor.io.llama import convert_llama
from mor.io.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval, datasets and what they import


@pytest.mark.slow
def test_both_sides_have_the_same_scores(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat"], 300)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save(tmp_path / "llama")
    convert_llama(tmp_path / "llama", tmp_path / "ours")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(names))
    pairs = [{"good": f"the cat {i}", "bad": f"cat the {i}"} for i in range(6)]
    items = [{"query": f"the {i}", "choices": ["cat", "mat", "sat"], "gold": 1} for i in range(6)]
    for name, rows in (("blimp", pairs), ("hellaswag", items)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measure(
        str(tmp_path / "ours"),
        str(tmp_path / "llama"),
        tmp_path,
        {"blimp": 5, "hellaswag": 4},
        2,
        1,
    )
    assert found["ratio"] > 0
    assert found["scores"]["mor"]["blimp"]["acc"] == found["scores"]["hf"]["blimp"]["acc"]
    for metric in ("acc", "acc_norm"):
        ours, theirs = (found["scores"][side]["hellaswag"][metric] for side in ("mor", "hf"))
        assert ours == theirs
