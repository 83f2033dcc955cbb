"""Where and how a model runs: device, dtypes, kernels, CUDA graphs."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from mor.engine.config import EngineConfig
from mor.engine.kernels.cpu_backend import CpuKernels, fits_cpu_kernels
from mor.engine.kernels.layer_stack import KernelBackend, LayerStack
from mor.engine.kernels.torch_backend import TorchKernels
from mor.engine.kv_cache import KVCache
from mor.engine.multistep.cuda_graphs import CUDAGraphLayerStack
from mor.errors import ConfigError
from mor.model.transformer import MoRModel
from mor.ops.cpu.packed_weights import WeightDType

_DEFAULT_SCHEDULER_STEPS = 8  # a few milliseconds on a GPU: what a new request may have to wait


@dataclass(frozen=True, kw_only=True)
class ExecutionBackend:
    """Where and how one engine runs its model: its config's settings, and defaults for the rest."""

    device: torch.device
    weight_dtype: torch.dtype
    """Dtype of the weights; with `quantization` those of layers and head are int8 instead."""
    compute_dtype: torch.dtype
    """Dtype of hidden states, keys and values."""
    kernels: str
    """`reference`, `cpu` or `triton`."""
    num_scheduler_steps: int
    """Decode steps that run in a row on the device; 1: the host looks after each."""

    @classmethod
    def select(cls, model: MoRModel, config: EngineConfig) -> "ExecutionBackend":
        """The fastest kernels that device, dtype and shapes allow, unless the config names some.

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
        # The compiled CPU kernels read float32 or bfloat16 weights in panels of 16.
        fits = fits_cpu_kernels(model.config, config.block_size)
        small = weights in (torch.float32, torch.bfloat16)
        kernels = config.kernels or _fastest_kernels(device, fits and small)
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
        # Triton's own variable: its kernels then run as Python, on any device, for tests.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if kernels == "triton" and device.type != "cuda" and not interpreted:
            raise ConfigError(f"kernels='triton' needs device='cuda', not {device.type!r}.")
        if config.quantization and kernels != "cpu":
            raise ConfigError(
                f"quantization={config.quantization!r} needs kernels='cpu' (see there for what "
                f"they take), and these settings run with {kernels!r}: leave it out."
            )
        # The CPU kernels widen weights while they read them; all sums are float32.
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
        """The kernels, with the model's weights in the form that they take."""
        if self.kernels == "cpu":
            plain: WeightDType = "bfloat16" if self.weight_dtype == torch.bfloat16 else "float32"
            stored: WeightDType = "int8" if config.quantization == "int8" else plain
            return CpuKernels(model.config, cache.kv, stored, config.num_threads)
        operations = importlib.import_module(f"mor.ops.{self.kernels}")
        # A graph has fixed shapes; LoRA pairs are added to the tokens of each depth, and how many
        # these are varies from step to step.
        graphs = self.kernels == "triton" and not model.config.relaxation_rank
        wrap = self._graphs(model, cache) if graphs else None
        return TorchKernels(model.config, operations, cache.kv, self.compute_dtype, wrap)

    def _graphs(self, model: MoRModel, cache: KVCache) -> Callable[[LayerStack], LayerStack]:
        """What wraps a stack, so that its decode steps are CUDA graphs."""
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
        """The stream that records all CUDA graphs of this engine, no others; None: no graphs."""
        return (
            torch.cuda.Stream(self.device) if uses_cuda_graphs(self.kernels, self.device) else None
        )


def _fastest_kernels(device: torch.device, fits_cpu: bool) -> str:
    if device.type == "cuda":
        return "triton"
    return "cpu" if fits_cpu else "reference"


def uses_cuda_graphs(kernels: str, device: torch.device) -> bool:
    """Whether decode steps are recorded as CUDA graphs."""
    return kernels == "triton" and device.type == "cuda"


def _resolve_num_scheduler_steps(
    model: MoRModel, config: EngineConfig, device: torch.device, kernels: str
) -> int:
    """`EngineConfig.num_scheduler_steps`, or the default for these kernels.

    Raises:
        ConfigError: steps in a row are asked for, and something needs the host after each.
    """
    obstacle = None
    if kernels == "cpu":
        obstacle = "kernels='cpu', which wait for nobody"
    elif config.batching == "sequence":
        obstacle = "batching='sequence', which waits for the deepest token"
    elif model.config.relaxation_rank:
        obstacle = "relaxation_rank, whose tokens are sorted by depth on the host"
    if obstacle is None:
        return config.num_scheduler_steps or (
            _DEFAULT_SCHEDULER_STEPS if uses_cuda_graphs(kernels, device) else 1
        )
    if (config.num_scheduler_steps or 1) > 1:
        raise ConfigError(
            f"num_scheduler_steps={config.num_scheduler_steps} does not go with {obstacle}: "
            "leave it out."
        )
    return 1
