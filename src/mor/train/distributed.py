"""Many processes as one run: the only file that knows about distribution.

`torchrun` starts W processes and tells each its rank. Every rank takes its part of each batch; DDP
(whole weights everywhere) or FSDP2 (every rank keeps a part of weights, gradients and optimizer
state) makes one step of it. A `World` of one process does nothing of this.
"""

import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from mor.errors import CheckpointError, ConfigError, MorError
from mor.io.tokenizer import Tokenizer
from mor.model.transformer import MoRModel
from mor.train.checkpoint import (
    SHARDS,
    TrainState,
    _write_shards,
    map_tensors,
    save_step,
    step_folder,
    take_out_tensors,
)
from mor.train.config import TrainConfig

T = TypeVar("T")
Kind = Literal["none", "ddp", "fsdp"]

_TIMEOUT_MINUTES = 20  # of one exchange: rank 0 evaluates while the others wait


def is_rank0() -> bool:
    """Whether this process speaks for the run: it is alone, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, and which of them this is."""

    kind: Kind
    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, parallel: str, device: torch.device) -> "World":
        """Meet the other processes that torchrun has started, or be alone.

        Raises:
            ConfigError: not started by torchrun, too few GPUs, `none` with several processes.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(kind="none", rank=0, size=1, device=device)
        told = [os.environ.get(f) for f in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
        if not all(told):
            raise ConfigError(f"WORLD_SIZE={size} is set, but no rank: start the run by torchrun.")
        rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        if parallel == "none":
            raise ConfigError(
                f"parallel='none' with {size} processes would train {size} models into one "
                "folder: take auto, ddp or fsdp, or start one process."
            )
        if device.type == "cuda":
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"local rank {local} has no GPU, this node has {torch.cuda.device_count()}: "
                    "give torchrun --nproc-per-node as many processes as there are GPUs."
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=timedelta(minutes=_TIMEOUT_MINUTES))
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"rank {rank} of {size} cannot meet the others at {told[2]}:{told[3]} "
                    f"({str(error).splitlines()[0]}): start all of them at the same address."
                ) from error
        kind: Kind = "fsdp" if parallel == "fsdp" else "ddp"
        return cls(kind=kind, rank=rank, size=size, device=device)

    def leave(self) -> None:
        """End the connection to the other processes."""
        if self.size > 1 and dist.is_initialized():
            # gloo's threads need Python's lock to drop their last tensors, and torch joins them
            # while it holds that lock: without a pause a process in 30 hung for ever here.
            time.sleep(0.2)
            dist.destroy_process_group()

    def raise_on_rank0(self, error: MorError) -> NoReturn:
        """Said once: rank 0 raises an error that every rank has found, the others just leave."""
        if self.rank == 0:
            raise error
        raise SystemExit(1)

    def on_rank0(self, task: Callable[[], T]) -> T:
        """Have rank 0 do something; every rank gets its result, or leaves if it failed."""
        if self.size == 1:
            return task()
        answer: list[Any] = [None, None]
        failure: MorError | None = None
        if self.rank == 0:
            try:
                answer[0] = task()
            except MorError as error:
                failure, answer[1] = error, str(error)
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise failure or SystemExit(1)
        return answer[0]

    @contextmanager
    def all_or_none(self) -> Generator[None, None, None]:
        """Work after which all ranks go on, or none: the first that failed raises its error."""
        failure: MorError | None = None
        try:
            yield
        except MorError as error:
            failure = error
        if self.size > 1:
            failed: list[Any] = [None] * self.size
            dist.all_gather_object(failed, failure is not None)
            if any(failed) and failed.index(True) != self.rank:
                raise SystemExit(1)
        if failure is not None:
            raise failure

    @contextmanager
    def translate_peer_failure(self) -> Generator[None, None, None]:
        """Turn what torch says when another process has died into one sentence.

        Raises:
            MorError: another process ended, or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            if isinstance(error, MorError) or self.size == 1 or not lost:
                raise
            reason = str(error).strip().splitlines()[0]
            text = f"one of the {self.size} processes has ended or does not answer ({reason}): "
            self.raise_on_rank0(MorError(f"{text}see what it said; continue with --resume auto."))

    def max_over_ranks(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """The longest time that a rank took, and whether any of them wants to stop."""
        if self.size == 1:
            return seconds, stop
        told = torch.tensor([seconds, float(stop)], dtype=torch.float64)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return float(told[0]), bool(told[1])

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean over ranks of each tensor, in one exchange."""
        if self.size == 1:
            return dict(values)
        flat = torch.cat([v.detach().double().reshape(-1) for v in values.values()]).cpu()
        dist.all_reduce(flat)
        parts = (flat / self.size).split([v.numel() for v in values.values()])
        return {k: p.view(v.shape).to(v) for (k, v), p in zip(values.items(), parts, strict=True)}

    # -- the batch --------------------------------------------------------------------------------

    def micro_size(self, config: TrainConfig) -> int:
        """Sequences of one forward pass of this rank.

        Raises:
            ConfigError: the batch does not divide over the ranks.
        """
        micro = config.micro_batch_size or max(1, config.batch_size // self.size)
        if config.batch_size % (micro * self.size):
            raise ConfigError(
                f"batch_size={config.batch_size} does not divide by {self.size} processes times "
                f"micro_batch_size={micro}: change one of the three."
            )
        return micro

    def micro_batches(self, config: TrainConfig, position: int) -> range:
        """Which of the run's micro-batches this rank takes in the step after `position` sequences.

        The ranks take them in turns, so that a step is the same set whatever the world's size.
        """
        micro = self.micro_size(config)
        first, after = position // micro, (position + config.batch_size) // micro
        return range(first + self.rank, after, self.size)

    def clip_grad_norm(self, model: nn.Module, limit: float) -> Tensor:
        """Scale all gradients so that their common norm is at most `limit`; returns the norm."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        whole: Tensor = getattr(norm, "full_tensor", norm.detach)()  # of a DTensor
        nn.utils.clip_grads_with_norm_(parameters, limit, whole)
        return whole

    # -- the model --------------------------------------------------------------------------------

    def full_model(self, model: MoRModel) -> MoRModel:
        """The model; if weights are sharded, rank 0 gets a complete copy, others an empty one."""
        if self.kind != "fsdp":
            return model
        with torch.device("meta"):
            copy = MoRModel(model.config)
        state: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            full: Tensor = getattr(value, "full_tensor", value.detach)()  # of a DTensor
            if self.rank == 0:
                state[name] = full.detach()
        if self.rank == 0:
            copy.load_state_dict(state, assign=True, strict=False)
            if model.config.tie_word_embeddings:
                copy.lm_head.weight = copy.embed_tokens.weight
        return copy.train(model.training)

    # -- checkpoints ------------------------------------------------------------------------------

    def save(
        self, run: Path, model: MoRModel, state: TrainState, tokenizer: Tokenizer, keep: int
    ) -> Path:
        """`save_step` of all ranks together; sharded optimizer state is written by its owners.

        All ranks must see the same folder. Raises as `save_step` does.
        """
        whole = self.full_model(model)
        if self.kind != "fsdp":
            return self.on_rank0(lambda: save_step(run, whole, state, tokenizer, keep))
        if self.on_rank0(step_folder(run, state.step).exists):
            return step_folder(run, state.step)
        described, tensors = take_out_tensors(state.optimizer)
        rest = replace(state, optimizer=described)
        if self.rank == 0:

            def write_shards(staged: Path) -> None:
                self.on_rank0(lambda: staged)
                _write_shards(tensors, staged)

            return self.on_rank0(lambda: save_step(run, whole, rest, tokenizer, keep, write_shards))
        staged: Path = self.on_rank0(lambda: run)  # rank 0 says where
        try:
            _write_shards(tensors, staged)
        finally:
            written = self.on_rank0(lambda: run)  # leaves if rank 0 failed
        return written

    def optimizer_state(self, checkpoint: Path, saved: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state, as any number of ranks has saved it, for the ranks of today.

        Raises:
            CheckpointError: the shards are damaged.
        """
        mesh = init_device_mesh(self.device.type, (self.size,)) if self.kind == "fsdp" else None
        wanted: dict[str, Tensor] = {}

        def place(path: str, tensor: Tensor) -> Tensor:
            if tensor.ndim == 0:
                return tensor
            here = torch.zeros_like(tensor, device=self.device) if tensor.is_meta else tensor
            if mesh is not None:  # no exchange: every rank has the tensor and keeps its part
                from torch.distributed.tensor import Shard, distribute_tensor

                here = distribute_tensor(here, mesh, [Shard(0)], src_data_rank=None)
            if tensor.is_meta:
                wanted[path] = here
            return here

        placed = map_tensors(saved, place)
        if wanted:
            import torch.distributed.checkpoint as dcp

            try:
                dcp.load(wanted, checkpoint_id=checkpoint / SHARDS, no_dist=mesh is None)
            except Exception as error:  # torch raises many kinds for a damaged file
                raise CheckpointError(
                    f"{checkpoint / SHARDS} is damaged ({type(error).__name__}): remove "
                    f"{checkpoint} and resume from an earlier checkpoint."
                ) from error
        return placed
