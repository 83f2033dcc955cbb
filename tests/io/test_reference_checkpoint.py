"""Checkpoints of the reference implementation on disk, every variant of the golden files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden import Golden, files
from safetensors.torch import save_file

import mor
from mor.errors import CheckpointError, ConfigError, MorError
from mor.io.reference_checkpoint import convert_official, from_official
from mor.io.tokenizer import Tokenizer

PATHS = list(files())


def published(golden: Golden, folder: Path, form: str = "bin") -> Path:
    """The folder that its authors would publish."""
    folder.mkdir()
    state = golden.under("weight.")
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(golden.llama))
    (folder / "config.yaml").write_text(yaml.safe_dump({**golden.cfg, "save_dir": "${root}/x"}))
    return folder


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_every_variant_converts_and_loads(tmp_path: Path, path: Path, form: str) -> None:
    golden = Golden.read(path)
    convert_official(published(golden, tmp_path / "theirs", form), tmp_path / "ours")
    model = mor.load(tmp_path / "ours")
    wanted = golden.tensors["eval_logits"]
    with torch.no_grad():
        got = model(golden.tensors["input_ids"], selection="topk").logits
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    reference = from_official(golden.under("weight."), golden.llama, golden.cfg)
    assert model.config == reference.config
    tied = "lm_head.weight" not in golden.under("weight.")
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    golden = Golden.read(next(p for p in PATHS if "auxloss" in p.stem))
    return published(golden, tmp_path / "theirs")


class Runs:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("1 + 1",)


def check_refused(folder: Path, message: str, kind: type[MorError], **options: Any) -> None:
    """Converting raises an error that says so, and leaves nothing behind."""
    with pytest.raises(kind, match=re.escape(message)):
        convert_official(folder, folder.parent / "ours", **options)
    assert not (folder.parent / "ours").exists()


def test_unsafe_pickles_are_refused(theirs: Path) -> None:
    state = torch.load(theirs / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "extra": Runs()}, theirs / "pytorch_model.bin")
    check_refused(theirs, "would run code", CheckpointError)


def test_wrong_parameters_are_named(theirs: Path) -> None:
    name = "model.layers.2.mor_router.router.weight"
    state = torch.load(theirs / "pytorch_model.bin", weights_only=True)
    torch.save({k: v for k, v in state.items() if k != name}, theirs / "pytorch_model.bin")
    check_refused(theirs, "router.routers.1.proj.weight", CheckpointError)


def test_what_is_missing_is_named(theirs: Path, tmp_path: Path) -> None:
    (theirs / "other.yml").write_text("a: 1")
    check_refused(theirs, "config.yaml, other.yml as YAML", CheckpointError)
    check_refused(theirs, "no.yaml", ConfigError, config=theirs / "no.yaml")
    (theirs / "config.json").rename(tmp_path / "llama.json")
    options = {"config": theirs / "config.yaml"}
    check_refused(theirs, "config.json is missing", CheckpointError, **options)
    check_refused(tmp_path / "none", "is no folder", CheckpointError, **options)
    words = Tokenizer.train(["some words"], 257)
    words.save(tmp_path / "words")
    options |= {"llama_config": tmp_path / "llama.json", "tokenizer": tmp_path / "words"}
    check_refused(theirs, "they do not belong together", CheckpointError, **options)
    convert_official(theirs, tmp_path / "ours", **{**options, "tokenizer": None})
    assert mor.load(tmp_path / "ours").config.routing == "expert_choice"


def test_rope_scaling_is_refused(theirs: Path) -> None:
    config = json.loads((theirs / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0}
    (theirs / "config.json").write_text(json.dumps(config))
    check_refused(theirs, "RoPE scaling 'llama3'", CheckpointError)
