"""Checkpoints of a run: a model folder as any other, and beside it all that resuming needs.

    run/checkpoints/step-00001000/
        config.json, model.safetensors, tokenizer.json     rank 0: the model with whole weights
        training_state.pt                                  rank 0: `TrainState`
        optimizer/                                         FSDP only, every rank: its part of the
                                                           moments (torch.distributed.checkpoint)

A checkpoint is written into a hidden folder beside its place and renamed when all of it is on disk:
it is complete or not there, whichever rank fails or is killed in between. All ranks must see the
same folder.
"""

import json
import shutil
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mor.errors import CheckpointError, ConfigError
from mor.io.atomic_files import staged_folder, storage_error
from mor.io.checkpoint import newest_step, resolve, write_model
from mor.io.tokenizer import Tokenizer
from mor.model.transformer import MoRModel
from mor.train.distributed import World

STATE_FILE = "training_state.pt"
SHARDS_FOLDER = "optimizer"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All state of a run between two optimizer steps that is not in the model.

    Learning rate and capacities are functions of `step`, the next batch is a function of the seed
    and `position`; balancing biases and thresholds are saved with the model. The fields' names are
    the keys in the file.
    """

    step: int
    """Optimizer steps done."""
    elapsed: float
    """Seconds that they took, evaluations and saves left out, for budgets of time."""
    position: int
    """Sequences that they read: where the data's endless order goes on."""
    optimizer: dict[str, Any]
    """The optimizer's `state_dict`; with FSDP the moments in it are on the meta device."""
    rng: dict[str, Tensor]
    """States of torch's random number generators by device type."""
    settings: dict[str, Any]
    """The training configuration as plain data, to refuse a resume with another one."""


def rng_state() -> dict[str, Tensor]:
    """States of torch's random number generators by device type."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Set torch's random number generators to what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def step_folder(run: Path, step: int) -> Path:
    """The folder of a run's checkpoint after `step` optimizer steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoint_to_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint that a run in this folder starts from; None starts it anew.

    Args:
        resume: `never`, `auto` (the newest checkpoint in `run`, if any) or a checkpoint.

    Raises:
        CheckpointError: no such checkpoint, or later ones in `run` would be lost or mixed up.
    """
    newest = newest_step(run)
    if resume == "never":
        if newest is not None:
            raise CheckpointError(
                f"{run} holds a run with checkpoints up to {newest.name}: continue it with "
                "--resume auto, or choose another --out."
            )
        return None
    if resume == "auto":
        return newest
    checkpoint = resolve(resume)
    if newest is not None and checkpoint.parent == newest.parent and checkpoint != newest:
        raise CheckpointError(
            f"{run} has checkpoints after {checkpoint.name}, up to {newest.name}, which would get "
            "mixed up with new ones: remove them first, or start a new run with init_from."
        )
    return checkpoint


# -- saving ---------------------------------------------------------------------------------------


def save_checkpoint(
    world: World, run: Path, model: MoRModel, state: TrainState, tokenizer: Tokenizer, keep: int
) -> Path:
    """Write the checkpoint of step `state.step`, then remove old ones. Collective.

    One that exists stays as it is.

    Args:
        keep: newest checkpoints to keep; 0 keeps all.

    Returns:
        Its folder.

    Raises:
        CapacityError: the disk is full; earlier checkpoints are still there.
        CheckpointError: the place cannot be written.
    """
    target = step_folder(run, state.step)
    # Every rank takes part in gathering sharded weights, rank 0 alone gets them.
    full_model = world.full_model(model)
    # Rank 0 answers for all: another rank might see the folder only after rank 0 has renamed it.
    if not world.on_rank0(target.exists):
        if world.kind == "fsdp":
            _save_sharded(world, target, full_model, state, tokenizer)
        else:
            world.on_rank0(_save_whole, target, full_model, state, tokenizer)
    if keep:
        world.on_rank0(_remove_old_steps, target.parent, keep)
    return target


def _save_whole(target: Path, model: MoRModel, state: TrainState, tokenizer: Tokenizer) -> None:
    """Write a checkpoint from one process, which has all of it."""
    with _storage_errors(target), staged_folder(target) as staged:
        _write_rank0_files(staged, model, state, tokenizer)


def _save_sharded(
    world: World, target: Path, full_model: MoRModel, state: TrainState, tokenizer: Tokenizer
) -> None:
    """Write a checkpoint whose moments each rank writes its part of. Collective."""
    described, moments = take_out_tensors(state.optimizer)
    # If any step below fails, on whichever rank, every rank leaves this block by an exception; then
    # rank 0's stack removes the hidden folder.
    with ExitStack() as stack:
        # 1. Rank 0 makes the hidden folder; the others wait for its path.
        staged = world.on_rank0(_enter_staged, stack, target)
        # 2. All ranks write at once; whoever is done waits for the slowest.
        with world.all_or_none():
            _write_shards(moments, staged)
        # 3. Rank 0 writes the rest, the others wait.
        rest = replace(state, optimizer=described)
        world.on_rank0(_write_rest, target, staged, full_model, rest, tokenizer)
        # 4. Rank 0 renames the folder; when the others go on, the checkpoint is there.
        world.on_rank0(_close_staged, stack, target)


def _enter_staged(stack: ExitStack, target: Path) -> Path:
    with _storage_errors(target):
        return stack.enter_context(staged_folder(target))


def _close_staged(stack: ExitStack, target: Path) -> None:
    with _storage_errors(target):
        stack.close()


def _write_rest(
    target: Path, staged: Path, model: MoRModel, state: TrainState, tokenizer: Tokenizer
) -> None:
    with _storage_errors(target):
        _write_rank0_files(staged, model, state, tokenizer)


def _write_rank0_files(
    staged: Path, model: MoRModel, state: TrainState, tokenizer: Tokenizer
) -> None:
    write_model(model, staged, tokenizer)
    plain = {f.name: getattr(state, f.name) for f in fields(state)}
    plain["settings"] = json.dumps(state.settings)
    torch.save(plain, staged / STATE_FILE)


def _write_shards(tensors: dict[str, Tensor], staged: Path) -> None:
    """Write this rank's part of each tensor. Collective: torch has rank 0 plan and check it."""
    import torch.distributed.checkpoint as dcp  # which loads zstandard, where it is installed

    try:
        dcp.save(tensors, checkpoint_id=staged / SHARDS_FOLDER)
    except dcp.CheckpointException as error:  # on every rank, with the failures of all
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{staged / SHARDS_FOLDER}: cannot be written ({first}).") from error


def _remove_old_steps(checkpoints: Path, keep: int) -> None:
    for old in sorted(checkpoints.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _storage_errors(path: Path) -> Generator[None, None, None]:
    """Context that turns errors of writing `path` into CapacityError or CheckpointError."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error, CheckpointError) from error
    except RuntimeError as error:
        # Torch's own file writer hides the system's error; a CapacityError is one, too, and names a
        # file in the hidden folder, where a user knows the checkpoint's name only.
        raise storage_error(path, OSError(28, str(error)), CheckpointError) from error


# -- loading --------------------------------------------------------------------------------------


def read_state(checkpoint: Path) -> TrainState:
    """Read the training state of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {STATE_FILE}: it is a model, not a training run's checkpoint; "
            "start a new run from it with init_from."
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


def read_matching_state(checkpoint: Path, settings: dict[str, Any]) -> TrainState:
    """Read the training state of a checkpoint that was trained with these settings.

    Raises:
        CheckpointError: it is missing or damaged.
        ConfigError: a setting was another one; settings that only one side has do not count.
    """
    state = read_state(checkpoint)
    for key, value in state.settings.items():
        if key in settings and settings[key] != value:
            raise ConfigError(
                f"cannot resume {checkpoint}: it was trained with {key}={value!r}, now "
                f"{key}={settings[key]!r}; give the old value, or start a new run with init_from."
            )
    return state


def load_optimizer_state(world: World, checkpoint: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's optimizer state, laid out for the ranks of this `World`. Collective.

    The checkpoint may be of any number of ranks, sharded or not.

    Args:
        saved: `TrainState.optimizer` as `read_state` returns it.

    Raises:
        CheckpointError: the sharded state is damaged.
    """
    sharded = world.kind == "fsdp"
    mesh = init_device_mesh(world.device.type, (world.size,)) if sharded else None
    # Tensors that `saved` only describes get memory here; torch fills it from the shards, reading
    # on each rank what lies in that rank's part.
    unread: dict[str, Tensor] = {}

    def lay_out(key: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:  # a step count, whole on every rank
            return tensor
        local = torch.zeros_like(tensor, device=world.device) if tensor.is_meta else tensor
        placed = local if mesh is None else _own_part(local, mesh)
        if tensor.is_meta:
            unread[key] = placed
        return placed

    state = map_tensors(saved, lay_out)
    if unread:
        import torch.distributed.checkpoint as dcp

        shards = checkpoint / SHARDS_FOLDER
        try:
            dcp.load(unread, checkpoint_id=shards, no_dist=mesh is None)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise CheckpointError(
                f"{shards} is damaged ({type(error).__name__}): remove {checkpoint} and resume "
                "from an earlier checkpoint."
            ) from error
    return state


def _own_part(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A DTensor that keeps this rank's rows of a tensor that every rank has whole."""
    from torch.distributed.tensor import Shard, distribute_tensor  # loads for a second

    # Without a source rank nothing is exchanged: each rank cuts its rows out of its own tensor.
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def take_out_tensors(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state with its tensors on the meta device, and the tensors by key.

    Tensors of a single number stay in the state.
    """
    tensors: dict[str, Tensor] = {}

    def describe(key: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor
        tensors[key] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return map_tensors(tree, describe), tensors


def map_tensors(tree: Any, change: Callable[[str, Tensor], Tensor], key: str = "") -> Any:
    """Nested dicts, lists and tuples with each tensor replaced by `change(key, tensor)`.

    A tensor's key is its path in the data, such as `/state/3/exp_avg`.
    """
    if isinstance(tree, Tensor):
        return change(key, tree)
    if isinstance(tree, dict):
        return {name: map_tensors(value, change, f"{key}/{name}") for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(v, change, f"{key}/{i}") for i, v in enumerate(tree))
    return tree
