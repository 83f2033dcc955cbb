"""CUDA graphs for decode ticks: one recorded launch instead of a few hundred.

A graph replays the same kernels on the same memory, so lanes are copied into fixed buffers and
filled up to the next bucket: empty lanes see no keys and store nothing.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mor.engine.layer_stack import LayerStack
from mor.ops.paged import AttentionMetadata

_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def padded_batch_size(metadata: int) -> int:
    """The size that so many lanes are filled up to."""
    return next((bucket for bucket in _BUCKETS if bucket >= metadata), -(-metadata // 256) * 256)


def eager(stack: LayerStack) -> LayerStack:
    """A stack without graphs of its own, to be part of a larger one."""
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
        """The function's result."""
        if self._stream is None:
            return self._function()
        if self._graph is None:
            return self._record(self._stream)
        self._graph.replay()
        assert self._out is not None
        return self._out

    def _record(self, stream: torch.cuda.Stream) -> Tensor:
        """Run once, which compiles every kernel, then record, which runs nothing."""
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


class CUDAGraphLayerStack:
    """A stack whose decode ticks, where every run is one lane, replay a recorded graph.

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
        """See `LayerStack.run`. Prefill, and more lanes than the largest bucket, run unrecorded."""
        num = x.shape[0]
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
    """Fixed memory for so many lanes, and the graph that works on it."""

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
        """Copy in, replay, and hand out the lanes that are real."""
        self._fill(x, metadata)
        return self._run()[: x.shape[0]].clone()

    def _fill(self, x: Tensor, metadata: AttentionMetadata) -> None:
        num, writing, columns = (
            x.shape[0],
            metadata.slot_cells.shape[0],
            metadata.page_tables.shape[1],
        )
        self._x[:num] = x
        self._metadata.positions[:num] = metadata.positions
        self._metadata.context_lens.zero_()
        self._metadata.context_lens[:num] = metadata.context_lens
        self._metadata.page_tables[:num, :columns] = metadata.page_tables
        self._metadata.slot_cells.fill_(-1)  # nobody's: lanes that only read, and empty ones
        self._metadata.slot_cells[:writing] = metadata.slot_cells
        self._metadata.slot_offsets[:writing] = metadata.slot_offsets
