"""Decode ticks that follow each other on the device, without a look from the host.

Each sequence has one lane: its token in flight, at whatever depth. Who goes on, which entry comes
next, which token was sampled: all of it stays in tensors of fixed shapes, which kernels and CUDA
graphs work on. A lane that a phase does not concern runs along: it reads and writes a spare row of
the hidden states, sees no keys and stores none.

Shape letters: B lanes, D page tables for the block, P cells of a table, K ticks, E width,
V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor.engine.model_runner import ModelRunner
from mor.engine.multistep.cuda_graphs import CUDAGraphFunction, eager, padded_batch_size
from mor.engine.request import Chunk
from mor.engine.sampler import DeviceSampler
from mor.model.router import RecursionLimits
from mor.ops.paged import AttentionMetadata


@dataclass(frozen=True, kw_only=True)
class DecodeOutput:
    """What the host hears afterwards."""

    log: list[list[list[float]]]
    """[tick][lane]: whether a token was sampled, which, its log-probability, and the passes that
    its position took."""
    active: list[int]
    """By lane: whether its token in flight takes another pass, .."""
    depth: list[int]
    """.. and the passes that it has taken."""


class DeviceDecoder:
    """Runs decode ticks; needs `TorchKernels`, whose operations take lanes that do nothing.

    Args:
        runner: the model's stages.
        most: passes that a token can take.
        ticks: K at most.
        stream: see `CUDAGraphFunction`.
    """

    def __init__(
        self, runner: ModelRunner, maximum: int, steps: int, stream: torch.cuda.Stream | None = None
    ) -> None:
        self._runner, self._most, self._ticks, self._stream = runner, maximum, steps, stream
        self._buckets: dict[int, _Bucket] = {}

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], steps: int) -> DecodeOutput:
        """Run ticks from the state that these chunks are in, a sequence's only token each."""
        began = time.perf_counter()
        size = padded_batch_size(len(chunks))
        if size not in self._buckets:
            self._buckets[size] = _Bucket(self._runner, size, self._most, self._ticks, self._stream)
        landed = self._buckets[size].run(chunks, steps)
        self._runner.compute_seconds += time.perf_counter() - began
        return landed


class _Bucket:
    """Fixed memory for B lanes, and the halves of a tick on it: before and after the sampler."""

    def __init__(
        self,
        runner: ModelRunner,
        size: int,
        maximum: int,
        steps: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._runner, self._passes, self._device = runner, maximum, runner.device
        self._kv_policy = runner.model_config.kv_policy
        self._page = runner.cache.block.block_size
        num_tables = self._kv_policy.num_kv_depths(maximum)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=self._device)

        self._token, self._sampled, self._position, self._state_slot = (
            ints(size) for _ in range(4)
        )
        self._depth = ints(size)
        """Passes that the token in flight has behind it."""
        self._active = ints(size).bool()
        """Whether it takes the coming pass; otherwise it waits for the coda."""
        self._remaining = ints(size)
        """Tokens that may still be sampled; 0: the lane is not in use."""
        self._emitted = ints(size)
        """Tokens sampled in this burst: the place of the next one's random number."""
        self._min_recursions, self._max_recursions = ints(size), ints(size) + 1
        self._entries = ints(size, num_tables)
        """In each of the block's tables: where the next one goes."""
        self._tables = ints(size, 1 + num_tables, runner.cache.table_width).int()
        """The first is that of the unshared layers."""
        self._uniforms = torch.zeros(size, steps, dtype=torch.float64, device=self._device)
        self._query_start_loc = torch.arange(size + 1, dtype=torch.int32, device=self._device)
        self._spare = torch.full_like(self._state_slot, len(runner.states.hidden) - 1)
        self._exit_graph = CUDAGraphFunction(self._exit_half, stream)
        self._advance_graph = CUDAGraphFunction(self._advance_half, stream)
        self._step(DeviceSampler([], runner.model_config.vocab_size, self._device))  # records both

    def run(self, chunks: Sequence[Chunk], steps: int) -> DecodeOutput:
        """See `DeviceDecoder.run`. The log is read once, at the end."""
        self._load(chunks, steps)
        params = [chunk.sequence.params for chunk in chunks]
        sampler = DeviceSampler(params, self._runner.model_config.vocab_size, self._device)
        log = torch.stack([self._step(sampler) for _ in range(steps)])
        num = len(chunks)
        present, depth = torch.stack((self._active.long(), self._depth))[:, :num].tolist()
        return DecodeOutput(log=log[:, :num].tolist(), active=present, depth=depth)

    def _load(self, chunks: Sequence[Chunk], steps: int) -> None:
        """Put the sequences' state into the fixed memory."""
        num = len(chunks)
        tables = np.zeros((num, *self._tables.shape[1:]), np.int32)
        for lane, chunk in enumerate(chunks):
            sequence = chunk.sequence
            for place, table in enumerate((sequence.unshared_table, *sequence.depth_tables)):
                if table is not None:
                    tables[lane, place, : len(table.cells)] = table.cells
        self._tables[:num] = torch.from_numpy(tables).to(self._device)
        sequences = [chunk.sequence for chunk in chunks]
        self._fill(self._token, [t.token_ids[-1] for t in sequences])
        self._fill(self._position, [len(t.token_ids) - 1 for t in sequences])
        self._fill(self._state_slot, [c.state_slots[0] for c in chunks])
        self._fill(self._depth, [c.depth for c in chunks])
        for memory in (self._active, self._remaining, self._emitted):
            memory.zero_()  # of lanes behind the last, too: they must not go on
        self._fill(self._active, [bool(c.active) for c in chunks])
        self._fill(self._remaining, [t.num_remaining for t in sequences])
        self._fill(self._min_recursions, [t.min_recursions for t in sequences])
        self._fill(self._max_recursions, [t.max_recursions for t in sequences])
        self._fill(self._entries, [[d.num_entries for d in t.depth_tables] for t in sequences])
        drawn = [[t.uniform(ahead) for ahead in range(steps)] for t in sequences]
        self._fill(self._uniforms[:, :steps], drawn)

    def _fill(self, memory: Tensor, values: Sequence[object]) -> None:
        memory[: len(values)] = torch.tensor(values, dtype=memory.dtype, device=self._device)

    def _step(self, sampler: DeviceSampler) -> Float[Tensor, "b 4"]:
        """One step; its lines of `DecodeOutput.log`. Nothing here may wait for the device."""
        logits = self._exit_graph()
        tokens, logprobs = sampler(logits, self._uniforms.gather(1, self._emitted[:, None])[:, 0])
        self._sampled.copy_(tokens)
        line = (self._leaves(), tokens, logprobs, self._depth)
        found = torch.stack([column.double() for column in line], dim=1)
        self._advance_graph()
        return found

    def _leaves(self) -> Bool[Tensor, " b"]:
        return ~self._active & (self._remaining > 0)

    def _exit_half(self) -> Float[Tensor, "b v"]:
        """Coda and head for the tokens that have left the block: logits, nonsense for others."""
        leaves, runner = self._leaves(), self._runner
        x = runner.states.read_exiting_device(self._state_slots(leaves))
        if runner.coda is not None:
            x = eager(runner.coda).run(x, self._unshared_metadata(leaves))
        return runner.compute_logits(x)

    def _advance_half(self) -> Tensor:
        """What was sampled enters in their place; then all that are present take a pass."""
        leaves, states = self._leaves(), self._runner.states
        self._remaining.sub_(leaves.long())
        self._emitted.add_(leaves)
        enters = leaves & (self._remaining > 0)
        self._token.copy_(torch.where(enters, self._sampled, self._token))
        self._position.add_(enters)
        self._depth.mul_(~enters)
        x = self._runner.embed(self._token)
        if self._runner.prelude is not None:
            x = eager(self._runner.prelude).run(x, self._unshared_metadata(enters))
        limits = RecursionLimits(
            min_recursions=self._min_recursions, max_recursions=self._max_recursions
        )
        goes_on = states.write_device(self._state_slots(enters), self._position, x, limits)
        first = enters if goes_on is None else enters & (goes_on | (self._min_recursions > 0))
        self._active.logical_or_(first)

        present = self._active
        rows = self._state_slots(present)
        update = eager(self._runner.block).run(states.read_device(rows), self._block_metadata())
        self._depth.add_(present)
        goes_on = states.update_device(rows, self._depth, self._position, update)
        if goes_on is not None:
            present.logical_and_(goes_on | (self._depth < self._min_recursions))
        present.logical_and_(self._depth < self._max_recursions.clamp(max=self._passes))
        return present

    def _state_slots(self, who: Bool[Tensor, " b"]) -> Int[Tensor, " b"]:
        return torch.where(who, self._state_slot, self._spare)

    def _unshared_metadata(self, who: Bool[Tensor, " b"]) -> AttentionMetadata:
        return self._metadata(self._tables[:, 0], self._position, who, who)

    def _block_metadata(self) -> AttentionMetadata:
        """Lanes at their depths, where each present one gets the next entry."""
        present, table = self._active, torch.zeros_like(self._depth)
        if self._kv_policy.entries_are_positions:
            entry, writes = self._position, present & (self._depth == 0)
        else:
            table, writes = self._depth.clamp(max=self._entries.shape[1] - 1), present
            entry = self._entries.gather(1, table[:, None])[:, 0]
            self._entries.scatter_add_(1, table[:, None], present[:, None].long())
        cells = self._tables[self._query_start_loc[:-1].long(), table + 1]
        return self._metadata(cells, entry, present, writes)

    def _metadata(
        self,
        tables: Int[Tensor, "b p"],
        entry: Int[Tensor, " b"],
        sees: Bool[Tensor, " b"],
        writes: Bool[Tensor, " b"],
    ) -> AttentionMetadata:
        page = (entry // self._page).clamp(max=tables.shape[1] - 1)  # a full table has no next one
        cell = tables.gather(1, page[:, None])[:, 0]
        return AttentionMetadata(
            positions=self._position.int(),
            context_lens=torch.where(sees, entry + 1, 0).int(),
            query_start_loc=self._query_start_loc,
            page_tables=tables,
            slot_cells=torch.where(writes, cell, -1).int(),
            slot_offsets=(entry % self._page).int(),
            max_query_len=1,
        )
