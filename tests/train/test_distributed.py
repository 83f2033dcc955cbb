"""Several ranks train the model that one process trains, and share its checkpoints."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import process_helpers as processes
import run_helpers as runs
from mor.errors import ConfigError
from mor.io.checkpoint import load
from mor.train.config import TrainConfig
from mor.train.distributed import World
from mor.train.optim import build_optimizer
from mor.train.parallelize import parallelize
from process_helpers import Ranks, said

STEPS = 20


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


def settings(corpus: Path, kind: str, parallel: str = "auto", **changes: Any) -> dict[str, Any]:
    """4 micro-batches a step, so that two ranks accumulate."""
    rhythm = {"steps": STEPS, "save_every": 8, "eval_every": 10, "micro_batch_size": 1}
    return runs.settings(corpus, kind, parallel=parallel, **(rhythm | changes))


@pytest.fixture(scope="module")
def alone(corpus: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    kinds = ("expert", "loss_free")
    return {kind: ranks.train(settings(corpus, kind), folder / kind, 1) for kind in kinds}


def assert_same_run(out: Path, expected: Path) -> None:
    """Losses to 1e-5, parameters to 1e-4."""
    ours, theirs = runs.rows(out), runs.rows(expected)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            near = None if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)
            assert row[name] == near, (row["step"], name)
    model, reference = load(out), load(expected)
    assert model.config.thresholds == pytest.approx(reference.config.thresholds, abs=1e-4)
    weights = reference.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-4, msg=name)
    assert model.lm_head.weight is model.embed_tokens.weight


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "parallel", "size"),
    [
        ("expert", "auto", 2),
        ("expert", "fsdp", 2),
        ("loss_free", "fsdp", 2),
        *(
            pytest.param(kind, parallel, size, marks=SLOW)
            for kind in ("vanilla", "expert", "token", "loss_free", "random", "relaxed")
            for parallel in ("ddp", "fsdp")
            for size in (2, 4)
        ),
    ],
)
def test_ranks_together_are_one_process(
    corpus: Path,
    tmp_path: Path,
    ranks: Ranks,
    alone: dict[str, Path],
    kind: str,
    parallel: str,
    size: int,
) -> None:
    out = ranks.train(settings(corpus, kind, parallel), tmp_path / "run", size)
    if kind not in alone:
        alone[kind] = ranks.train(settings(corpus, kind), tmp_path / "one", 1)
    assert_same_run(out, alone[kind])
    assert said(out, 0).count("finished: ") == 1
    assert not said(out, 1)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_muon_on_two_ranks_stays_near_one_process(
    corpus: Path, tmp_path: Path, ranks: Ranks, parallel: str
) -> None:
    """Its products are in bf16, where a gradient's last bit may be a step of 0.4 %."""
    one = runs.rows(ranks.train(settings(corpus, "muon"), tmp_path / "one", 1))
    two = runs.rows(ranks.train(settings(corpus, "muon", parallel), tmp_path / "run", 2))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)
    assert one[-1]["loss"] < one[0]["loss"] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["expert", "loss_free"])
@pytest.mark.parametrize("mode", ["recursion", "full"])
def test_sharded_layers_are_recomputed(
    corpus: Path, tmp_path: Path, ranks: Ranks, alone: dict[str, Path], kind: str, mode: str
) -> None:
    values = settings(corpus, kind, "fsdp", activation_checkpointing=mode)
    assert_same_run(ranks.train(values, tmp_path / "run", 2), alone[kind])


@pytest.mark.parametrize(
    "sizes", [(2, 1), pytest.param((2, 4), marks=SLOW), pytest.param((1, 2, 4, 1), marks=SLOW)]
)
@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=SLOW)])
def test_killed_and_resumed_on_another_number_of_ranks(
    corpus: Path,
    tmp_path: Path,
    ranks: Ranks,
    alone: dict[str, Path],
    sizes: tuple[int, ...],
    parallel: str,
) -> None:
    """Killed in the middle of each, after a checkpoint of its own."""
    values, out = settings(corpus, "expert", parallel, keep_checkpoints=0), tmp_path / "run"
    values["save_every"] = 4
    for turn, size in enumerate(sizes[:-1], start=1):
        ranks.kill_after(values, out, size, 4 * turn + 1, random.Random(turn))
        steps = [int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")]
        assert max(steps) >= 4 * turn
    ranks.train(values, out, sizes[-1])
    assert_same_run(out, alone["expert"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_random_moments(corpus: Path, tmp_path: Path, ranks: Ranks, size: int) -> None:
    """20 kills; one process repeats its losses and weights bit for bit."""
    values = settings(corpus, "expert", "fsdp")
    values |= {"save_every": 2, "keep_checkpoints": 2}
    ranks.train(values, tmp_path / "whole", size)
    draw = random.Random(size)
    for moment in range(20):
        if moment % 4 == 0:
            out = tmp_path / f"killed{moment}"
        done = len(runs.rows(out)) if out.exists() else 0
        lines = min(STEPS - 1, done + draw.randint(1, 4))
        ranks.kill_after(values, out, size, lines, draw)
        if moment % 4 == 3:
            ranks.train(values, out, size)
            if size == 1:
                assert runs.result(out) == runs.result(tmp_path / "whole")
            else:
                assert_same_run(out, tmp_path / "whole")


def test_a_rank_holds_half_of_weights_gradients_and_moments() -> None:
    """Counted after a step, with exchanges that do nothing; not the peak of the process."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tiny import tiny_model

    held = {}
    for kind, size in (("none", 1), ("fsdp", 2)):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        model, config = tiny_model("expert", vocab_size=64).float().train(), TrainConfig()
        world = World(kind=kind, rank=0, size=size, device=torch.device("cpu"))
        parallel = parallelize(model, config, world)
        optimizer = build_optimizer(model, config)
        ids = torch.zeros(2, 16, dtype=torch.long)
        with parallel.micro_batch(last=True):
            loss = parallel(ids, ids).total_loss
            assert loss is not None
            loss.backward()
        optimizer.step()
        moments = [v for state in optimizer.state.values() for v in state.values()]
        tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
        local = [getattr(t, "_local_tensor", t) for t in tensors if t is not None]
        held[kind] = sum(t.nbytes for t in local)
        dist.destroy_process_group()
    assert 0.49 < held["fsdp"] / held["none"] < 0.65


def test_a_dead_rank_ends_the_run_with_one_sentence(
    corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    values, out = settings(corpus, "expert"), tmp_path / "run"
    first, second = ranks.start(values | {"steps": 100_000, "save_every": 0}, out, 2)
    processes.wait_for_lines(out, 1)
    os.kill(second, signal.SIGKILL)
    assert ranks.statuses() == [1, -signal.SIGKILL], first
    error = said(out, 0).split("error: ")[1]
    assert error.startswith("one of the 2 processes has ended or does not answer (")
    assert "--resume auto" in error
    assert "Traceback" not in said(out, 0)


def test_a_batch_that_does_not_divide_is_refused_once(
    corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    out = tmp_path / "run"
    ranks.start(settings(corpus, "expert") | {"batch_size": 3}, out, 2)
    assert ranks.statuses() == [1, 1]
    words = "error: batch_size=3 does not divide by 2 processes times micro_batch_size=1: "
    assert said(out, 0).startswith(words)
    assert not said(out, 1)
    assert not out.exists()


@pytest.mark.parametrize(
    ("environment", "parallel", "words"),
    [
        ({"WORLD_SIZE": "2"}, "ddp", "WORLD_SIZE=2 is set, but no rank: start the run by torchrun"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "none", r"parallel='none' with 2 processes"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "fsdp", r"rank 1 of 2 cannot meet the others at 127.*:"),
    ],
)
def test_a_world_that_cannot_be_joined_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], parallel: str, words: str
) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (place | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mor.train.distributed._TIMEOUT_MINUTES", 1 / 600)
    with pytest.raises(ConfigError, match=words):
        World.join(parallel, torch.device("cpu"))


@pytest.fixture
def process_group() -> Iterator[None]:
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_tied_weights_stay_one_storage_when_sharded() -> None:
    from tiny import tiny_model

    world = World(kind="fsdp", rank=0, size=1, device=torch.device("cpu"))
    model = tiny_model("expert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parallelize(model, TrainConfig(), world)
    assert model.lm_head.weight is model.embed_tokens.weight
    full = world.full_model(model)
    assert full.lm_head.weight is full.embed_tokens.weight
    assert full.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in full.state_dict().items())


@pytest.mark.usefixtures("process_group")
def test_token_choice_gathers_nothing_between_recursions() -> None:
    from tiny import tiny_model

    world = World(kind="fsdp", rank=0, size=1, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"fsdp_reshard='recursion' cannot work with routing="):
        parallelize(tiny_model("token"), TrainConfig(fsdp_reshard="recursion"), world)
