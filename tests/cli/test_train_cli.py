"""`mor train`: runs, resumes, stops when asked to, and says what is wrong."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from cli_helpers import Mor, TinyRun, one_sentence, start

from mor import load


def rows(run: Path) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_run_holds_what_it_should(tiny: TinyRun) -> None:
    found = rows(tiny.run)
    assert [row["step"] for row in found] == list(range(1, 7))
    assert [row["step"] for row in found if "nll_threshold" in row] == [3, 6]
    assert found[-1]["loss"] < found[0]["loss"]
    assert load(tiny.run).config.num_recursions == 2
    assert (tiny.run / "config.yaml").is_file()


def test_lines_for_a_pipe(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    status, out, err = mor("train", tiny.config, "--out", tmp_path / "run", "--steps", 3)
    assert (status, err) == (0, "")
    assert "step 1/3  loss " in out
    assert "step 3  NLL topk " in out
    assert out.splitlines()[-1].startswith(f"finished: {tmp_path / 'run'}. Next: `mor generate ")
    assert "\x1b" not in out
    values = (tmp_path / "run" / "config.yaml").read_text()
    assert "steps: 3" in values


def test_options_override_the_file(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--steps=1", "--model.num_recursions", "3", "--model.hidden_size=16", "--lr", "1e-3")
    assert mor("train", tiny.config, "--out", run, *options).status == 0
    config = load(run).config
    assert (config.num_recursions, config.hidden_size) == (3, 16)
    assert rows(run)[-1]["lr"] == pytest.approx(1e-3)


def test_budget_and_mixture_from_the_command_line(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mixture = f"[{{path: {tiny.corpus}, weight: 2}}, {{path: {tiny.corpus}}}]"
    options = ("--budget", "2 steps", "--data", mixture, "--lr", "1e-3")
    assert mor("train", tiny.config, "--out", run, *options).status == 0
    assert [row["step"] for row in rows(run)] == [1, 2]
    assert mor("eval", run, "--max-windows", 4).out.startswith(
        f"{run} on {tiny.corpus} + {tiny.corpus} (valid)\n4 windows of "
    )
    message = one_sentence(mor("train", tiny.config, "--out", run, "--budget", "2"), status=1)
    assert "budget=2 must be an amount with a unit, such as '300 steps'" in message


def test_a_finished_run_is_left_alone(mor: Mor, tiny: TinyRun) -> None:
    before = (tiny.run / "metrics.jsonl").read_bytes()
    called = mor("train", tiny.config, "--out", tiny.run, "--resume", "auto")
    assert called.status == 0
    assert called.out == f"{tiny.run} is finished: 6 of 6 steps.\n"
    message = one_sentence(mor("train", tiny.config, "--out", tiny.run), status=1)
    assert "--resume auto" in message
    assert (tiny.run / "metrics.jsonl").read_bytes() == before


def test_an_interrupted_run_saves_and_resumes(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("--eval_every", 0, "--save_every", 0)
    args = ("train", tiny.config, "--out", run, "--steps", 1_000_000, *settings)
    with start(*args) as process:
        deadline = time.monotonic() + 100
        while not rows(run) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "stopping after this step; saving ...\n")
    done = rows(run)[-1]["step"]
    assert f"stopped and saved after step {done} of 1000000" in out
    assert f"--out {run} --resume auto" in out
    assert (run / "checkpoints" / f"step-{done:08.0f}" / "model.safetensors").is_file()
    wrong = mor("train", tiny.config, "--out", run, "--resume", "auto")
    assert "steps=1000000" in one_sentence(wrong, status=1)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--stepz", 3], 2, ["--stepz", "did you mean '--steps'?"]),
        (["--model.num_recursion", 3], 1, ["did you mean 'num_recursions'?"]),
        (["--model.num_recursions"], 1, ["--model.num_recursions", "value"]),
        (["--steps", "many"], 1, ["steps='many'", "int"]),
        (["--steps", 2.5], 1, ["steps=2.5", "int"]),
        (["--lr", -1], 1, ["lr=-1", "> 0"]),
        (["--schedule", "linear"], 1, ["schedule='linear'", "did you mean 'cosine'?"]),
        (["--micro_batch_size", 3], 1, ["batch_size=4", "micro_batch_size=3"]),
        (["--sequence_length", 65], 1, ["sequence_length=65", "64"]),
        (["--device", "tpu"], 1, ["'tpu'"]),
        (["--data", "no/such/corpus"], 1, ["no/such/corpus", "mor data build"]),
        (["--resume", "no/such/checkpoint"], 1, ["no/such/checkpoint"]),
        (["--model.vocab_size", 20], 1, ["vocab_size=20"]),
    ],
)
def test_what_is_wrong_is_named(
    mor: Mor, tiny: TinyRun, tmp_path: Path, options: list[object], status: int, words: list[str]
) -> None:
    out = tmp_path / "run"
    message = one_sentence(mor("train", tiny.config, "--out", out, *options), status=status)
    assert all(word in message for word in words)
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 3", ["'stepz'", "did you mean 'steps'?"]),
        ("steps: many", ["steps='many'"]),
        ("- steps", ["mapping"]),
        ("steps: [", ["line"]),
        ("model: 3", ["model=3"]),
    ],
)
def test_a_config_with_a_mistake(mor: Mor, tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    message = one_sentence(mor("train", file, "--out", tmp_path / "run"), status=1)
    assert all(word in message for word in words)


def test_a_damaged_shard_is_named_before_training(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny.corpus, corpus)
    shard = corpus / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    called = mor("train", tiny.config, "--out", tmp_path / "run", "--data", corpus)
    assert "train-00000.bin" in one_sentence(called, status=1)
