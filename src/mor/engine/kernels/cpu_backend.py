"""The compiled CPU kernels of `mor.ops.cpu` as a `KernelBackend`: weights packed, one call a stack.

Shape letters as in `layer_stack`, and M rows of the workspace.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mor.engine.kernels.layer_stack import (
    KernelBackend,
    LayerCall,
    LayerStack,
    fused_loras,
    fused_weights,
    make_rope_table,
)
from mor.model.config import MoRConfig
from mor.model.layers import Layer
from mor.model.norm import RMSNorm
from mor.ops.cpu.cpu_features import SIMD_WIDTH
from mor.ops.cpu.packed_weights import PackedLinear, PackedLoRA, WeightDType, dtype_code
from mor.ops.cpu.records import (
    AttentionBatch,
    KVCells,
    LayerWeights,
    NormWeight,
    PackedWeight,
    Quantized,
    Workspace,
)
from mor.ops.paged import AttentionMetadata, PagedKV


def fits_cpu_kernels(config: MoRConfig, block_size: int) -> bool:
    """Whether the compiled kernels take this model: no q and k norms, whole vectors everywhere."""
    _, _, size = config.num_heads_and_dim
    widths = (config.hidden_size, config.intermediate_size, size, block_size)
    return not config.qk_norm and all(width % SIMD_WIDTH == 0 for width in widths)


class CpuKernels(KernelBackend):
    """The compiled kernels of `mor.ops.cpu.kernels`: fp32 sums, weights in fp32, bf16 or int8."""

    name = "cpu"

    def __init__(
        self, config: MoRConfig, kv: PagedKV, weight_dtype: WeightDType, num_threads: int | None
    ) -> None:
        from mor.ops.cpu import kernels  # here, since Numba takes half a second to import

        self.ops: ModuleType = kernels
        self.config = config
        self.weight_dtype: WeightDType = weight_dtype
        self.num_threads: int = kernels.use_threads(num_threads or torch.get_num_threads())
        self.cells = KVCells.of(kv)
        self.rope_table = make_rope_table(config, torch.float32, kv.k.device)
        self._workspace: Workspace | None = None
        self._packed: dict[int, list[PackedLinear]] = {}
        self._head: PackedLinear | None = None

    def pack(self, layer: Layer) -> list[PackedLinear]:
        """A layer's matrices, packed once however often it is used."""
        if id(layer) not in self._packed:
            packed = [PackedLinear(matrix, self.weight_dtype) for matrix in fused_weights(layer)]
            self._packed[id(layer)] = packed
        return self._packed[id(layer)]

    def build_stack(self, calls: Sequence[LayerCall]) -> "CpuStack":
        """A stack whose layers are packed."""
        return CpuStack(self, calls)

    def workspace(self, rows: int) -> Workspace:
        """Memory for so many rows, without that for LoRA pairs; reused until more are asked for."""
        if self._workspace is None or self._workspace.normed.shape[0] < rows:
            self._workspace = self._new_workspace(rows)
        return self._workspace

    def _new_workspace(self, rows: int) -> Workspace:
        heads, num_kv_heads, size = self.config.num_heads_and_dim
        width, inner = self.config.hidden_size, self.config.intermediate_size

        def floats(columns: int) -> np.ndarray:
            return np.zeros((rows, columns), np.float32)

        # Quantized inputs of the widest product: bytes or int16, filled up to whole steps of four.
        widest = max(width, heads * size, inner) + 3 & ~3
        return Workspace(
            normed=floats(width),
            q=floats(heads * size),
            kv=floats(2 * num_kv_heads * size),
            attn_out=floats(heads * size),
            gate_up=floats(2 * inner),
            inner=floats(inner),
            quantized=np.zeros((rows, 2 * widest), np.uint8),
            quantized_scales=np.zeros(rows, np.float32),
            lora_out=floats(0),
            clock=np.zeros(3, np.int64),
        )

    def packed_weight(self, weight: PackedLinear) -> PackedWeight:
        """Where compiled code finds a weight."""
        return PackedWeight(dtype_code(weight.weight_dtype), *weight.pointers)

    def linear(self, weight: PackedLinear, x: np.ndarray, out: np.ndarray) -> None:
        """out = x @ weight.T, for all rows of x; out may have more."""
        workspace = self.workspace(x.shape[0])
        quantized = Quantized(values=workspace.quantized, scales=workspace.quantized_scales)
        self.ops.linear(self.num_threads, x, self.packed_weight(weight), out, 0, quantized)

    def compute_logits(self, norm: RMSNorm, weight: Tensor, x: Tensor) -> Tensor:
        """Logits of the final norm's output; the head is packed once."""
        if self._head is None:
            self._head = PackedLinear(weight, self.weight_dtype)
        head, num = self._head, x.shape[0]
        logits = np.empty((num, head.padded_features), np.float32)
        self.ops.norm_and_head(
            self.num_threads,
            x.numpy(),
            NormWeight(weight=norm.weight.detach().float().numpy(), eps=norm.eps),
            self.packed_weight(head),
            self.workspace(num),
            logits,
        )
        return torch.from_numpy(logits)[:, : head.out_features]

    def greedy(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """The likeliest token of each row, and its log-probability."""
        num, vocabulary = logits.shape
        tokens, logprobs = np.empty(num, np.int64), np.empty(num, np.float32)
        # Logits are a view of rows that are filled up to whole panels: undo the cut.
        width = logits.stride(0)
        rows = logits.as_strided((num, width), (width, 1)).numpy()
        self.ops.greedy(self.num_threads, rows, vocabulary, tokens, logprobs)
        return tokens.tolist(), logprobs.tolist()


class CpuStack(LayerStack):
    """A stack that is one compiled call."""

    def __init__(self, kernels: CpuKernels, calls: Sequence[LayerCall]) -> None:
        self._kernels = kernels
        # The packed weights are kept, since compiled code knows only their addresses.
        self.packed = [kernels.pack(call.layer) for call in calls]
        self.loras = [
            [PackedLoRA(pairs) for pairs in fused_loras(call, torch.float32)] for call in calls
        ]
        self._layers = self._layer_weights(calls)
        self.clock = np.zeros(3, np.int64)
        """Cycles spent in products, in attention, in all else."""

    def _layer_weights(self, calls: Sequence[LayerCall]) -> LayerWeights:
        """Addresses of all weights, and what else the compiled code must know of the layers."""
        pointers = [[weight.pointers for weight in weights] for weights in self.packed]
        lora_pointers = np.array(
            [[[w.pointers for w in lora.packed] for lora in loras] for loras in self.loras],
            np.int64,
        )
        norms = [(c.layer.input_layernorm, c.layer.post_attention_layernorm) for c in calls]
        norm_weights = [torch.stack([norm.weight.detach() for norm in pair]) for pair in norms]
        rope_table = self._kernels.rope_table
        return LayerWeights(
            dtype=dtype_code(self._kernels.weight_dtype),
            pointers=np.array(pointers, np.int64),
            norms=torch.stack(norm_weights).float().numpy(),
            eps=norms[0][0].eps,
            kv_layers=np.array([call.kv_layer for call in calls], np.int64),
            writes_kv=np.array([int(call.writes_kv) for call in calls], np.int64),
            # Without LoRA pairs the third dimension is empty, and numpy drops the fourth.
            lora_pointers=lora_pointers.reshape(len(calls), len(self.loras[0]), -1, 3),
            lora_widths=np.array([lora.width for lora in self.loras[0]], np.int64),
            cos=rope_table.cos.numpy(),
            sin=rope_table.sin.numpy(),
        )

    @property
    def num_layers(self) -> int:
        """Calls of layers in one run."""
        return len(self.packed)

    def cycles(self) -> int:
        """Now, on the clock that `clock` counts by."""
        return int(self._kernels.ops.read_cycles())

    def run(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """The states after all layers, in x."""
        kernels = self._kernels
        lora_width = int(self._layers.lora_widths.max())
        workspace = kernels.workspace(x.shape[0])._replace(
            lora_out=np.empty((x.shape[0], lora_width), np.float32), clock=self.clock
        )
        kernels.ops.run_layers(
            kernels.num_threads,
            x.numpy(),
            self._layers,
            kernels.cells,
            AttentionBatch.of(metadata),
            workspace,
        )
        return x
