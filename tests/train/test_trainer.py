"""Runs: stopping and resuming, accumulation, what is refused, what a failure leaves behind."""

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import run_helpers as runs
from mor.errors import CapacityError, CheckpointError, ConfigError, DataError
from mor.io import checkpoint
from mor.io.checkpoint import load, resolve
from mor.io.tokenizer import Tokenizer
from mor.model.router import TokenChoiceRouter
from mor.model.transformer import MoRModel
from mor.train import checkpoint as state
from mor.train.config import TrainConfig
from mor.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


def stop_after(step: int, seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Trainer's options that end a run after a step."""
    return {"on_step": seen.append, "should_stop": lambda: len(seen) >= step - 1}


# Stopping and resuming


@pytest.mark.parametrize("kind", ["vanilla", "expert", "loss_free", "random", "muon"])
def test_a_stopped_run_resumes_as_if_it_had_not_been(
    corpus: Path, tmp_path: Path, kind: str
) -> None:
    values = runs.settings(corpus, kind, keep_checkpoints=0, steps=14)
    runs.train(values, tmp_path / "whole")
    torch.rand(3)  # whatever else draws from the generator in between
    for stop in (1, 11):  # 11: after all warm-ups, where nothing would be saved by itself
        out, seen = tmp_path / f"stopped{stop}", list[dict[str, Any]]()
        trainer = Trainer(TrainConfig.from_dict(values), out, **stop_after(stop, seen))
        assert trainer.run() == "stopped"
        assert (trainer.step, max(steps_of(out))) == (stop, stop)
        torch.rand(stop)
        resumed = Trainer(TrainConfig.from_dict(values), out, resume="auto")
        assert resumed.step == stop
        assert resumed.run() == "finished"
        assert runs.result(out) == runs.result(tmp_path / "whole")


def test_resuming_from_a_checkpoint_by_name(corpus: Path, tmp_path: Path) -> None:
    """An earlier one only once the later ones are gone: two runs in one folder would mix."""
    values, out = runs.settings(corpus, keep_checkpoints=0, steps=12), tmp_path / "run"
    runs.train(values, out)
    whole = runs.result(out)
    assert steps_of(out) == [3, 6, 9, 12]
    earlier = str(out / "checkpoints" / "step-00000006")
    with pytest.raises(CheckpointError, match=r"after step-00000006, up to step-00000012"):
        Trainer(TrainConfig.from_dict(values), out, resume=earlier)
    assert runs.result(out) == whole
    for step in (9, 12):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    trainer = Trainer(TrainConfig.from_dict(values), out, resume=earlier)
    assert trainer.step == 6
    assert [row["step"] for row in runs.rows(out)] == [1, 2, 3, 4, 5, 6]
    trainer.run()
    assert runs.result(out) == whole


def test_what_a_run_leaves(corpus: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "run", list[dict[str, Any]]()
    values = runs.settings(corpus)
    trainer = runs.train(values, out, on_step=seen.append)
    assert steps_of(out) == [21, 24]
    assert [row["step"] for row in seen] == list(range(1, 25))
    assert [row["tokens"] for row in seen] == [64 * step for step in range(1, 25)]
    plain = json.loads(json.dumps(seen))
    assert [{k: v for k, v in r.items() if k not in runs.CLOCKS} for r in plain] == runs.rows(out)
    assert [r["step"] for r in seen if "nll_threshold" in r] == [5, 10, 15, 20, 24]
    assert all(set(runs.CLOCKS) <= set(row) for row in seen)
    model = load(out)
    assert model.config == trainer.model.config
    assert model.config.thresholds[1:] != (0.0, 0.0)
    assert model.config.vocab_size == Tokenizer.load(resolve(out)).vocab_size
    weights = trainer.model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [state.read_state(p).position for p in sorted(out.glob("checkpoints/*"))] == [84, 96]
    assert Trainer(TrainConfig.from_dict(values), out, resume="auto").run() == "finished"
    assert len(runs.rows(out)) == 24


def test_settings_that_do_not_matter_may_change(corpus: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    values = runs.settings(corpus, steps=12)
    runs.train(values, tmp_path, **stop_after(4, seen))
    free = {"eval_every": 0, "save_every": 5, "keep_checkpoints": 0, "verify_data": False}
    runs.train({**values, **free}, tmp_path, resume="auto")
    assert steps_of(tmp_path) == [3, 4, 5, 10, 12]


# Learning


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["vanilla", "expert", "token", "muon"])
def test_the_loss_falls(corpus: Path, tmp_path: Path, kind: str, precision: str) -> None:
    values = runs.settings(corpus, kind, steps=40, save_every=0, eval_every=0, precision=precision)
    trainer = runs.train(values, tmp_path)
    losses = [row["loss"] for row in runs.rows(tmp_path)]
    assert len(losses) == 40
    assert sum(losses[:3]) / 3 > 5
    assert sum(losses[-3:]) / 3 < 2.6
    assert steps_of(tmp_path) == [40]
    last = runs.rows(tmp_path)[-1]
    assert last["nll_threshold"] < 2.6
    assert sum(last["depth_histogram"]) == pytest.approx(1)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["vanilla", "expert", "unbalanced"])
def test_accumulating_equals_the_whole_batch(corpus: Path, tmp_path: Path, kind: str) -> None:
    values = runs.settings(corpus, "token" if kind == "unbalanced" else kind, steps=4)
    if kind == "unbalanced":  # a balancing loss is no mean over sequences
        values["model"] = {**values["model"], "balancing": "none"}
    for micro in (4, 2, 1):
        runs.train({**values, "micro_batch_size": micro}, tmp_path / str(micro))
    whole = runs.rows(tmp_path / "4")
    for micro in ("2", "1"):
        for row, expected in zip(runs.rows(tmp_path / micro), whole, strict=True):
            assert row.keys() == expected.keys()
            for name in {"loss", "grad_norm", "sampling_loss"} & row.keys():
                assert row[name] == pytest.approx(expected[name], rel=1e-4)
    assert whole[-1]["loss"] < whole[0]["loss"]


def test_balancing_sees_the_fractions_of_the_whole_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: dict[int, list[tuple[torch.Tensor, float]]] = {4: [], 1: []}
    for micro, seen in updates.items():
        spy = lambda self, *args, seen=seen: seen.append(args)  # noqa: E731
        monkeypatch.setattr(TokenChoiceRouter, "update_bias", spy)
        values = runs.settings(corpus, "loss_free", steps=2, micro_batch_size=micro)
        runs.train(values, tmp_path / str(micro))
    assert len(updates[1]) == len(updates[4]) == 2
    torch.testing.assert_close(updates[1][0], updates[4][0])
    assert float(updates[4][0][0].sum()) == pytest.approx(1)
    assert [strength for _, strength in updates[4]] == [0.1, 0.2]  # of a warm-up of ten steps


def test_starting_from_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """The same model goes on; a recursive one starts from a vanilla one's layers."""
    plain = {**runs.MODEL, **runs.KINDS["vanilla"], "num_block_layers": 2}
    plain |= {"num_prelude_layers": 0, "num_coda_layers": 0}
    first = runs.train(runs.settings(corpus, model=plain), tmp_path / "first")
    values = runs.settings(corpus, model={}, init_from=str(tmp_path / "first"))
    trainer = Trainer(TrainConfig.from_dict(values), tmp_path / "same")
    assert trainer.model.config == first.model.config
    weights = first.model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in trainer.model.state_dict().items())
    assert (trainer.step, trainer.run()) == (0, "finished")
    assert runs.rows(tmp_path / "same")[0]["loss"] < runs.rows(tmp_path / "first")[0]["loss"] / 2
    recursive = {**plain, "num_recursions": 2, "num_block_layers": 1, "routing": "expert_choice"}
    values = runs.settings(corpus, model=recursive, init_from=str(tmp_path / "first"), init="upper")
    model = Trainer(TrainConfig.from_dict(values), tmp_path / "recursive").model
    assert (model.config.num_recursions, model.config.twin_num_layers) == (2, 2)
    ours, theirs = model.block[0].mlp.up_proj.weight, first.model.block[1].mlp.up_proj.weight
    assert torch.equal(ours, theirs)


# Refusals


@pytest.fixture(scope="module")
def stopped_once(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    out, seen = tmp_path_factory.mktemp("stopped") / "run", list[dict[str, Any]]()
    values = runs.settings(corpus, steps=9)
    runs.train(values, out, **stop_after(4, seen))
    return values, out


@pytest.fixture
def stopped(
    stopped_once: tuple[dict[str, Any], Path], tmp_path: Path
) -> tuple[dict[str, Any], Path]:
    """The settings of a run of 9 steps and its folder, with checkpoints of steps 3 and 4."""
    values, out = stopped_once
    return values, shutil.copytree(out, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.02}, r"trained with lr=0\.01, now lr=0\.02; give the old value"),
        ({"seed": 1}, "seed=0, now seed=1"),
        ({"batch_size": 2}, "batch_size=4, now batch_size=2"),
        ({"model": {**runs.MODEL, "num_recursions": 2}}, "trained with model="),
    ],
)
def test_resuming_with_other_settings_is_refused(
    stopped: tuple[dict[str, Any], Path], change: dict[str, Any], words: str
) -> None:
    values, out = stopped
    before = runs.rows(out), (out / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=words):
        Trainer(TrainConfig.from_dict({**values, **change}), out, resume="auto")
    assert (runs.rows(out), (out / "config.yaml").read_bytes()) == before


def test_a_run_is_not_overwritten(stopped: tuple[dict[str, Any], Path]) -> None:
    values, out = stopped
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=rf"{out} holds a run .*step-00000004.*--resume auto"):
        Trainer(TrainConfig.from_dict(values), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_half_written_checkpoints_are_ignored_and_cleared(
    stopped: tuple[dict[str, Any], Path],
) -> None:
    values, out = stopped
    newest = out / "checkpoints" / "step-00000004"
    for step in (6, 9):
        shutil.copytree(newest, out / "checkpoints" / f".step-{step:08d}.tmp-4711")
    half = out / "checkpoints" / ".step-00000009.tmp-4711" / "model.safetensors"
    half.write_bytes(half.read_bytes()[:100])
    trainer = Trainer(TrainConfig.from_dict(values), out, resume="auto")
    assert trainer.step == 4
    trainer.run()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000009",
    ]


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_training_state_is_named(
    stopped: tuple[dict[str, Any], Path], damage: bytes | None
) -> None:
    values, out = stopped
    file = out / "checkpoints" / "step-00000004" / state.STATE_FILE
    file.write_bytes(file.read_bytes()[:5000] if damage is None else damage)
    with pytest.raises(CheckpointError, match=rf"{file} is damaged \(\w+\): remove {file.parent}"):
        Trainer(TrainConfig.from_dict(values), out, resume="auto")
    shutil.rmtree(file.parent)  # as the message says
    assert Trainer(TrainConfig.from_dict(values), out, resume="auto").step == 3


def test_a_model_without_a_training_state_is_named(
    stopped: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    values, out = stopped
    checkpoint.save(load(out), tmp_path / "model")
    for place, words in (("model", "has no training_state"), ("nowhere", "does not exist")):
        with pytest.raises(CheckpointError, match=words):
            Trainer(TrainConfig.from_dict(values), out, resume=str(tmp_path / place))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"device": "tpu9"}, ConfigError, r"device='tpu9' is unknown: use auto, cpu or cuda"),
        ({"data": "/nowhere"}, DataError, r"/nowhere: there is no corpus here"),
        ({"sequence_length": 33}, ConfigError, r"sequence_length=33 .*max_position_embeddings=32"),
        ({"model": {"vocab_size": 64}}, ConfigError, r"vocab_size=64 is less than the 311 entries"),
        ({"model": {"hiden_size": 64}}, ConfigError, r"'hiden_size' is unknown"),
        ({"init_from": "nowhere"}, CheckpointError, r"nowhere does not exist"),
    ],
)
def test_a_run_that_cannot_work_is_refused_and_leaves_nothing(
    corpus: Path, tmp_path: Path, change: dict[str, Any], kind: type[Exception], words: str
) -> None:
    values = runs.settings(corpus)
    merged = {**values, **change}
    if "model" in change:
        merged["model"] = {**values["model"], **change["model"]}
    with pytest.raises(kind, match=words):
        Trainer(TrainConfig.from_dict(merged), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Failures


def test_a_loss_that_is_no_number_names_the_last_good_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = [], MoRModel.forward

    def breaks(self: MoRModel, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            calls.append(1)
            if len(calls) == 8:
                self.norm.weight.data.fill_(math.nan)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MoRModel, "forward", breaks)
    words = rf"nan at step 8: the last good checkpoint is {tmp_path}.*step-00000006; try a lower lr"
    with pytest.raises(ConfigError, match=words):
        runs.train(runs.settings(corpus), tmp_path)
    assert steps_of(tmp_path) == [3, 6]
    assert all(torch.isfinite(p).all() for p in load(tmp_path).parameters())
    assert [row["step"] for row in runs.rows(tmp_path)] == list(range(1, 8))


def test_a_wild_learning_rate_ends_with_a_word_and_not_with_a_broken_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    values = runs.settings(corpus, lr=1e30, clip=0.0, save_every=1, warmup_fraction=0.0)
    with pytest.raises(ConfigError, match=r"(loss|gradient) became .* try a lower lr \(now 1e\+30"):
        runs.train(values, tmp_path)
    assert all(torch.isfinite(p).all() for p in load(tmp_path).parameters())


def test_a_gradient_that_is_no_number_never_reaches_the_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The language-model loss is fine, but an auxiliary loss broke: nothing of it is saved."""
    calls, scaled = [], MoRModel.scaled_aux_loss

    def breaks(self: MoRModel, losses: dict[str, torch.Tensor]) -> Any:
        calls.append(1)
        return scaled(self, losses) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(MoRModel, "scaled_aux_loss", breaks)
    with pytest.raises(ConfigError, match=r"gradient.* became nan at step 6: .*step-00000003"):
        runs.train(runs.settings(corpus), tmp_path)
    assert steps_of(tmp_path) == [3]


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_in_rust(*args: object, **kwargs: object) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def _full_in_torch(*args: object, **kwargs: object) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize(
    ("place", "name", "full"),
    [
        (checkpoint, "save_file", _full_in_rust),
        (torch, "save", _full_in_torch),
        (torch, "save", _full),
        (os, "fsync", _full),
    ],
)
def test_a_full_disk_leaves_earlier_checkpoints(
    stopped: tuple[dict[str, Any], Path],
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    full: Any,
) -> None:
    values, out = stopped
    trainer = Trainer(TrainConfig.from_dict(values), out, resume="auto")
    with monkeypatch.context() as patched:
        patched.setattr(place, name, full)
        with pytest.raises(CapacityError, match=r"step-00000006: .*: free some space"):
            trainer.run()
    assert steps_of(out) == [3, 4]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]
    resumed = Trainer(TrainConfig.from_dict(values), out, resume="auto")
    assert (resumed.step, resumed.run()) == (4, "finished")
    assert steps_of(out) == [6, 9]
