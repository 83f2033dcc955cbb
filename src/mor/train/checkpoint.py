"""Checkpoints of a run: the model as any other, and beside it all that resuming needs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.errors import CheckpointError
from mor.io.atomic_files import staged_folder, storage_error
from mor.io.checkpoint import write_model
from mor.io.tokenizer import Tokenizer
from mor.model.transformer import MoRModel

STATE = "training_state.pt"
SHARDS = "optimizer"
"""Folder of the optimizer's tensors where many processes each wrote a part of them."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Explicit state of a run after a whole number of optimizer steps.

    Learning rate and capacities are pure functions of `step`, and what is read next is one of the
    seed and `position`; balancing biases and thresholds are part of the model.
    """

    step: int
    """Optimizer steps done."""
    elapsed: float
    """Seconds that they took, for budgets of time."""
    position: int
    """Sequences that they read, of the endless order that the data has."""
    optimizer: dict[str, Any]
    rng: dict[str, torch.Tensor]
    """Random number generators by device type."""
    settings: dict[str, Any]
    """The resolved training configuration as plain data, to refuse a resume with another one."""


def rng_state() -> dict[str, torch.Tensor]:
    """State of torch's random number generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put torch's random number generators back."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def map_tensors(
    tree: Any, change: Callable[[str, torch.Tensor], torch.Tensor], at: str = ""
) -> Any:
    """Plain data with its tensors replaced; `change` gets each tensor's place in the data."""
    if isinstance(tree, torch.Tensor):
        return change(at, tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, change, f"{at}/{key}") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(v, change, f"{at}/{i}") for i, v in enumerate(tree))
    return tree


def take_out_tensors(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An optimizer's state with its tensors described only (`meta`), and the tensors by place.

    Single numbers stay where they are.
    """
    tensors: dict[str, torch.Tensor] = {}

    def describe(at: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0:
            return tensor
        tensors[at] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return map_tensors(tree, describe), tensors


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return run / "checkpoints" / f"step-{step:08d}"


def save_step(
    run: Path,
    model: MoRModel,
    state: TrainState,
    tokenizer: Tokenizer,
    keep: int,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write `checkpoints/step-N`, which appears complete or not at all; then drop old ones.

    Args:
        keep: newest checkpoints to keep; 0 keeps all.
        write_more: puts more files into the folder before it appears.

    Raises:
        CapacityError: the disk is full; earlier checkpoints are still there.
        CheckpointError: the place cannot be written.
    """
    target = step_folder(run, state.step)
    if not target.exists():
        try:
            with staged_folder(target) as staged:
                write_more(staged)
                write_model(model, staged, tokenizer)
                plain = {f.name: getattr(state, f.name) for f in fields(state)}
                plain["settings"] = json.dumps(state.settings)
                torch.save(plain, staged / STATE)
        except OSError as error:
            raise storage_error(target, error, CheckpointError) from error
        except RuntimeError as error:  # torch's own file writer hides the system's error
            raise storage_error(target, OSError(28, str(error)), CheckpointError) from error
    if keep:
        for old in sorted(target.parent.glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def read_state(checkpoint: Path) -> TrainState:
    """Read the training state of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = checkpoint / STATE
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {STATE}: it is a model, not a training run's checkpoint; start "
            "a new run from it with init_from."
        )
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
        return TrainState(
            step=raw["step"],
            elapsed=raw["elapsed"],
            position=raw["position"],
            optimizer=raw["optimizer"],
            rng=raw["rng"],
            settings=json.loads(raw["settings"]),
        )
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}): remove {checkpoint} and resume from an "
            "earlier checkpoint."
        ) from error


def _write_shards(tensors: dict[str, Tensor], staged: Path) -> None:
    import torch.distributed.checkpoint as dcp  # which loads zstandard, where it is installed

    try:
        dcp.save(tensors, checkpoint_id=staged / SHARDS)
    except dcp.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{staged / SHARDS}: cannot be written ({first}).") from error
