"""What makes a step smaller or faster on one device, put around a model from outside.

In a fixed order: a layer is compiled, activation checkpointing surrounds what is compiled, and
sharding (`parallel`) surrounds both. Checkpointing inside the compiled piece would not stand the
keys and values that a shared layer leaves behind for later recursions.
"""

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.layers import Layer
from mor.model.transformer import MoRModel, MoROutput
from mor.ops.malloc import retain_freed_memory
from mor.train.config import TrainConfig
from mor.train.distributed import World


def parallelize(model: MoRModel, config: TrainConfig, world: World) -> "ParallelModel":
    """Compile, checkpoint activations, shard, in place; build the optimizer afterwards."""
    speed_up(model, config, world.device)
    kinds = {"none": ParallelModel, "ddp": DDPModel, "fsdp": FSDPModel}
    return kinds[world.kind](model, config, world)


def speed_up(model: MoRModel, config: TrainConfig, device: torch.device) -> None:
    """Apply `activation_checkpointing` and `compile` in place.

    Raises:
        ConfigError: `activation_checkpointing='recursion'` for a model whose recursions do not
            follow one another.
    """
    if device.type == "cpu":
        retain_freed_memory()
        # The head's gradient is there first, and takes the embedding's rows in place: else the
        # embedding would make a second array of the vocabulary's size, nearly all of it zeros.
        model.embed_tokens.sparse = model.config.tie_word_embeddings
    layers = [*model.prelude, *model.block, *model.coda]
    if config.compile and has_compiler(device):
        for layer in layers:
            # Where entries are positions, attention looks at positions on the host.
            assert isinstance(layer, Layer)
            part = layer.mlp if model.config.kv_policy.entries_are_positions else layer
            vars(part)["forward"] = torch.compile(part.forward, dynamic=True)
    if config.activation_checkpointing == "full":
        for layer in layers:
            vars(layer)["forward"] = recomputed(layer.forward)
    elif config.activation_checkpointing == "recursion":
        if model.config.sharing == "sequence":
            raise ConfigError(
                "activation_checkpointing='recursion' needs sharing='cycle'; with 'sequence' no "
                "recursion is a piece of its own: take 'full'."
            )
        vars(model)["run_block"] = recomputed(model.run_block)


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, which keeps its inputs only and runs again in the backward pass."""

    @functools.wraps(function)
    def run(*args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can work here; warns in one sentence where it cannot."""
    if device.type == "cuda":
        found, needed = importlib.util.find_spec("triton") is not None, "triton"
    else:
        found = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
        needed = "a C++ compiler (g++ or clang++)"
    if not found:
        warnings.warn(
            f"compile: true needs {needed}, which is not there: training goes on without.",
            stacklevel=2,
        )
    return found


class ParallelModel:
    """The model as a function of a batch, its gradients averaged over ranks; here: over one."""

    def __init__(self, model: MoRModel, config: TrainConfig, world: World) -> None:
        self._forward: nn.Module = model

    def __call__(self, inputs: Tensor, targets: Tensor, **options: Any) -> MoROutput:
        """The model's forward pass without logits, with its other options."""
        return self._forward(inputs, targets=targets, return_logits=False, **options)

    @contextmanager
    def micro_batch(self, last: bool) -> Generator[None, None, None]:
        """Surrounds forward and backward pass; gradients are exchanged in the step's last one."""
        yield


class DDPModel(ParallelModel):
    """Whole weights on every rank."""

    def __init__(self, model: MoRModel, config: TrainConfig, world: World) -> None:
        super().__init__(model, config, world)
        model.embed_tokens.sparse = False  # DDP would expect that of the whole gradient
        self._ddp = self._forward = DistributedDataParallel(
            model,
            forward_sync_buffers=False,  # the balancing bias moves by the same amount everywhere
            gradient_as_bucket_view=True,
            # without a gate in the result, a router may have no gradient
            find_unused_parameters=model.config.gating == "additive",
        )

    @contextmanager
    def micro_batch(self, last: bool) -> Generator[None, None, None]:
        with nullcontext() if last else self._ddp.no_sync():
            yield


class FSDPModel(ParallelModel):
    """A part of the weights on every rank; a layer's are gathered while it runs.

    Each layer is one unit, also a layer of the shared block, which runs R times; embedding, norm,
    head and routers belong to the model's own unit, so tied weights stay one.
    """

    def __init__(self, model: MoRModel, config: TrainConfig, world: World) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard  # loads for a second

        super().__init__(model, config, world)
        mesh = init_device_mesh(world.device.type, (world.size,))
        between = reshards_between_recursions(model.config, config)
        self._resident_units: list[FSDPModule] = []
        for layer in (*model.prelude, *model.coda):
            fully_shard(layer, mesh=mesh)
        for layer in model.block:
            unit = fully_shard(layer, mesh=mesh, reshard_after_forward=between)
            if not between:
                unit.set_reshard_after_backward(False, recurse=False)
                self._resident_units.append(unit)
        self._unit = fully_shard(model, mesh=mesh)

    @contextmanager
    def micro_batch(self, last: bool) -> Generator[None, None, None]:
        self._unit.set_requires_gradient_sync(last)
        for unit in self._resident_units:
            # A gradient that waits from the micro-batch before is sent after the first recursion
            # backward, which is another one on each rank: so none may wait.
            unit.set_requires_gradient_sync(True, recurse=False)
        yield
        if last:
            for unit in self._resident_units:
                unit.reshard()


def reshards_between_recursions(model: MoRConfig, config: TrainConfig) -> bool:
    """Whether FSDP frees a block layer's weights after each recursion, or after the step.

    Freeing them costs R gathers forward and R backward instead of one; keeping them costs the whole
    block's weights in memory. Ranks of token choice may differ in how many recursions their tokens
    take, so there nothing may be gathered in between.

    Raises:
        ConfigError: `fsdp_reshard='recursion'` with token choice.
    """
    ragged = model.routing == "token_choice"
    if ragged and config.fsdp_reshard == "recursion":
        raise ConfigError(
            "fsdp_reshard='recursion' cannot work with routing='token_choice', where ranks may "
            "take different numbers of recursions: take auto or step."
        )
    return not ragged and config.fsdp_reshard != "step"
