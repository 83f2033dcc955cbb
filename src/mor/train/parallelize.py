"""What is put around a model before it trains: compilation, checkpointing, sharding.

`parallelize` shows the order; one function applies each technique. The classes below it run the
model over a batch and decide when gradients are exchanged between ranks.
"""

import importlib.util
import os
import shutil
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.layers import Layer
from mor.model.transformer import MoRModel, MoROutput
from mor.ops.malloc import retain_freed_memory
from mor.train.config import TrainConfig
from mor.train.distributed import World


def parallelize(model: MoRModel, config: TrainConfig, world: World) -> "ParallelModel":
    """Compile, checkpoint and shard `model` in place, and return what runs it over batches.

    Names of parameters stay as they are. Build the optimizer afterwards: FSDP replaces parameters.

    Raises:
        ConfigError: `activation_checkpointing='recursion'` with `sharing='sequence'`, or
            `fsdp_reshard='recursion'` with token choice.
    """
    if world.device.type == "cpu":
        retain_freed_memory()
        accumulate_embedding_gradient_in_place(model)
    # Compiled first, so that checkpointing surrounds whole compiled layers: inside a compiled
    # layer it would lose the keys and values that a shared layer keeps for later recursions.
    if config.compile:
        apply_compile(model, world.device)
    apply_activation_checkpointing(model, config)
    # Sharding last: DDP and FSDP hook into modules and parameters as they finally are.
    wrappers = {"none": ParallelModel, "ddp": DDPModel, "fsdp": FSDPModel}
    return wrappers[world.kind](model, config, world)


def accumulate_embedding_gradient_in_place(model: MoRModel) -> None:
    """Have a tied embedding add its rows to the head's gradient instead of making a second array.

    The head's (V, E) gradient is there first, and takes sparse rows in place; a dense gradient of
    the embedding would be another (V, E) array, nearly all of it zeros.
    """
    model.embed_tokens.sparse = model.config.tie_word_embeddings


def apply_compile(model: MoRModel, device: torch.device) -> None:
    """Compile each layer in place, if a compiler is there; sequence lengths stay dynamic."""
    if not has_compiler(device):
        return
    for layer in (*model.prelude, *model.block, *model.coda):
        assert isinstance(layer, Layer)
        # Attention whose KV entries are positions looks at them on the host, which the compiler
        # cannot follow: there the MLP alone is compiled.
        part = layer.mlp if model.config.kv_policy.entries_are_positions else layer
        part.compile(dynamic=True)


def apply_activation_checkpointing(model: MoRModel, config: TrainConfig) -> None:
    """Set what `model` computes again in the backward pass (`MoRModel.activation_checkpointing`).

    Raises:
        ConfigError: `recursion` for a model whose recursions do not follow one another.
    """
    if config.activation_checkpointing == "recursion" and model.config.sharing == "sequence":
        raise ConfigError(
            "activation_checkpointing='recursion' needs sharing='cycle'; with 'sequence' no "
            "recursion is a piece of its own: take 'full'."
        )
    model.activation_checkpointing = config.activation_checkpointing


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds the compiler that it needs for `device`; warns if not."""
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
    """The model as a function of a batch; its gradients are averages over ranks, here over one."""

    def __init__(self, model: MoRModel, config: TrainConfig, world: World) -> None:
        self._forward: nn.Module = model

    def __call__(self, inputs: Tensor, targets: Tensor, **options: Any) -> MoROutput:
        """`MoRModel.forward` of (B, T) inputs and targets without logits; `options` are its own."""
        return self._forward(inputs, targets=targets, return_logits=False, **options)

    @contextmanager
    def micro_batch(self, last: bool) -> Generator[None, None, None]:
        """Context for a forward and a backward pass.

        Args:
            last: the optimizer step's last one, in which ranks exchange gradients.
        """
        yield


class DDPModel(ParallelModel):
    """The model with whole weights on every rank."""

    def __init__(self, model: MoRModel, config: TrainConfig, world: World) -> None:
        super().__init__(model, config, world)
        model.embed_tokens.sparse = False  # DDP would take the whole tied gradient to be sparse
        self._ddp = self._forward = DistributedDataParallel(
            model,
            forward_sync_buffers=False,  # the balancing bias moves by the same amount everywhere
            gradient_as_bucket_view=True,
            # With additive gating the router's output is not in the result: it may get no gradient.
            find_unused_parameters=model.config.gating == "additive",
        )

    @contextmanager
    def micro_batch(self, last: bool) -> Generator[None, None, None]:
        with nullcontext() if last else self._ddp.no_sync():
            yield


class FSDPModel(ParallelModel):
    """The model with a part of each weight on every rank; a layer's are gathered while it runs.

    Each layer is one unit, also a layer of the shared block, which runs R times; embedding, norm,
    head and routers belong to the model's own unit, so tied weights stay one.
    """

    def __init__(self, model: MoRModel, config: TrainConfig, world: World) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard  # loads for a second

        super().__init__(model, config, world)
        mesh = init_device_mesh(world.device.type, (world.size,))
        reshards = reshards_between_recursions(model.config, config)
        self._resident_units: list[FSDPModule] = []
        """Units that stay gathered from the step's first recursion to its end."""
        for layer in (*model.prelude, *model.coda):
            fully_shard(layer, mesh=mesh)
        for layer in model.block:
            unit = fully_shard(layer, mesh=mesh, reshard_after_forward=reshards)
            if not reshards:
                unit.set_reshard_after_backward(False, recurse=False)
                self._resident_units.append(unit)
        # The model itself last: its unit takes the parameters that no layer's unit has taken.
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
    """Whether FSDP frees a block layer's gathered weights after each recursion, or per step only.

    Freeing them costs R gathers forward and R backward instead of one; keeping them costs the whole
    block's weights in memory. With token choice ranks may differ in how many recursions their
    tokens take, so nothing can be gathered between recursions.

    Raises:
        ConfigError: `fsdp_reshard='recursion'` with token choice.
    """
    ranks_differ = model.routing == "token_choice"
    if ranks_differ and config.fsdp_reshard == "recursion":
        raise ConfigError(
            "fsdp_reshard='recursion' cannot work with routing='token_choice', where ranks may "
            "take different numbers of recursions: take auto or step."
        )
    return not ranks_differ and config.fsdp_reshard != "step"
