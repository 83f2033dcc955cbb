"""`World`: the processes of one run, what they exchange, and how they fail together.

`torchrun` starts W processes and gives each its rank. Every rank takes its part of each batch; DDP
(whole weights everywhere) or FSDP2 (every rank keeps a part of weights, gradients and optimizer
state) makes one optimizer step of it. In a `World` of one process every method returns at once.

Rules that keep ranks from waiting for ever:
1. A method marked "collective" must be called by all ranks, in the same order.
2. An error (`MorError`) inside `on_rank0` or `all_or_none` ends all ranks: the rank that failed
   raises it, the others raise SystemExit. Outside of them it must be one that every rank finds.
3. A rank that dies makes the others' next exchange fail; `translate_peer_failure` says so.
"""

import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mor.errors import ConfigError, MorError
from mor.model.transformer import MoRModel
from mor.train.config import TrainConfig

P = ParamSpec("P")
T = TypeVar("T")
Kind = Literal["none", "ddp", "fsdp"]

_TIMEOUT_MINUTES = 20  # of one exchange: rank 0 evaluates while the others wait


def is_rank0() -> bool:
    """Whether this process, which may not have joined a `World` yet, is alone or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def resolve_device(name: str) -> torch.device:
    """The device that `TrainConfig.device` names; `auto` is a GPU if there is one.

    Raises:
        ConfigError: no such device, or torch sees no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is unknown: use auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: torch sees no GPU here; use device=cpu.")
    return device


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, and which of them this is."""

    kind: Kind
    """How they share the work: `none` for one process."""
    rank: int
    """This process's number, 0 to size - 1."""
    size: int
    device: torch.device
    """This process's own."""

    @classmethod
    def join(cls, parallel: str, device: torch.device) -> "World":
        """Connect to the other processes that torchrun has started; without torchrun to none.

        Args:
            parallel: `TrainConfig.parallel`.
            device: the config's; with several GPUs each process takes the one of its local rank.

        Raises:
            ConfigError: not started by torchrun, too few GPUs, `none` with several processes.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(kind="none", rank=0, size=1, device=device)
        names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if not all(os.environ.get(name) for name in names):
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
        if not dist.is_initialized():  # an earlier run in this process may have connected
            # On GPUs, too, objects and numbers on the host are exchanged: over gloo.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=timedelta(minutes=_TIMEOUT_MINUTES))
            except (RuntimeError, ValueError) as error:
                address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise ConfigError(
                    f"rank {rank} of {size} cannot meet the others at {address} "
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
        """Raise an error that every rank has found: rank 0 raises it, the others SystemExit.

        So the user reads it once. Not an exchange: a rank alone must not call it.
        """
        if self.rank == 0:
            raise error
        raise SystemExit(1)

    def on_rank0(self, task: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `task(*args, **kwargs)` returns on rank 0, on every rank. Collective.

        The others wait until rank 0 is done, at most 20 minutes. The result is pickled.

        Raises:
            MorError: what `task` raised, on rank 0; the other ranks raise SystemExit.
        """
        if self.size == 1:
            return task(*args, **kwargs)
        sent: list[Any] = [None, False]  # the result, whether it failed
        failure: MorError | None = None
        if self.rank == 0:
            try:
                sent[0] = task(*args, **kwargs)
            except MorError as error:
                failure, sent[1] = error, True
        dist.broadcast_object_list(sent)  # also after a failure: the others wait here
        if sent[1]:
            raise failure or SystemExit(1)
        return sent[0]

    @contextmanager
    def all_or_none(self) -> Generator[None, None, None]:
        """Context for work of every rank, after which all go on, or none. Collective at its end.

        Raises:
            MorError: this rank's own, if it is the first rank that failed; if another one is,
                SystemExit.
        """
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
        """Context that turns torch's error about a process that has died into one sentence.

        Raises:
            MorError: another process ended, or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo raises plain RuntimeErrors, which name its source files.
            lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            if isinstance(error, MorError) or self.size == 1 or not lost:
                raise
            reason = str(error).strip().splitlines()[0]
            text = f"one of the {self.size} processes has ended or does not answer ({reason}): "
            self.raise_on_rank0(MorError(f"{text}see what it said; continue with --resume auto."))

    def max_over_ranks(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """The longest time that a rank took, and whether any rank wants to stop. Collective."""
        if self.size == 1:
            return seconds, stop
        both = torch.tensor([seconds, float(stop)], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return float(both[0]), bool(both[1])

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean over ranks of each tensor, in one exchange of fp64 numbers. Collective."""
        if self.size == 1:
            return dict(values)
        flat = torch.cat([v.detach().double().reshape(-1) for v in values.values()]).cpu()
        dist.all_reduce(flat)
        parts = (flat / self.size).split([v.numel() for v in values.values()])
        return {k: p.view(v.shape).to(v) for (k, v), p in zip(values.items(), parts, strict=True)}

    # -- the batch --------------------------------------------------------------------------------

    def micro_size(self, config: TrainConfig) -> int:
        """Sequences of one forward pass of one rank.

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
        """Numbers of the run's micro-batches that this rank takes in one optimizer step.

        Ranks take them in turns, so that a step reads the same sequences whatever the world's size.

        Args:
            position: sequences that the run has read before the step.
        """
        micro = self.micro_size(config)
        start, end = position // micro, (position + config.batch_size) // micro
        return range(start + self.rank, end, self.size)

    def clip_grad_norm(self, model: nn.Module, limit: float) -> Tensor:
        """Scale all gradients so that their common L2 norm is at most `limit`. Collective.

        Returns:
            The norm before scaling.
        """
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        total = _gathered(norm)
        nn.utils.clip_grads_with_norm_(parameters, limit, total)
        return total

    # -- the model --------------------------------------------------------------------------------

    def full_model(self, model: MoRModel) -> MoRModel:
        """The model with whole weights, on rank 0. Collective.

        Without sharding it is `model` itself, on every rank. With FSDP rank 0 gets a copy, and the
        others one whose tensors are on the meta device.
        """
        if self.kind != "fsdp":
            return model
        with torch.device("meta"):
            copy = MoRModel(model.config)
        state: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue  # the embedding's, which is gathered once
            # Every rank takes part in gathering each weight; rank 0 alone keeps it.
            full = _gathered(value)
            if self.rank == 0:
                state[name] = full
        if self.rank == 0:
            copy.load_state_dict(state, assign=True, strict=False)
            if model.config.tie_word_embeddings:
                copy.lm_head.weight = copy.embed_tokens.weight
        return copy.train(model.training)


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that ranks share (a DTensor), or the tensor itself, detached."""
    full: Tensor = getattr(tensor, "full_tensor", tensor.detach)()
    return full.detach()
