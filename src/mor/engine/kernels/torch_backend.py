"""The backend that runs anywhere: torch's products, and operations of a module of `mor.ops`.

Shape letters as in `layer_stack`, and I inner width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
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
from mor.model.norm import RMSNorm
from mor.ops.low_rank import add_loras
from mor.ops.paged import AttentionMetadata, PagedKV


class TorchKernels(KernelBackend):
    """torch's own matrix products with the operations of a module like `mor.ops.reference`.

    Args:
        operations: the module; its name is the backend's.
        kv: the pool that all stacks share.
        dtype: of weights and states.
        wrap: given each new stack, such as `CUDAGraphLayerStack`, which records and replays it.
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

    def build_stack(self, calls: Sequence[LayerCall]) -> LayerStack:
        """A `TorchStack`, wrapped if there is a wrapper."""
        stack = TorchStack(self, calls)
        return stack if self._wrap is None else self._wrap(stack)

    def compute_logits(self, norm: RMSNorm, weight: Tensor, x: Tensor) -> Tensor:
        """Logits of the final norm's output; the head is converted once."""
        if self._head is None:
            self._head = weight.detach().to(self.dtype)
        return F.linear(self.operations.rms_norm(x, norm.weight, norm.eps), self._head)

    def greedy(self, logits: Tensor) -> None:
        """None: the sampler is as fast."""


class TorchStack(LayerStack):
    """A stack that runs operation by operation."""

    def __init__(self, kernels: TorchKernels, calls: Sequence[LayerCall]) -> None:
        self._kernels = kernels
        self._calls = list(calls)
        self._weights: dict[int, list[Tensor]] = {}
        for call in calls:
            if id(call.layer) not in self._weights:
                matrices = [m.detach().to(kernels.dtype) for m in fused_weights(call.layer)]
                self._weights[id(call.layer)] = matrices
        self._loras = [fused_loras(call, kernels.dtype) for call in calls]

    def run(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """The states after all layers, in new memory."""
        ops, kv = self._kernels.operations, self._kernels.kv
        _, num_kv_heads, size = self._kernels.config.num_heads_and_dim
        rope, num_writing = self._kernels.rope_table, metadata.slot_cells.shape[0]
        for call, loras in zip(self._calls, self._loras, strict=True):
            w_q, w_kv, w_o, w_gate_up, w_down = self._weights[id(call.layer)]
            lora_q, lora_kv, lora_o, lora_gate_up, lora_down = (
                partial(add_loras, pairs, metadata.depth_start_loc) for pairs in loras
            )
            norm_1, norm_2 = call.layer.input_layernorm, call.layer.post_attention_layernorm
            y = ops.rms_norm(x, norm_1.weight, norm_1.eps)
            q = lora_q(y, F.linear(y, w_q)).unflatten(1, (-1, size))  # (N, H, D)
            q = self._norm_heads(call.layer.self_attn.q_norm, q)
            q = ops.rotate(q, rope, metadata)
            # Tokens that write come first. They are stored before anybody attends: a token sees
            # its own entry, and those of the tokens before it in the same batch.
            if call.writes_kv and num_writing:
                both = lora_kv(y, F.linear(y[:num_writing], w_kv))
                both = both.unflatten(1, (2, num_kv_heads, size))  # (W, 2, G, D)
                k = self._norm_heads(call.layer.self_attn.k_norm, both[:, 0])
                k = ops.rotate(k, rope, metadata)
                ops.store(k, both[:, 1], kv, call.kv_layer, metadata)
            y = ops.attend(q, kv, call.kv_layer, metadata).flatten(1)  # (N, H * D)
            x = x + lora_o(y, F.linear(y, w_o))
            y = ops.rms_norm(x, norm_2.weight, norm_2.eps)
            y = ops.silu_mul(lora_gate_up(y, F.linear(y, w_gate_up)))  # (N, I)
            x = x + lora_down(y, F.linear(y, w_down))
        return x

    def _norm_heads(self, norm: RMSNorm | None, heads: Tensor) -> Tensor:
        """(N, H, D) queries or keys, each head normalized if the layer has a norm for them."""
        if norm is None:
            return heads
        rows = heads.reshape(-1, heads.shape[-1])  # (N * H, D)
        rms_norm = self._kernels.operations.rms_norm
        return rms_norm(rows, norm.weight, norm.eps).view(heads.shape)
