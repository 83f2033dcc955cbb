"""The demo end to end on a few small files: stages, interruption, finished runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import mor.demo
from mor.cli.main import main
from mor.data.sources import Document
from mor.demo import Demo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Demo:
    """A demo on a few files with a small vocabulary."""
    words = ["def", "class", "return", "import", "self", "value", "path", "name", "for", "in"]
    documents = [
        Document(f"f{i}.py", "\n".join(" ".join(words[(i + j) % 10 :]) for j in range(40)))
        for i in range(30)
    ]
    monkeypatch.setattr(mor.demo, "stdlib_documents", lambda: iter(documents))
    monkeypatch.setattr(mor.demo, "VOCAB_SIZE", 300)
    monkeypatch.setattr(mor.demo, "SEQUENCE_LENGTH", 48)
    monkeypatch.setattr(mor.demo, "BATCH_SIZE", 2)
    monkeypatch.setattr(mor.demo, "_MIN_STEPS", 6)
    monkeypatch.setattr(mor.demo, "_ROUNDS", 1)
    monkeypatch.setattr(mor.demo, "train_config", lambda *args: replace(_config(*args), **_FEW))
    monkeypatch.setattr(mor.demo, "_PROMPT", "def")
    monkeypatch.setattr(mor.demo, "SamplingParams", lambda **kw: _Short(**{**kw, "max_tokens": 4}))
    return Demo(out=tmp_path / "demo", minutes=0.001, screen=Console(width=120))


_Short, _config = mor.demo.SamplingParams, mor.demo.train_config
_FEW = {"eval_windows": 16, "calibration_windows": 4}


def test_runs_through_and_shows_the_result_again(
    small: Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small.run() == 0
    first = capsys.readouterr().out
    for words in ("NLL, topk", "vanilla", "random routing", "next:", "report.html"):
        assert words in first
    assert "\x1b" not in first
    page = (small.out / "report.html").read_text()
    assert "<svg" in page
    assert "recursions: " in page
    state = json.loads((small.out / "demo.json").read_text())
    mor_run, vanilla, random = state["runs"]
    assert mor_run["tokens"] == random["tokens"]
    assert vanilla["training_flops"] == pytest.approx(mor_run["training_flops"], rel=0.15)
    assert small.run() == 0
    second = capsys.readouterr().out
    assert "is finished" in second
    assert f"{mor_run['nll_threshold']:.4f}" in second


@pytest.mark.slow
def test_an_interrupted_demo_goes_on_with_its_plan(
    small: Demo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(models: object, tokenizer: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mor.demo, "generation_speeds", crash)
        with pytest.raises(KeyboardInterrupt):
            small.run()
    planned = json.loads((small.out / "demo.json").read_text())["steps"]
    before = (small.out / "mor" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert small.run() == 0
    assert (small.out / "mor" / "metrics.jsonl").read_text() == before  # nothing trained twice
    assert json.loads((small.out / "demo.json").read_text())["steps"] == planned


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "not a demo" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letter.txt"]


def test_bad_minutes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--minutes", "0", "--out", str(tmp_path / "x")]) == 1
    assert "--minutes" in capsys.readouterr().err
