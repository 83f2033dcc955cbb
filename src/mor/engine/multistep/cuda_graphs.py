"""CUDA graphs for decode steps: one recorded launch instead of a few hundred.

A graph replays the same kernels on the same memory. So tokens are copied into fixed buffers, and
the batch is padded to the next size in `_BUCKETS`: the rows behind the tokens see no KV entry and
store none, and nobody reads what they compute.

Shape letters: N tokens, B rows of a padded batch, E width.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mor.engine.kernels.layer_stack import LayerStack
from mor.ops.paged import AttentionMetadata

# Sizes of padded batches: each costs a recording, so they lie denser where padding would cost more.
_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def padded_batch_size(num_tokens: int) -> int:
    """The smallest bucket that holds so many tokens; behind the last one multiples of 256."""
    return next((size for size in _BUCKETS if size >= num_tokens), -(-num_tokens // 256) * 256)


def eager(stack: LayerStack) -> LayerStack:
    """The stack without graphs of its own, to be part of a larger graph."""
    return stack.stack if isinstance(stack, CUDAGraphLayerStack) else stack


class CUDAGraphFunction:
    """A function on fixed memory that is recorded when it first runs, and replayed from then on.

    Its result lies in the graph's memory: the next replay overwrites it.

    Args:
        stream: records; without, the function runs as it is, for tests on a CPU. Graphs of a stream
            share its cuBLAS workspace, which torch frees as soon as one of them is dropped (pytorch
            issue 193402): only graphs that are dropped together may share a stream.
    """

    def __init__(
        self, function: Callable[[], Tensor], stream: torch.cuda.Stream | None = None
    ) -> None:
        self._function = function
        self._stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: Tensor | None = None

    def __call__(self) -> Tensor:
        """The function's result, valid until the next call."""
        if self._stream is None:
            return self._function()
        if self._graph is None:
            return self._record(self._stream)
        self._graph.replay()
        assert self._out is not None
        return self._out

    def _record(self, stream: torch.cuda.Stream) -> Tensor:
        """Run once, which compiles every kernel, then record, which runs nothing.

        The result is that of the run, so that a first call does its work once, too.
        """
        # The recording stream waits for what the caller has queued, then the caller for the run.
        caller = torch.cuda.current_stream(stream.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            result = self._function()
        caller.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._out = self._function()
        self._graph = graph  # not before: a recording that fails is tried again
        return result


class CUDAGraphLayerStack(LayerStack):
    """A stack whose decode steps, where every run is one token, replay a recorded graph.

    Args:
        stack: operations that launch by shapes alone, never by values (`mor.ops.triton`).
        width: E.
        table_width: cells of the longest page table.
        stream: see `CUDAGraphFunction`; without, the padded buffers run as they are.
    """

    def __init__(
        self,
        stack: LayerStack,
        width: int,
        table_width: int,
        dtype: torch.dtype,
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.stack = stack
        self._width = width
        self._table_width = table_width
        self._dtype = dtype
        self._device = device
        self._stream = stream
        self._buckets: dict[int, _Bucket] = {}

    def run(self, x: Float[Tensor, "n e"], metadata: AttentionMetadata) -> Float[Tensor, "n e"]:
        """(N, E) states after all layers; replayed if every run is one token."""
        num = x.shape[0]
        # Prefill has many shapes and long kernels, and so have batches beyond the largest bucket.
        if metadata.max_query_len > 1 or num > _BUCKETS[-1]:
            return self.stack.run(x, metadata)
        size = padded_batch_size(num)
        if size not in self._buckets:
            self._buckets[size] = _Bucket(
                self.stack,
                size,
                self._width,
                self._table_width,
                self._dtype,
                self._device,
                self._stream,
            )
        return self._buckets[size].run(x, metadata)


class _Bucket:
    """Fixed memory for a batch of B rows, and the graph that works on it."""

    def __init__(
        self,
        stack: LayerStack,
        size: int,
        width: int,
        table_width: int,
        dtype: torch.dtype,
        device: torch.device,
        stream: torch.cuda.Stream | None,
    ) -> None:
        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._x = torch.zeros(size, width, dtype=dtype, device=device)
        self._metadata = AttentionMetadata(
            positions=ints(size),
            context_lens=ints(size),
            query_start_loc=torch.arange(size + 1, dtype=torch.int32, device=device),
            page_tables=ints(size, table_width),
            slot_cells=ints(size),
            slot_offsets=ints(size),
            max_query_len=1,
        )
        self._run = CUDAGraphFunction(lambda: stack.run(self._x, self._metadata), stream)

    def run(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Copy tokens in, replay, and return a copy of their rows."""
        self._fill(x, metadata)
        return self._run()[: x.shape[0]].clone()

    def _fill(self, x: Tensor, metadata: AttentionMetadata) -> None:
        """Copy tokens into the fixed memory; whatever is left of earlier ones has no effect."""
        num = x.shape[0]
        num_writing = metadata.slot_cells.shape[0]
        width = metadata.page_tables.shape[1]
        fixed = self._metadata
        self._x[:num] = x
        fixed.positions[:num] = metadata.positions
        fixed.context_lens.zero_()  # rows without a token see no entry
        fixed.context_lens[:num] = metadata.context_lens
        fixed.page_tables[:num, :width] = metadata.page_tables
        fixed.slot_cells.fill_(-1)  # tokens that only read, and rows without a token, store nothing
        fixed.slot_cells[:num_writing] = metadata.slot_cells
        fixed.slot_offsets[:num_writing] = metadata.slot_offsets
