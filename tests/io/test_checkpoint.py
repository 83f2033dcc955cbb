"""Models on disk: the same bits back, damage that is named, and nothing lost on a full disk."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mor.errors import CapacityError, CheckpointError
from mor.io import checkpoint
from mor.io.checkpoint import CONFIG, GENERATION, WEIGHTS, load, load_config, resolve, save
from mor.io.tokenizer import TOKENIZER_FILE, Tokenizer
from mor.model.config import MoRConfig
from mor.model.transformer import MoRModel
from tiny import KINDS, build, configs, tiny_config, tiny_model

IDS = torch.arange(20).view(2, 10)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a small expert-choice model."""
    save(tiny_model("expert"), tmp_path / "model")
    return tmp_path / "model"


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind).to(dtype)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert not again.training
    assert again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after)
    for name, value in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], value), name
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@settings(max_examples=15)
@given(config=configs())
def test_any_config_comes_back(tmp_path_factory: pytest.TempPathFactory, config: MoRConfig) -> None:
    folder = tmp_path_factory.mktemp("any") / "model"
    model = build(config)
    save(model, folder)
    assert load_config(folder) == config
    assert torch.equal(load(folder)(IDS).logits, model(IDS).logits)


def test_dtype_can_be_asked_for(saved: Path) -> None:
    model = load(saved, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = load(saved).embed_tokens.weight
    assert torch.equal(model.embed_tokens.weight, exact.float())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["vanilla", "expert", "token"])
def test_tied_weights_are_one_storage_all_along(tmp_path: Path, kind: str, tied: bool) -> None:
    def is_one(model: MoRModel) -> bool:
        head, embedding = model.lm_head.weight, model.embed_tokens.weight
        assert (head.data_ptr() == embedding.data_ptr()) == (head is embedding)
        return head is embedding

    built = MoRModel(tiny_config(kind, tie_word_embeddings=tied))
    save(built, tmp_path / "model")
    loaded = load(tmp_path / "model")
    for model in (built, loaded, load(tmp_path / "model", dtype=torch.float64)):
        assert is_one(model) == tied
        assert is_one(model.to(torch.bfloat16)) == tied
        assert is_one(model.train().float().eval()) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model" / WEIGHTS)) != tied


@pytest.mark.parametrize("kind", ["recursive", "expert", "token"])
def test_the_block_is_stored_once_and_shared_by_all_depths(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    save(model, tmp_path / "model")
    names = load_file(tmp_path / "model" / WEIGHTS)
    assert sum("up_proj" in name for name in names) == model.config.num_unique_layers == 4
    again = load(tmp_path / "model")
    with torch.no_grad():  # one change must move every depth
        again.block[0].mlp.down_proj.weight.zero_()
        model.block[0].mlp.down_proj.weight.zero_()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_thresholds_survive(tmp_path: Path) -> None:
    model = tiny_model("expert")
    plain = model(IDS).recursion_counts
    model.set_thresholds((0.0, -1.123456789012345, 1e-17))
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config.thresholds == (0.0, -1.123456789012345, 1e-17)
    counts = again(IDS).recursion_counts
    assert torch.equal(counts, model(IDS).recursion_counts)
    assert not torch.equal(counts, plain)


def test_the_balancing_bias_survives(tmp_path: Path) -> None:
    model = tiny_model("token_loss_free")
    model.router.update_bias(torch.tensor([0.7, 0.1, 0.1, 0.1]))
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").router.bias, model.router.bias)
    assert model.router.bias.any()


def test_what_third_party_tools_read(saved: Path) -> None:
    values = json.loads((saved / CONFIG).read_text())
    assert (values["model_type"], values["architectures"]) == ("mor", ["MoRForCausalLM"])
    assert values["num_hidden_layers"] == 1 + 3 * 2 + 1
    assert values["dtype"] == "float64"
    save(tiny_model("vanilla", eos_token_id=3), saved)
    assert json.loads((saved / GENERATION).read_text()) == {"eos_token_id": 3}


# Damage


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    return folder


def test_a_missing_tensor_is_named(saved: Path) -> None:
    rewritten(saved, lambda state: state.pop("router.routers.1.proj.weight"))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} lacks 'router\.routers\.1\.proj\.wei"):
        load(saved)


def test_an_unexpected_tensor_is_named(saved: Path) -> None:
    rewritten(saved, lambda state: state.update(surprise=torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"holds 'surprise', for which .* no place"):
        load(saved)


def test_a_wrong_shape_is_named(saved: Path) -> None:
    rewritten(saved, lambda state: state.update({"norm.weight": torch.zeros(25)}))
    with pytest.raises(CheckpointError, match=r"'norm\.weight' has shape \(25,\), .* \(24,\)"):
        load(saved)


def test_an_empty_weights_file_is_named(saved: Path) -> None:
    rewritten(saved, lambda state: state.clear())
    with pytest.raises(CheckpointError, match=r"lacks 'embed_tokens\.weight'"):
        load(saved)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights_are_named(saved: Path, kept: float) -> None:
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} (is damaged|ends before the end of)"):
        load(saved)


def test_missing_weights_are_named(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=rf"has no {WEIGHTS}: the checkpoint is not complete"):
        load(saved)


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "mor",', b"\xff\xfe{}"])
def test_a_config_that_is_not_json_is_named(saved: Path, text: str | bytes) -> None:
    (saved / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=rf"{CONFIG} cannot be read"):
        load(saved)


@pytest.mark.parametrize(
    ("text", "kind"), [('{"model_type": "llama"}', "'llama'"), ("{}", "None"), ("[1]", "None")]
)
def test_another_kind_of_model_is_named(saved: Path, text: str, kind: str) -> None:
    (saved / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=rf"a model of type {kind}, not 'mor'"):
        load(saved)


def test_a_bad_field_in_the_config_is_named(saved: Path) -> None:
    good = json.loads((saved / CONFIG).read_text())
    for change, words in (
        ({"hiden_size": 3}, "'hiden_size' is unknown: did you mean 'hidden_size'"),
        ({"num_recursions": 2}, r"capacities=.* must hold num_recursions=2 numbers"),
        ({"gating": ["weighted"]}, "gating"),
    ):
        (saved / CONFIG).write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=rf"{CONFIG}: .*{words}"):
            load(saved)


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist: give a checkpoint's or"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds no model: .*{CONFIG}"):
        load(tmp_path)


# Runs


def test_a_run_stands_for_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    steps = tmp_path / "checkpoints"
    for step in (9, 10, 100):
        save(tiny_model("expert", seed=step), steps / f"step-{step:08d}")
    save(tiny_model("expert"), steps / ".step-00000200.tmp-4711")  # a killed process's staging
    (steps / "step-00000300").mkdir()
    (steps / "step-00000300" / WEIGHTS).write_bytes(b"half")
    assert resolve(tmp_path) == steps / "step-00000100"
    assert resolve(steps / "step-00000009") == steps / "step-00000009"
    expected = tiny_model("expert", seed=100).embed_tokens.weight
    assert torch.equal(load(tmp_path).embed_tokens.weight, expected)


def test_only_half_written_checkpoints_are_no_model(tmp_path: Path) -> None:
    save(tiny_model("expert"), tmp_path / "checkpoints" / ".step-00000200.tmp-4711")
    with pytest.raises(CheckpointError, match="nor a complete checkpoint"):
        load(tmp_path)


# Writing


def test_saving_over_a_checkpoint_keeps_other_files(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    (saved / "notes").mkdir()
    other = tiny_model("token")
    save(other, saved, Tokenizer.train(["some text"], 260))
    assert torch.equal(load(saved)(IDS).logits, other(IDS).logits)
    names = {CONFIG, WEIGHTS, GENERATION, TOKENIZER_FILE, "README.md", "notes"}
    assert {path.name for path in saved.iterdir()} == names
    assert (saved / "README.md").read_text() == "mine"
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_what_a_killed_save_left_is_no_hindrance(saved: Path) -> None:
    for leftover in (".new", "..new.tmp-4711"):
        (saved / leftover).mkdir()
        (saved / leftover / CONFIG).write_text("{half")
        (saved / leftover / "stray.bin").write_bytes(b"junk")
    other = tiny_model("token")
    save(other, saved)
    assert torch.equal(load(saved)(IDS).logits, other(IDS).logits)
    assert {path.name for path in saved.iterdir()} == {CONFIG, WEIGHTS, GENERATION}


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=rf"{target}: cannot be written"):
            save(tiny_model("vanilla"), target)
    assert (tmp_path / "file").read_text() == "mine"


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_in_rust(*args: object, **kwargs: object) -> None:
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


FULL_DISKS = [
    (checkpoint, "save_file", _full_in_rust),
    (Path, "write_text", _full),
    (os, "fsync", _full),  # some file systems say so only now
    (Path, "mkdir", _full),
]


@pytest.mark.parametrize(("place", "name", "full"), FULL_DISKS, ids=[n for _, n, _ in FULL_DISKS])
def test_a_full_disk_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, place: object, name: str, full: object
) -> None:
    before = contents(saved)
    monkeypatch.setattr(place, name, full)
    for target in (saved, saved.parent / "new"):
        with pytest.raises(CapacityError, match=rf"{target}: .*No space left.*: free some space"):
            save(tiny_model("token"), target)
    monkeypatch.undo()
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    save(tiny_model("token"), saved)
    assert load(saved).config.routing == "token_choice"


def test_another_failure_of_the_writer_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*os error 5"):
        save(tiny_model("vanilla"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
