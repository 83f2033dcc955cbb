"""`mor report`: one page from run folders, true to their numbers, whatever is missing in them."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from html_reader import HTMLReader

from mor.cli.report import run as report
from mor.errors import ConfigError, DataError
from mor.report.run_folder import RunFolder
from mor.report.run_page import find_runs, run_report
from mor.yaml_config import dump_yaml

MODEL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
VANILLA = {"num_recursions": 1, "routing": "none"}


def lines(steps: int, recursions: int, every: int) -> list[dict[str, Any]]:
    """What a run writes: a falling loss, an evaluation now and then."""
    rows = []
    for step in range(1, steps + 1):
        loss = 4 + 3 * math.exp(-step / 20)
        row: dict[str, Any] = {"step": step, "tokens": 64 * step, "loss": loss, "lr": 0.01}
        row |= {"grad_norm": 1.0, "flops": 1e6 * step, "step_s": 0.5, "mfu": 0.25}
        row |= {"memory_bytes": 2**30, "total_steps": steps}
        if step % every == 0:
            routed = recursions > 1
            shares = [0.0, *[1 / recursions] * recursions]
            row |= {"nll_topk": loss, "nll_threshold": loss + 0.125, "nll_gap": 0.125}
            row |= {"depth_histogram": shares, "router_accuracy": 0.875 if routed else None}
            row |= {"dead_share": 0.0 if routed else None}
        rows.append(row)
    return rows


def write(folder: Path, rows: list[dict[str, Any]], **model: Any) -> Path:
    folder.mkdir(parents=True)
    settings = {"model": MODEL | model, "data": "books", "sequence_length": 16, "batch_size": 4}
    (folder / "config.yaml").write_text(dump_yaml(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    ours = write(tmp_path / "mor", lines(100, 3, 25))
    return [ours, write(tmp_path / "plain", lines(80, 1, 40), **VANILLA)]


def test_the_page_shows_every_run_and_needs_nothing_else(pair: list[Path]) -> None:
    html = run_report(find_runs(pair), "made by a test")
    reader = HTMLReader(html)
    tags = {tag for tag, _ in reader.elements}
    assert "script" not in tags
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "default-src 'none'" in html
    for words in ("2 training runs", "trained on books", "made by a test", "+0.1250", "87.5%"):
        assert words in html
    assert "1:33% 2:33% 3:33%" in html
    assert f"mor train {pair[0]}/config.yaml --out {pair[0]}-again" in html
    titles = [
        *(f"Training loss by {x}" for x in ("tokens", "FLOPs", "seconds", "steps")),
        *("NLL, threshold (causal)", "NLL, topk", "What causality costs: threshold - topk"),
        *("Share of validation tokens by recursion count, at the end", "Router accuracy"),
        *("Dead positions", "Depths over time: mor", "Tokens per second"),
        *("Model FLOPs utilization", "Memory", "Gradient norm before clipping", "Learning rate"),
    ]
    labels = [attrs.get("aria-label") for tag, attrs in reader.elements if tag == "svg"]
    assert [label for label in labels if label] == titles


def test_curves_end_at_the_runs_last_values(pair: list[Path]) -> None:
    """Each chart's description names its lines' ends."""
    html = run_report(find_runs(pair), "")
    (causal,) = re.findall(r"<desc>([^<]*)</desc><text[^>]*>NLL, threshold \(causal\)", html)
    for run in find_runs(pair):
        last = run.evaluations[-1]
        assert (
            f"{run.name}: ends at {last['nll_threshold']:.4g} (tokens {last['tokens']})" in causal
        )
    (by_time,) = re.findall(r"<desc>([^<]*)</desc><text[^>]*>Training loss by seconds", html)
    assert "(seconds 50)" in by_time
    assert "(seconds 40)" in by_time


def test_long_runs_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    run = write(tmp_path / "long", lines(10_000, 1, 1000), **VANILLA)
    html = run_report(find_runs([run]), "")
    assert len(html) < 200_000
    assert "(steps 1e+04)" in html or "(steps 10k)" in html
    max_length = max(len(path.split("L")) for path in re.findall(r'<path d="([^"]*)"', html))
    assert 300 < max_length <= 401


def test_a_run_of_an_older_version_or_just_begun(tmp_path: Path) -> None:
    """No FLOPs, no memory, no evaluation yet."""
    rows = [
        {k: v for k, v in row.items() if k not in ("flops", "mfu", "memory_bytes")}
        for row in lines(3, 3, 10)
    ]
    folder = write(tmp_path / "young", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    html = run_report(find_runs([folder]), "")
    assert "<h1>young</h1>" in html
    assert "Model FLOPs utilization" not in html
    assert not RunFolder.open(folder).finished


def test_many_runs_stand_below_each_other_with_short_names(tmp_path: Path) -> None:
    for variant in ("mor", "plain"):
        for seed in range(3):
            write(tmp_path / "runs" / f"{variant}_d16_9-steps_seed{seed}", lines(9, 3, 9))
    runs = find_runs([tmp_path])
    assert [run.name for run in runs] == [
        f"{v} seed{s}" for v in ("mor", "plain") for s in range(3)
    ]
    order = [f"{v}_d16_9-steps_seed{s}" for v in ("plain", "mor") for s in range(3)]
    results = {"runs": [{"name": name} for name in order]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    runs = find_runs([tmp_path])  # as in the experiment's own results
    assert [run.folder.name for run in runs] == order
    reader = HTMLReader(run_report(runs, ""))
    rows = [i for i, (tag, a) in enumerate(reader.elements) if tag == "th" and a["scope"] == "row"]
    assert [reader.texts[i] for i in rows][:6] == [run.name for run in runs]


def test_equal_names_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [write(tmp_path / place / "run", lines(3, 3, 3)) for place in "ab"]
    assert [run.name for run in find_runs(folders)] == [str(folder) for folder in folders]


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "run"])
def test_what_is_no_run_is_named(tmp_path: Path, missing: str) -> None:
    folder = write(tmp_path / "run", lines(3, 3, 3))
    if missing == "run":
        folder = tmp_path / "nowhere"
    else:
        (folder / missing).unlink()
    with pytest.raises(DataError, match=rf"{folder} is no run with measurements"):
        find_runs([folder])


def test_the_verb_writes_a_file(pair: list[Path], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "pages" / "both.html"
    assert report([*map(str, pair), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 2 runs.\n"
    assert out.read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(ConfigError, match="is a folder: give a file"):
        report([str(pair[0]), "--out", str(tmp_path)])
