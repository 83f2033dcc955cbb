"""`mor convert`: what it writes, what it says, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_helpers import Mor, one_sentence
from golden import Golden, files

import mor as package

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama without a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_from_llama(mor: Mor, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said, err = mor("convert", "from-llama", llama, "--out", out, "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    assert f"{out}: vanilla" in said
    assert "no tokenizer.json" in said
    assert package.load(out).embed_tokens.weight.dtype == torch.bfloat16


def test_from_llama_to_a_recursive_model(mor: Mor, llama: Path, tmp_path: Path) -> None:
    options = ("--num-recursions", 2, "--sharing", "cycle", "--init", "average", "--kv-strategy")
    more = ("shared", "--model.router_alpha", "0.5", "--num-block-layers", 2)
    called = mor("convert", "from-llama", llama, "--out", tmp_path / "out", *options, *more)
    assert called.status == 0, called.err
    assert "mor train CONFIG --init_from" in called.out
    config = package.load(tmp_path / "out").config
    assert (config.num_recursions, config.num_block_layers, config.kv_strategy) == (2, 2, "shared")
    assert (config.router_alpha, config.routing) == (0.5, "expert_choice")


def test_from_llama_to_a_relaxed_model(mor: Mor, llama: Path, tmp_path: Path) -> None:
    options = ("--num-recursions", 2, "--routing", "none", "--relaxation-rank", 3)
    called = mor("convert", "from-llama", llama, "--out", tmp_path / "out", *options)
    assert called.status == 0, called.err
    model = package.load(tmp_path / "out")
    assert model.config.relaxation_rank == 3
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in called.out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| rank of each depth's LoRA pairs | 3 |" in card
    assert "LoRA pairs of rank 3" in mor("info", tmp_path / "out").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--relaxation-rank", "4"), "relaxation_rank needs num_recursions >= 2"),
        (("--relaxation-rank", "17", "--num-recursions", "2"), "at most hidden_size=16"),
        (("--init", "average"), "--num-recursions of 2 or more"),
        (("--init", "averaged", "--num-recursions", "2"), "did you mean 'average'"),
        (("--sharing", "middle", "--num-recursions", "2"), "--sharing=middle is unknown"),
        (("--dtype", "fp32"), "--dtype=fp32 is unknown"),
        (("--model.num_block", "2", "--num-recursions", "2"), "'num_block' is unknown"),
        (("--model.routing",), "--model.routing needs a value"),
    ],
)
def test_what_cannot_work(
    mor: Mor, llama: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    called = mor("convert", "from-llama", llama, "--out", tmp_path / "out", *options)
    assert message in one_sentence(called, 1)
    assert not (tmp_path / "out").exists()


def test_push(mor: Mor, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    class Hub:
        """Stands in for HfApi."""

        def __init__(self, token: str | None) -> None:
            assert token is None

        def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
            asked.update(repository=repository, private=private, exist_ok=exist_ok)

        def upload_folder(self, **options: Any) -> Any:
            asked.update(options)
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr(hub, "HfApi", Hub)
    assert mor("convert", "from-llama", llama, "--out", tmp_path / "out").status == 0
    called = mor("push", tmp_path / "out", "me/small", "--private", "--message", "First")
    assert (called.status, called.out, called.err) == (0, "https://hub/commit/1\n", "")
    assert (asked["repository"], asked["private"]) == ("me/small", True)
    assert (asked["folder_path"], asked["commit_message"]) == (tmp_path / "out", "First")
    assert "does not exist" in one_sentence(mor("push", tmp_path / "none", "me/small"), 1)


def test_verbs_and_help(mor: Mor) -> None:
    assert "from-llama" in mor("convert").out
    assert "did you mean 'from-llama'" in one_sentence(mor("convert", "from-lama"), 2)
    assert "--num-recursions" in mor("convert", "from-llama", "--help").out


def test_from_official(mor: Mor, tmp_path: Path) -> None:
    golden = Golden.read(next(p for p in files() if "token_r3_middle_cycle_soft" in p.stem))
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(golden.under("weight."), folder / "pytorch_model.bin")
    (tmp_path / "llama.json").write_text(json.dumps(golden.llama))
    (tmp_path / "mor.yaml").write_text(yaml.safe_dump(golden.cfg))
    places = ("--config", tmp_path / "mor.yaml", "--llama-config", tmp_path / "llama.json")
    called = mor("convert", "from-official", folder, "--out", tmp_path / "out", *places)
    assert (called.status, called.err) == (0, "")
    assert "routing token_choice" in called.out
    assert package.load(tmp_path / "out").config.num_recursions == 3


def test_to_hf(mor: Mor, llama: Path, tmp_path: Path) -> None:
    ours, out = tmp_path / "ours", tmp_path / "out"
    assert mor("convert", "from-llama", llama, "--out", ours).status == 0
    status, said, err = mor("convert", "to-hf", ours, "--out", out, "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    assert "trust_remote_code=True" in said
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "modeling_mor.py").is_file()
    assert "exists: choose a new folder" in one_sentence(
        mor("convert", "to-hf", ours, "--out", out), 1
    )
    assert "--dtype=fp8 is unknown" in one_sentence(
        mor("convert", "to-hf", ours, "--out", tmp_path / "new", "--dtype", "fp8"), 1
    )
