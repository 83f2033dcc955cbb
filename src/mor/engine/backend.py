"""Where and how a model runs: device, dtype, kernels, and the memory for keys and values."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from mor.engine.config import EngineConfig
from mor.engine.kv_cache import KVCache
from mor.engine.layer_stack import (
    CpuKernels,
    KernelBackend,
    LayerStack,
    TorchKernels,
    fits_cpu_kernels,
)
from mor.engine.multistep.cuda_graphs import CUDAGraphLayerStack
from mor.errors import ConfigError
from mor.model.transformer import MoRModel
from mor.ops.cpu.packed_weights import Storage

_DEFAULT_SCHEDULER_STEPS = 8  # a few milliseconds on a GPU: what a new request may have to wait


@dataclass(frozen=True, kw_only=True)
class ExecutionBackend:
    """The choice that was made."""

    device: torch.device
    weight_dtype: torch.dtype
    """How weights are kept (int8 apart)."""
    compute_dtype: torch.dtype
    """Of hidden states, keys and values."""
    kernels: str
    num_scheduler_steps: int
    """Decode ticks in a row without the host."""

    @classmethod
    def select(cls, model: MoRModel, config: EngineConfig) -> "ExecutionBackend":
        """The fastest way that fits.

        Raises:
            ConfigError: the settings contradict each other or the model's shapes.
        """
        own = model.embed_tokens.weight
        try:
            device = torch.device(config.device) if config.device else own.device
        except RuntimeError as error:
            raise ConfigError(f"device={config.device!r} is none: use 'cpu' or 'cuda'.") from error
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device={str(device)!r} is not supported: use 'cpu' or 'cuda'.")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={config.device!r}: torch sees no GPU here; use 'cpu'.")
        weights = getattr(torch, config.dtype) if config.dtype else own.dtype
        fits = fits_cpu_kernels(model.config, config.block_size)
        small = weights in (torch.float32, torch.bfloat16)
        best = "triton" if device.type == "cuda" else "cpu" if fits and small else "reference"
        kernels = config.kernels or best
        if kernels == "cpu" and model.config.qk_norm:
            raise ConfigError("kernels='cpu' has no qk_norm yet: use kernels='reference'.")
        if kernels == "cpu" and (device.type != "cpu" or not small or not fits):
            raise ConfigError(
                "kernels='cpu' needs a CPU, float32 or bfloat16, and hidden_size, "
                "intermediate_size, head_dim and block_size that are multiples of 16; here: "
                f"{device.type}, {weights}, {model.config.hidden_size}, "
                f"{model.config.intermediate_size}, {model.config.head_dim}, {config.block_size}. "
                "Use kernels='reference'."
            )
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if kernels == "triton" and device.type != "cuda" and not interpreted:
            raise ConfigError(f"kernels='triton' needs device='cuda', not {device.type!r}.")
        if config.quantization and kernels != "cpu":
            raise ConfigError(
                f"quantization={config.quantization!r} needs kernels='cpu' (see there for what "
                f"they take), and these settings run with {kernels!r}: leave it out."
            )
        compute = torch.float32 if kernels == "cpu" else weights
        num_scheduler_steps = _resolve_num_scheduler_steps(model, config, device, kernels)
        return cls(
            device=device,
            weight_dtype=weights,
            compute_dtype=compute,
            kernels=kernels,
            num_scheduler_steps=num_scheduler_steps,
        )

    def kernels_for(self, model: MoRModel, config: EngineConfig, cache: KVCache) -> KernelBackend:
        """Load the kernels."""
        if self.kernels == "cpu":
            plain: Storage = "bfloat16" if self.weight_dtype == torch.bfloat16 else "float32"
            storage: Storage = "int8" if config.quantization == "int8" else plain
            return CpuKernels(model.config, cache.kv, storage, config.num_threads)
        operations = importlib.import_module(f"mor.ops.{self.kernels}")
        # A graph has fixed shapes, and the lanes of each depth, which have deltas, vary in number.
        graphs = self.kernels == "triton" and not model.config.relaxation_rank
        wrap = self._graphs(model, cache) if graphs else None
        return TorchKernels(model.config, operations, cache.kv, self.compute_dtype, wrap)

    def _graphs(self, model: MoRModel, cache: KVCache) -> Callable[[LayerStack], LayerStack]:
        """Decode ticks as CUDA graphs."""
        return partial(
            CUDAGraphLayerStack,
            width=model.config.hidden_size,
            table_width=cache.table_width,
            dtype=self.compute_dtype,
            device=self.device,
            stream=self.capture_stream,
        )

    @cached_property
    def capture_stream(self) -> torch.cuda.Stream | None:
        """Where all CUDA graphs of this engine are recorded, and no others; None: nothing is."""
        return (
            torch.cuda.Stream(self.device) if uses_cuda_graphs(self.kernels, self.device) else None
        )


def uses_cuda_graphs(kernels: str, device: torch.device) -> bool:
    """Whether ticks become CUDA graphs."""
    return kernels == "triton" and device.type == "cuda"


def _resolve_num_scheduler_steps(
    model: MoRModel, config: EngineConfig, device: torch.device, kernels: str
) -> int:
    """`EngineConfig.num_scheduler_steps`, or what suits; ConfigError if it cannot be."""
    obstacle = (
        "kernels='cpu', which wait for nobody"
        if kernels == "cpu"
        else "batching='sequence', which waits for the deepest token"
        if config.batching == "sequence"
        else "relaxation_rank, whose lanes are sorted by depth on the host"
        if model.config.relaxation_rank
        else None
    )
    if obstacle is None:
        return config.num_scheduler_steps or (
            _DEFAULT_SCHEDULER_STEPS if uses_cuda_graphs(kernels, device) else 1
        )
    if (config.num_scheduler_steps or 1) > 1:
        raise ConfigError(
            f"burst={config.num_scheduler_steps} does not go with {obstacle}: leave it out."
        )
    return 1
