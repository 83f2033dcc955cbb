"""`mor experiment`: a grid of runs that skips, resumes, reports failures and notices changes."""

import fcntl
import json
import random
import re
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Called, Mor, TinyRun, one_sentence, start

from experiment_spec import NAMES, SPEC
from mor.cli import experiment as verb
from mor.io.checkpoint import load
from mor.train.metrics_file import MetricsFile
from mor.train.trainer import Trainer

CLOCKS = ("step_seconds", "tokens_per_s", "mfu", "memory_bytes", "command")


@pytest.fixture(scope="module")
def spec(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spec") / "pair.yaml"
    file.write_text(SPEC.format(data=tiny.corpus))
    return file


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """So that two runs are equal to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("experiment") / "out"
    torch.set_num_threads(1)
    assert verb.run([str(spec), "--out", str(out)]) == 0
    return out


def results(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["runs"]


def numbers(out: Path) -> list[dict[str, Any]]:
    """Results without what no two runs have in common."""
    return [{k: v for k, v in result.items() if k not in CLOCKS} for result in results(out)]


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


# What it leaves


def test_every_planned_run_is_an_ordinary_run(finished: Path) -> None:
    assert sorted(p.name for p in (finished / "runs").iterdir()) == sorted(NAMES)
    for name in NAMES:
        model = load(finished / "runs" / name)
        assert model.config.num_recursions == (1 if name.startswith("vanilla") else 2)
        assert (model.config.router_type == "random") == ("random" in name)
        assert model.config.num_hidden_layers == 4  # 1 + 2 * 1 + 1
        assert len(MetricsFile(finished / "runs" / name / "metrics.jsonl").rows()) == 6


def test_the_results_are_the_runs_and_their_differences(finished: Path) -> None:
    values = json.loads((finished / "results.json").read_text())
    assert values["complete"]
    found = {r["name"]: r for r in values["runs"]}
    assert list(found) == NAMES
    for name, result in found.items():
        last = MetricsFile(finished / "runs" / name / "metrics.jsonl").rows()[-1]
        for key in ("nll_topk", "nll_threshold", "nll_gap", "depth_histogram", "tokens"):
            assert result[key] == last[key]
        assert result["training_flops"] == last["flops"]
        assert result["command"].startswith(f"mor train {finished / 'runs' / name}/config.yaml")
    for seed in (0, 1):
        plain, ours, blind = (found[NAMES[3 * seed + i]] for i in range(3))
        difference = ours["nll_threshold"] - blind["nll_threshold"]
        assert ours["vs_random"] == pytest.approx(difference)
        assert ours["vs_baseline"] == pytest.approx(ours["nll_threshold"] - plain["nll_threshold"])
        assert "vs_baseline" not in plain
        assert "vs_random" not in blind
        assert ours["training_flops"] == pytest.approx(blind["training_flops"], rel=0.002)


def test_the_table_and_the_plot_show_them(finished: Path) -> None:
    text = (finished / "results.md").read_text()
    found = results(finished)
    assert "6 of 6 runs are done" in text
    means = re.search(r"\| mor-2 \| 6 steps \| 2 \|.*", text)
    assert means is not None
    ours = [r for r in found if r["variant"] == "mor-2"]
    for key in ("nll_topk", "nll_threshold", "vs_random", "vs_baseline"):
        assert f"{sum(r[key] for r in ours) / 2:.4f}".lstrip("-") in means.group()
    for result in found:
        assert f"| {result['name']} | {result['nll_topk']:.4f} |" in text
    plot = (finished / "plot.svg").read_text()
    assert plot.startswith("<svg")
    assert all(f"<title>{name}</title>" in plot for name in ("vanilla", "mor-2", "mor-2-random"))


# Going on


def test_what_is_done_is_skipped(mor: Mor, spec: Path, finished: Path) -> None:
    before = content(finished / "runs")
    called = mor("experiment", spec, "--out", finished)
    assert (called.status, called.err) == (0, "")
    assert called.out.startswith("6 of 6 runs are done.\n")
    assert "step" not in called.out.replace("6 steps", "")
    assert content(finished / "runs") == before


def test_what_was_cut_off_goes_on_as_if_it_had_not_been(
    mor: Mor, spec: Path, finished: Path, tmp_path: Path
) -> None:
    """One run lacks its last checkpoint, one its last line, one is only begun, one never was."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    folders = [out / "runs" / name for name in NAMES]
    shutil.rmtree(folders[0] / "checkpoints" / "step-00000006")
    lines = (folders[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:10])
    shutil.rmtree(folders[1] / "checkpoints" / "step-00000006")
    shutil.rmtree(folders[2] / "checkpoints")
    (folders[3] / "metrics.jsonl").unlink()
    shutil.rmtree(folders[3] / "checkpoints")
    shutil.rmtree(folders[4])
    called = mor("experiment", spec, "--out", out)
    assert called.status == 0
    assert called.out.startswith("1 of 6 runs are done.\n")
    assert numbers(out) == numbers(finished)


def test_a_run_that_fails_is_reported_and_the_others_go_on(
    mor: Mor, spec: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer.run

    def fails(self: Trainer) -> Any:
        if self.out.name == NAMES[1]:
            raise RuntimeError("the machine caught fire")
        return run(self)

    monkeypatch.setattr(Trainer, "run", fails)
    shutil.copytree(finished / "runs", tmp_path / "runs")
    for name in NAMES[1:3]:  # the one that fails, and the next one
        shutil.rmtree(tmp_path / "runs" / name)
    called = mor("experiment", spec, "--out", tmp_path)
    assert called.status == 1
    assert called.err == f"{NAMES[1]} failed: the machine caught fire\n"
    status = {r["name"]: r["status"] for r in results(tmp_path)}
    assert status.pop(NAMES[1]) == "failed: the machine caught fire"
    assert set(status.values()) == {"done"}
    text = (tmp_path / "results.md").read_text()
    assert f"- {NAMES[1]}: failed: the machine caught fire" in text
    monkeypatch.undo()
    assert mor("experiment", spec, "--out", tmp_path).status == 0
    assert numbers(tmp_path) == numbers(finished)


def test_a_changed_spec_is_noticed_before_anything_runs(
    mor: Mor, tiny: TinyRun, finished: Path, tmp_path: Path
) -> None:
    before = content(finished)
    changed = tmp_path / "pair.yaml"
    changed.write_text(SPEC.format(data=tiny.corpus).replace("lr: 1.0e-2", "lr: 2.0e-2"))
    message = one_sentence(mor("experiment", changed, "--out", finished), status=1)
    assert f"{finished / 'runs' / NAMES[0]} was trained with lr=0.01" in message
    assert "now says lr=0.02: choose another --out" in message
    assert content(finished) == before


def test_two_at_a_time_in_one_folder_are_refused(mor: Mor, spec: Path, finished: Path) -> None:
    before = content(finished)
    with (finished / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = one_sentence(mor("experiment", spec, "--out", finished), status=1)
    assert message == (
        f"{finished} is in use by another `mor experiment`: wait for it, or choose another --out."
    )
    assert content(finished) == before


def test_a_longer_list_of_seeds_only_adds_runs(
    mor: Mor, tiny: TinyRun, finished: Path, tmp_path: Path
) -> None:
    out, more = tmp_path / "out", tmp_path / "pair.yaml"
    shutil.copytree(finished, out)
    text = SPEC.format(data=tiny.corpus).replace("seeds: [0, 1]", "seeds: [0, 1, 2]")
    more.write_text(text.replace("save_every: 2", "save_every: 4"))  # which changes no result
    called = mor("experiment", more, "--out", out)
    assert called.status == 0
    assert called.out.startswith("6 of 9 runs are done.\n[7/9] vanilla_tiny_6-steps_seed2\n")
    assert numbers(out)[:6] == numbers(finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(
    mor: Mor, spec: Path, finished: Path, tmp_path: Path, seed: int
) -> None:
    draw, out = random.Random(seed), tmp_path / "out"
    for lines in sorted(draw.sample(range(1, 34), 3)):
        with start("experiment", spec, "--out", out) as process:
            until = time.monotonic() + 100
            while process.poll() is None and time.monotonic() < until:
                written = [f.read_bytes().count(b"\n") for f in out.glob("runs/*/metrics.jsonl")]
                if sum(written) >= lines:
                    break
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
            process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
    assert mor("experiment", spec, "--out", out).status == 0
    assert numbers(out) == numbers(finished)


def test_asked_to_stop_it_saves_and_says_how_to_go_on(
    mor: Mor, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = nullcontext((lambda row: None, lambda: True))
    monkeypatch.setattr(verb, "watched", lambda screen, config: asking)
    called = mor("experiment", spec, "--out", tmp_path)
    assert called.status == 0
    assert called.out.splitlines()[-1] == "stopped and saved; the same command goes on from here."
    assert [p.name for p in tmp_path.glob("runs/*/checkpoints/*")] == ["step-00000001"]
    values = json.loads((tmp_path / "results.json").read_text())
    assert not values["complete"]
    assert [r["status"] for r in values["runs"]] == ["begun", *["new"] * 5]
    assert f"- {NAMES[1]}: new" in (tmp_path / "results.md").read_text()


# Specs


def plan(mor: Mor, spec: Path) -> Called:
    return mor("experiment", spec, "--plan")


def test_a_plan_lists_the_runs_and_writes_nothing(
    mor: Mor, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = plan(mor, spec)
    assert (status, err) == (0, "")
    _, *lines, total = out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "6"] for name in NAMES]
    flops = [float(line.split()[3]) for line in lines]
    assert total.startswith("6 runs, ")
    assert float(total.split()[2]) == pytest.approx(sum(flops), rel=0.01)
    assert not list(tmp_path.iterdir())
