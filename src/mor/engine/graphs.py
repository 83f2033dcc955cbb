"""CUDA graphs for decode ticks: one recorded launch instead of a few hundred.

A graph replays the same kernels on the same memory, so lanes are copied into fixed buffers and
filled up to the next bucket: empty lanes see no keys and store nothing.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mor.engine.stack import Stack
from mor.ops.paged import Lanes

_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class GraphStack:
    """A stack whose decode ticks, where every run is one lane, replay a recorded graph.

    Args:
        stack: operations that launch by shapes alone, never by values (`mor.ops.triton`).
        width: E.
        table_width: cells of the longest page table.
        capture: record graphs; without, the padded buffers run as they are, for tests on a CPU.
    """

    def __init__(
        self,
        stack: Stack,
        width: int,
        table_width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        capture: bool,
    ) -> None:
        self._stack = stack
        self._width = width
        self._table_width = table_width
        self._dtype = dtype
        self._device = device
        self._capture = capture
        self._buckets: dict[int, _Bucket] = {}

    def run(self, x: Float[Tensor, "n e"], lanes: Lanes) -> Float[Tensor, "n e"]:
        """See `Stack.run`. Prefill, and more lanes than the largest bucket, run unrecorded."""
        num = x.shape[0]
        if lanes.longest_run > 1 or num > _BUCKETS[-1]:
            return self._stack.run(x, lanes)
        size = next(bucket for bucket in _BUCKETS if bucket >= num)
        if size not in self._buckets:
            self._buckets[size] = _Bucket(
                size, self._width, self._table_width, self._dtype, self._device
            )
        return self._buckets[size].run(self._stack, x, lanes, self._capture)


class _Bucket:
    """Fixed memory for so many lanes, and the graph that works on it."""

    def __init__(
        self, size: int, width: int, table_width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._x = torch.zeros(size, width, dtype=dtype, device=device)
        self._out = self._x
        self._lanes = Lanes(
            positions=ints(size),
            kv_len=ints(size),
            runs=torch.arange(size + 1, dtype=torch.int32, device=device),
            tables=ints(size, table_width),
            write_cell=ints(size),
            write_slot=ints(size),
            longest_run=1,
        )
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, stack: Stack, x: Tensor, lanes: Lanes, capture: bool) -> Tensor:
        """Copy in, replay, and hand out the lanes that are real."""
        self._fill(x, lanes)
        if not capture:
            return stack.run(self._x, self._lanes)[: x.shape[0]]
        if self._graph is None:
            self._record(stack)
        assert self._graph is not None
        self._graph.replay()
        return self._out[: x.shape[0]].clone()

    def _fill(self, x: Tensor, lanes: Lanes) -> None:
        num, writing, columns = x.shape[0], lanes.write_cell.shape[0], lanes.tables.shape[1]
        self._x[:num] = x
        self._lanes.positions[:num] = lanes.positions
        self._lanes.kv_len.zero_()
        self._lanes.kv_len[:num] = lanes.kv_len
        self._lanes.tables[:num, :columns] = lanes.tables
        self._lanes.write_cell.fill_(-1)  # nobody's: lanes that only read, and empty ones
        self._lanes.write_cell[:writing] = lanes.write_cell
        self._lanes.write_slot[:writing] = lanes.write_slot

    def _record(self, stack: Stack) -> None:
        """Run once to compile every kernel, once more to record."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            stack.run(self._x, self._lanes)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = stack.run(self._x, self._lanes)
