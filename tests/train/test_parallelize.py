"""Recomputed and compiled layers give the same losses and gradients; less is kept."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.bench.train_ab import saved_bytes
from mor.errors import ConfigError
from mor.model import transformer
from mor.model.transformer import MoRModel
from mor.train.config import TrainConfig
from mor.train.distributed import World
from mor.train.parallelize import has_compiler, parallelize
from tiny import KINDS, tiny_model

ALONE = World(kind="none", rank=0, size=1, device=torch.device("cpu"))


def step(
    model: MoRModel, document_end: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch."""
    torch.manual_seed(3)
    ids = torch.randint(61, (2, 25))
    options: Any = {"return_logits": False, "document_end": document_end}
    out = model.train()(ids[:, :-1], targets=ids[:, 1:], **options)
    out.total_loss.backward()
    return out.total_loss.detach(), {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }


def forward_bytes(model: MoRModel) -> int:
    ids = torch.zeros(2, 48, dtype=torch.long)
    return saved_bytes(lambda: model(ids, targets=ids).total_loss, model.parameters())


@pytest.mark.parametrize("mode", ["recursion", "full"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_recomputing_changes_nothing_but_memory(kind: str, mode: str) -> None:
    model, plain = tiny_model(kind), tiny_model(kind)
    config = TrainConfig(activation_checkpointing=mode)
    if kind == "sequence" and mode == "recursion":
        with pytest.raises(ConfigError, match=r"'recursion' needs sharing='cycle'.*take 'full'"):
            parallelize(model, config, ALONE)
        return
    parallelize(model, config, ALONE)
    parallelize(plain, TrainConfig(), ALONE)
    loss, gradients = step(model)
    expected, others = step(plain)
    assert loss == expected
    assert gradients.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in gradients.items())
    assert forward_bytes(model) < 0.85 * forward_bytes(plain)


def test_evaluation_recomputes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("expert")
    parallelize(model, TrainConfig(activation_checkpointing="full"), ALONE)
    calls = []
    monkeypatch.setattr(transformer, "checkpoint", lambda *args, **kwargs: calls.append(args))
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long))
    assert calls == []


def test_without_a_compiler_training_goes_on_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    model, plain = tiny_model("expert"), tiny_model("expert")
    with pytest.warns(UserWarning, match=r"^compile: true needs a C\+\+ compiler .* without\.$"):
        parallelize(model, TrainConfig(compile=True), ALONE)
    assert step(model)[0] == step(plain)[0]


COMPILED = """
import json, sys, torch
from test_parallelize import ALONE, step
from mor.train.config import TrainConfig
from mor.train.distributed import World
from mor.train.parallelize import parallelize
from tiny import tiny_model
kind, mode, *end = sys.argv[1:]
end = [int(e) for e in end]
model, plain = (tiny_model(kind, num_block_layers=1) for _ in range(2))
parallelize(model, TrainConfig(compile=True, activation_checkpointing=mode), ALONE)
(loss, ours), (expected, theirs) = step(model, *end), step(plain, *end)
worst = max(float((ours[n] - theirs[n]).abs().max()) for n in theirs)
worst = max(worst, float((loss - expected).abs()))
print(json.dumps([worst, torch._dynamo.utils.counters["stats"]["unique_graphs"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ("expert", "none"),
        ("expert", "recursion"),
        ("vanilla", "full"),
        ("token", "none"),
        ("expert_shared", "full"),
        ("expert", "none", "7"),  # attention inside documents, which end with 7
    ],
    ids="-".join,
)
def test_compiled_layers_agree(case: tuple[str, ...]) -> None:
    """In a process of its own: shape checks at run time break the compiler's tracing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not has_compiler(ALONE.device):
            pytest.skip("no C++ compiler")
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, *case],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths + os.pathsep + str(Path(__file__).parent)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    worst, graphs = json.loads(done.stdout.splitlines()[-1])
    assert worst < 1e-10
    assert 0 < graphs < 12
