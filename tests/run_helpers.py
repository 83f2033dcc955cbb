"""Small training runs for the tests of the trainer, here and in processes that can be killed.

Run as a script it is a server: it imports torch once, then forks a child for each line of JSON.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from mor.data.corpus import Document, build_from_documents
from mor.train.config import TrainConfig
from mor.train.metrics_file import MetricsFile
from mor.train.trainer import Trainer

MODEL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_block_layers": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
}
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {"num_recursions": 1, "routing": "none"},
    "expert": {"num_recursions": 3},
    "token": {"num_recursions": 3, "routing": "token_choice"},
    "loss_free": {
        "num_recursions": 3,
        "routing": "token_choice",
        "balancing": "loss_free",
        "balancing_update_rate": 0.02,
    },
    "random": {"num_recursions": 3, "router_type": "random"},
    "muon": {"num_recursions": 3},
    "relaxed": {"num_recursions": 3, "relaxation_rank": 4},
}
RECIPES: dict[str, dict[str, Any]] = {
    "loss_free": {"balancing_warmup_steps": 10},
    "muon": {"optimizer": "muon", "muon_lr": 0.02, "embedding_weight_decay": 0.0},
}
OPERATIONS = frozenset({"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"})
CLOCKS = ("seconds", "tokens_per_s", "step_s", "mfu", "memory_bytes")
"""What no two runs have in common."""


def write_corpus(folder: Path) -> Path:
    """Sentences whose words follow each other in a fixed order, so there is something to learn."""
    draw = random.Random(0)
    text = "the old red fox saw a small bird and ran over one green hill to its den"
    words = text.split()
    documents = []
    for number in range(120):
        starts = [draw.randrange(len(words)) for _ in range(6)]
        text = ". ".join(" ".join((words * 2)[s : s + 9]) for s in starts)
        documents.append(Document(f"doc{number}", text))
    build_from_documents(documents, folder, train_tokenizer=320, valid_fraction=0.1)
    return folder


def settings(corpus: Path, kind: str = "expert", **changes: Any) -> dict[str, Any]:
    """A run of 24 steps that saves and evaluates often, as plain data."""
    return {
        "model": {**MODEL, **KINDS[kind]},
        "data": str(corpus),
        "sequence_length": 16,
        "batch_size": 4,
        "steps": 24,
        "lr": 0.01,
        "eval_every": 5,
        "eval_windows": 2,
        "calibration_windows": 2,
        "capacity_warmup_steps": 6,
        "save_every": 3,
        "device": "cpu",
        **RECIPES.get(kind, {}),
        **changes,
    }


def train(values: dict[str, Any], out: Path, **options: Any) -> Trainer:
    """Run to the end; `options` are the trainer's."""
    trainer = Trainer(TrainConfig.from_dict(values), out, **options)
    trainer.run()
    return trainer


def rows(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock says."""
    lines = MetricsFile(out / "metrics.jsonl").rows()
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def result(out: Path) -> tuple[list[dict[str, Any]], bytes, dict[str, Any]]:
    """All that a run leaves: its metrics, its newest weights to the last bit, and their config."""
    newest = max((out / "checkpoints").glob("step-*"))
    config = json.loads((newest / "config.json").read_text())
    return rows(out), (newest / "model.safetensors").read_bytes(), config


class Killer:
    """Kills its own process at the n-th file operation below a folder, as the system might."""

    def __init__(self, folder: Path, operations: int) -> None:
        self.folder, self.left = str(folder), operations

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event in OPERATIONS and any(str(arg).startswith(self.folder) for arg in args):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def serve() -> None:
    """Answer each line of JSON with a child's number, and the next line with how it ended."""
    import torch._dynamo  # which the first optimizer would import in every child

    assert torch._dynamo
    for line in sys.stdin:
        asked = json.loads(line)
        out = Path(asked["out"])
        child = os.fork()
        if child == 0:
            if asked["operations"]:
                sys.addaudithook(Killer(out, asked["operations"]))
            train(asked["values"], out, resume="auto")
            os._exit(0)
        answer(child)
        sys.stdin.readline()
        answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    serve()
