"""Layers prepared for inference: projections fused, weights packed, keys and values paged.

`TorchStack` runs anywhere, with the operations of `mor.ops.reference` or of `mor.ops.triton`;
`CpuStack` is one compiled call. Both give `x` after all layers of a stack.

Shape letters: N tokens, E width, H query heads, G key-value heads, D head size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mor.model.attention import RotaryEmbedding
from mor.model.config import MoRConfig
from mor.model.depth_lora import DepthLoRALinear
from mor.model.layers import Layer
from mor.model.norm import RMSNorm
from mor.ops.cpu.packed_weights import PackedLinear, PackedLoRA, Storage
from mor.ops.low_rank import LoRAPair, add_loras
from mor.ops.paged import AttentionMetadata, PagedKV, RopeTable


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One use of one layer in a stack."""

    layer: Layer
    kv_layer: int
    """Cell, counted from the first one of a cell group, that holds its keys and values."""
    writes_kv: bool
    """Whether it stores keys and values; otherwise an earlier pass has stored them."""
    depths: tuple[int, ...] = ()
    """For each range of `AttentionMetadata.depth_start_loc` the depth whose LoRA pairs its tokens
    get; empty if the layer has none."""


@runtime_checkable
class LayerStack(Protocol):
    """Layers that run one after another."""

    def run(self, x: Float[Tensor, "n e"], metadata: AttentionMetadata) -> Float[Tensor, "n e"]:
        """(N, E) states after all layers; x may be overwritten."""
        ...


@runtime_checkable
class KernelBackend(Protocol):
    """A way to run layers: it prepares stacks and the head from a model's modules."""

    name: str

    def build_stack(self, applications: Sequence[LayerCall]) -> LayerStack:
        """A stack of these calls; a layer that occurs twice is prepared once."""
        ...

    def compute_logits(
        self, norm: RMSNorm, weight: Float[Tensor, "v e"], x: Float[Tensor, "n e"]
    ) -> Float[Tensor, "n v"]:
        """(N, V) logits: final norm and head."""
        ...

    def greedy(self, logits: Float[Tensor, "n v"]) -> tuple[list[int], list[float]] | None:
        """The likeliest token of each row and its log-probability, if there is a fast way."""
        ...


def layers_of(modules: Iterable[nn.Module]) -> list[Layer]:
    """The layers of a module list."""
    return [module for module in modules if isinstance(module, Layer)]


def make_rope_table(config: MoRConfig, dtype: torch.dtype, device: torch.device) -> RopeTable:
    """RoPE's angles for every position that the model takes."""
    _, _, head_dim = config.num_heads_and_dim
    positions = torch.arange(config.max_position_embeddings, device=device)
    cos, sin = RotaryEmbedding.at(positions, head_dim, config.rope_theta, dtype)
    return RopeTable(cos=cos[:, 0].contiguous(), sin=sin[:, 0].contiguous())


def _fused_weights(layer: Layer) -> list[Tensor]:
    """A layer's matrices in the order of use, those with the same input as one: q; k and v; o; gate
    and up; down."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj.weight,
        torch.cat((attention.k_proj.weight, attention.v_proj.weight)),
        attention.o_proj.weight,
        torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
        mlp.down_proj.weight,
    ]


def _loras(application: LayerCall, dtype: torch.dtype) -> list[list[LoRAPair]]:
    """For each of `_fused_weights`, the LoRA pair of each depth of the call."""
    attention, mlp = application.layer.self_attn, application.layer.mlp
    together: Sequence[tuple[DepthLoRALinear, ...]] = (
        (attention.q_proj,),
        (attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    return [
        [
            LoRAPair.fused([d for m in ms if (d := m.lora(depth)) is not None], dtype)
            for depth in application.depths
        ]
        for ms in together
    ]


class TorchKernels(KernelBackend):
    """torch's own matrix products, with the operations of `mor.ops.reference` or `mor.ops.triton`.

    Args:
        operations: one of these modules.
        dtype: of weights, hidden states, keys and values.
        wrap: makes another stack of each one that is built, such as one of CUDA graphs.
    """

    def __init__(
        self,
        config: MoRConfig,
        operations: ModuleType,
        kv: PagedKV,
        dtype: torch.dtype,
        wrap: Callable[[LayerStack], LayerStack] | None = None,
    ) -> None:
        self.name = operations.__name__.rsplit(".", 1)[-1]
        self.operations = operations
        self.config = config
        self.kv = kv
        self.dtype = dtype
        self.rope_table = make_rope_table(config, dtype, kv.k.device)
        self._wrap = wrap
        self._head: Tensor | None = None

    def build_stack(self, applications: Sequence[LayerCall]) -> LayerStack:
        """A `TorchStack`, wrapped if there is a wrapper."""
        stack = TorchStack(self, applications)
        return stack if self._wrap is None else self._wrap(stack)

    def compute_logits(self, norm: RMSNorm, weight: Tensor, x: Tensor) -> Tensor:
        """(N, V) logits; the head's weights are converted once."""
        if self._head is None:
            self._head = weight.detach().to(self.dtype)
        return F.linear(self.operations.rms_norm(x, norm.weight, norm.eps), self._head)

    def greedy(self, logits: Tensor) -> None:
        """None: the sampler is as fast."""


class TorchStack(LayerStack):
    """A stack that runs operation by operation."""

    def __init__(self, kernels: TorchKernels, applications: Sequence[LayerCall]) -> None:
        self._kernels = kernels
        self._applications = list(applications)
        self._weights: dict[int, list[Tensor]] = {}
        for application in applications:
            if id(application.layer) not in self._weights:
                matrices = [m.detach().to(kernels.dtype) for m in _fused_weights(application.layer)]
                self._weights[id(application.layer)] = matrices
        self._loras = [_loras(application, kernels.dtype) for application in applications]

    def run(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """(N, E) states after all layers; x is not overwritten."""
        ops, kv = self._kernels.operations, self._kernels.kv
        _, groups, size = self._kernels.config.num_heads_and_dim
        rope = self._kernels.rope_table
        num_writing = metadata.slot_cells.shape[0]  # tokens, the first ones
        for application, loras in zip(self._applications, self._loras, strict=True):
            layer, kv_layer = application.layer, application.kv_layer
            # Each adds to y @ w the LoRA product of y at the depths of its rows.
            lora_q, lora_kv, lora_o, lora_gate_up, lora_down = (
                partial(add_loras, pairs, metadata.depth_start_loc) for pairs in loras
            )
            w_q, w_kv, w_o, w_gate_up, w_down = self._weights[id(layer)]
            before, after = layer.input_layernorm, layer.post_attention_layernorm
            y = ops.rms_norm(x, before.weight, before.eps)
            q = lora_q(y, F.linear(y, w_q)).unflatten(1, (-1, size))  # (N, H, D)
            q = self._norm_heads(layer.self_attn.q_norm, q)
            q = ops.rotate(q, rope, metadata)
            if application.writes_kv and num_writing:
                # (W, 2, G, D); tokens behind these find their keys and values in the pages.
                both = lora_kv(y, F.linear(y[:num_writing], w_kv)).unflatten(1, (2, groups, size))
                k = self._norm_heads(layer.self_attn.k_norm, both[:, 0])
                k = ops.rotate(k, rope, metadata)
                ops.store(k, both[:, 1], kv, kv_layer, metadata)
            # After the store: a token sees its own entry.
            y = ops.attend(q, kv, kv_layer, metadata).flatten(1)
            x = x + lora_o(y, F.linear(y, w_o))
            y = ops.rms_norm(x, after.weight, after.eps)
            y = ops.silu_mul(lora_gate_up(y, F.linear(y, w_gate_up)))
            x = x + lora_down(y, F.linear(y, w_down))
        return x

    def _norm_heads(self, norm: RMSNorm | None, heads: Tensor) -> Tensor:
        """(N, H, D) queries or keys, each head normalized if the layer has a norm for them."""
        if norm is None:
            return heads
        rows = heads.reshape(-1, heads.shape[-1])  # (N * H, D)
        rms_norm = self._kernels.operations.rms_norm
        return rms_norm(rows, norm.weight, norm.eps).view(heads.shape)


class CpuKernels(KernelBackend):
    """The compiled kernels of `mor.ops.cpu.kernels`: fp32 sums, weights in fp32, bf16 or int8."""

    name = "cpu"

    def __init__(
        self, config: MoRConfig, kv: PagedKV, storage: Storage, num_threads: int | None
    ) -> None:
        from mor.ops.cpu import gemm
        from mor.ops.cpu import kernels as cpu

        self.cpu = cpu
        self.config = config
        self.weight_dtype: Storage = storage
        self.weight_kind = {"float32": gemm.FLOAT32, "bfloat16": gemm.BFLOAT16, "int8": gemm.INT8}[
            storage
        ]
        self.num_threads = cpu.use_threads(num_threads or torch.get_num_threads())
        self.cells = kv.k.numpy(), kv.v.numpy()
        angles = make_rope_table(config, torch.float32, kv.k.device)
        self.cos_sin = angles.cos.numpy(), angles.sin.numpy()
        self._workspace: tuple[np.ndarray, ...] = ()
        self._packed: dict[int, list[PackedLinear]] = {}
        self._head: PackedLinear | None = None

    def pack(self, layer: Layer) -> list[PackedLinear]:
        """A layer's matrices, packed once however often it is used."""
        if id(layer) not in self._packed:
            packed = [PackedLinear(matrix, self.weight_dtype) for matrix in _fused_weights(layer)]
            self._packed[id(layer)] = packed
        return self._packed[id(layer)]

    def build_stack(self, applications: Sequence[LayerCall]) -> "CpuStack":
        """See `KernelBackend.build_stack`."""
        return CpuStack(self, applications)

    def workspace(self, rows: int) -> tuple[np.ndarray, ...]:
        """Room for what a layer computes: normed, q, kv, mixed, gate and up, inner, rounded."""
        if not self._workspace or self._workspace[0].shape[0] < rows:
            heads, groups, size = self.config.num_heads_and_dim
            width, inner = self.config.hidden_size, self.config.intermediate_size
            widths = (width, heads * size, 2 * groups * size, heads * size, 2 * inner, inner)
            floats = (np.zeros((rows, w), np.float32) for w in widths)
            widest = max(width, heads * size, inner) + 3 & ~3
            rounded = np.zeros((rows, 2 * widest), np.uint8)  # bytes or int16
            self._workspace = (*floats, rounded, np.zeros(rows, np.float32))
        return self._workspace

    def weight_pointer(self, weight: PackedLinear) -> tuple[int, int, int]:
        """How the compiled code finds a weight: data, scales, levels."""
        return weight.data.data_ptr(), weight.scales.data_ptr(), weight.max_quantized_input

    def linear(self, weight: PackedLinear, x: np.ndarray, rows: int, out: np.ndarray) -> None:
        """out[:rows] = x[:rows] @ weight.T."""
        found, rounded = np.array(self.weight_pointer(weight)), self.workspace(rows)[-2:]
        self.cpu.linear(self.num_threads, self.weight_kind, x, rows, found, out, 0, rounded)

    def compute_logits(self, norm: RMSNorm, weight: Tensor, x: Tensor) -> Tensor:
        """See `KernelBackend.compute_logits`."""
        if self._head is None:
            self._head = PackedLinear(weight, self.weight_dtype)
        head, num, room = self._head, x.shape[0], self.workspace(x.shape[0])
        logits = np.empty((num, head.padded_features), np.float32)
        self.cpu.readout(
            *(
                self.num_threads,
                self.weight_kind,
                x.numpy(),
                num,
                norm.weight.detach().float().numpy(),
            ),
            *(norm.eps, np.array(self.weight_pointer(head)), room[0], logits, room[-2:]),
        )
        return torch.from_numpy(logits)[:, : head.out_features]

    def greedy(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """See `KernelBackend.greedy`; takes what `readout` gave."""
        num, vocabulary = logits.shape
        tokens, logprobs = np.empty(num, np.int64), np.empty(num, np.float32)
        width = logits.stride(0)  # rows are padded to whole panels
        rows = logits.as_strided((num, width), (width, 1)).numpy()
        self.cpu.greedy(self.num_threads, rows, num, vocabulary, tokens, logprobs)
        return tokens.tolist(), logprobs.tolist()


class CpuStack(LayerStack):
    """A stack that is one compiled call."""

    def __init__(self, kernels: CpuKernels, applications: Sequence[LayerCall]) -> None:
        self._kernels = kernels
        packed = [kernels.pack(a.layer) for a in applications]
        weights = np.array([[kernels.weight_pointer(w) for w in ws] for ws in packed], np.int64)
        homes = np.array([a.kv_layer for a in applications], np.int64)
        writes = np.array([int(a.writes_kv) for a in applications], np.int64)
        self.loras = [[PackedLoRA(d) for d in _loras(a, torch.float32)] for a in applications]
        found = [[[kernels.weight_pointer(w) for w in d.packed] for d in ds] for ds in self.loras]
        deltas = np.array(found, np.int64).reshape(len(found), len(found[0]), -1, 3)
        widths = np.array([d.width for d in self.loras[0]], np.int64)
        self._lora_width = int(widths.max())
        pairs = [(a.layer.input_layernorm, a.layer.post_attention_layernorm) for a in applications]
        scales = torch.stack([torch.stack([n.weight.detach() for n in pair]) for pair in pairs])
        norms = scales.float().numpy()
        self.packed = packed  # what the addresses point to
        self._layers = (homes, writes, weights, norms, pairs[0][0].eps, deltas, widths)
        self.clock = np.zeros(3, np.int64)
        """Cycles spent in products, in attention, in all else."""

    @property
    def num_layers(self) -> int:
        """Applications of layers in one run."""
        return len(self.packed)

    def cycles(self) -> int:
        """Now, on the clock that `clock` counts by."""
        return int(self._kernels.cpu.read_cycles())

    def run(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See `LayerStack.run`; overwrites x."""
        kernels = self._kernels
        fields = (
            metadata.positions,
            metadata.context_lens,
            metadata.query_start_loc,
            metadata.page_tables,
        )
        fields += (metadata.slot_cells, metadata.slot_offsets)
        groups, thin = (
            np.array(metadata.depth_start_loc, np.int64),
            np.empty((len(x), self._lora_width), np.float32),
        )
        kernels.cpu.run_layers(
            *(
                kernels.num_threads,
                x.numpy(),
                x.shape[0],
                kernels.weight_kind,
                self._layers,
                kernels.cells,
            ),
            (*(field.numpy() for field in fields), groups),
            *(kernels.cos_sin, (*kernels.workspace(x.shape[0]), thin), self.clock),
        )
        return x


def fits_cpu_kernels(config: MoRConfig, block_size: int) -> bool:
    """Whether the compiled kernels take this model: no q and k norms, panels of 16 everywhere."""
    _, _, size = config.num_heads_and_dim
    widths = (config.hidden_size, config.intermediate_size, size, block_size)
    return not config.qk_norm and all(width % 16 == 0 for width in widths)
