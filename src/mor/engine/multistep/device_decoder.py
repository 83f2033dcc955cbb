"""Decode steps that follow each other on the device, without the host in between.

Each sequence has one row of a padded batch: its token in flight, at whatever depth. Which tokens go
on, which KV entry comes next, which token was sampled: all of it stays in tensors of fixed shapes,
which kernels and CUDA graphs work on. A step is two graphs with the sampler between them:

    exit half     tokens that have left the block: coda, head -> logits
    sampler       a token for each row, kept where the row's token has left the block
    advance half  sampled tokens enter (embedding, prelude, first router); then one pass of the
                  block over all active tokens, and the routers' decisions after it

Shapes are fixed, so a row that a half does not concern is computed, too, and its result not used:
it reads and writes the spare state slot, sees no KV entry (context length 0) and stores none (cell
-1). Rows never mix, so that whatever such a row computes, NaN included, stays there.

Shape letters: B rows, D page tables for the block, P cells of a table, K steps, E width,
V vocabulary.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor.engine.model_runner import ModelRunner
from mor.engine.multistep.cuda_graphs import CUDAGraphFunction, eager, padded_batch_size
from mor.engine.plan import DecodedToken, DecodeOutput, DecodePlan
from mor.engine.request import Chunk
from mor.engine.sampler import DeviceSampler
from mor.model.router import RecursionLimits
from mor.ops.paged import AttentionMetadata


class DeviceDecoder:
    """Runs `DecodePlan`s; needs `TorchKernels`, whose operations take rows that do nothing.

    Args:
        runner: the model's stages.
        max_passes: passes of the block that a token can take.
        max_steps: K, steps of a plan at most.
        stream: records the CUDA graphs (see `CUDAGraphFunction`); None: nothing is recorded.
    """

    def __init__(
        self,
        runner: ModelRunner,
        max_passes: int,
        max_steps: int,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._runner = runner
        self._max_passes = max_passes
        self._max_steps = max_steps
        self._stream = stream
        self._buckets: dict[int, _Bucket] = {}

    @torch.inference_mode()
    def run(self, plan: DecodePlan) -> DecodeOutput:
        """Run the plan's steps from the state that its chunks are in; waits for the device once."""
        began = time.perf_counter()
        size = padded_batch_size(len(plan.chunks))
        if size not in self._buckets:
            self._buckets[size] = _Bucket(
                self._runner, size, self._max_passes, self._max_steps, self._stream
            )
        output = self._buckets[size].run(plan)
        self._runner.compute_seconds += time.perf_counter() - began
        return output


class _Bucket:
    """Fixed memory for a batch of B rows, and the two halves of a step on it."""

    def __init__(
        self,
        runner: ModelRunner,
        size: int,
        max_passes: int,
        max_steps: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._runner = runner
        self._max_passes = max_passes
        self._device = runner.device
        self._kv_policy = runner.model_config.kv_policy
        self._block_size = runner.cache.block.block_size
        num_tables = self._kv_policy.num_kv_depths(max_passes)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=self._device)

        self._token = ints(size)
        """Id of the token in flight."""
        self._position = ints(size)
        """Position of the token in flight in its sequence."""
        self._sampled = ints(size)
        """Token id that this step's sampler chose; means nothing in rows that do not exit."""
        self._state_slot = ints(size)
        """Slot of the sequence's token in flight, whichever token that is."""
        self._depth = ints(size)
        """Passes that the token in flight has behind it."""
        self._active = ints(size).bool()
        """Whether the token in flight takes the coming pass; otherwise it waits for the coda."""
        self._remaining = ints(size)
        """Tokens that may still be sampled; 0: the row is not in use."""
        self._emitted = ints(size)
        """Tokens sampled in this run: the column of the next one's random number."""
        self._min_recursions = ints(size)
        self._max_recursions = ints(size) + 1
        self._entries = ints(size, num_tables)
        """(B, D) entries in each of the block's tables, which is where the next one goes."""
        self._tables = ints(size, 1 + num_tables, runner.cache.table_width).int()
        """(B, 1 + D, P) cells of the page tables; the first is that of the unshared layers."""
        self._uniforms = torch.zeros(size, max_steps, dtype=torch.float64, device=self._device)
        """(B, K) random numbers of the next tokens."""
        self._query_start_loc = torch.arange(size + 1, dtype=torch.int32, device=self._device)
        # The runner has made one slot more than the scheduler knows of.
        self._spare = torch.full_like(self._state_slot, len(runner.states.hidden) - 1)
        self._exit_graph = CUDAGraphFunction(self._exit_half, stream)
        self._advance_graph = CUDAGraphFunction(self._advance_half, stream)
        # Records both graphs while no row is in use.
        self._step(DeviceSampler([], runner.model_config.vocab_size, self._device))

    def run(self, plan: DecodePlan) -> DecodeOutput:
        """Run the plan's steps. What they sampled is read once, at the end."""
        self._load(plan.chunks, plan.num_steps)
        params = [chunk.sequence.params for chunk in plan.chunks]
        sampler = DeviceSampler(params, self._runner.model_config.vocab_size, self._device)
        log = torch.stack([self._step(sampler) for _ in range(plan.num_steps)])  # (K, B, 4)
        num = len(plan.chunks)
        active, depths = torch.stack((self._active.long(), self._depth))[:, :num].tolist()
        return DecodeOutput(
            steps=tuple(
                tuple(
                    DecodedToken(int(token_id), logprob, int(num_passes)) if exits else None
                    for exits, token_id, logprob, num_passes in rows
                )
                for rows in log[:, :num].tolist()
            ),
            active=tuple(map(bool, active)),
            depths=tuple(depths),
        )

    def _load(self, chunks: Sequence[Chunk], num_steps: int) -> None:
        """Copy the sequences' state into the fixed memory, one row for each."""
        num = len(chunks)
        tables = np.zeros((num, *self._tables.shape[1:]), np.int32)
        for row, chunk in enumerate(chunks):
            sequence = chunk.sequence
            for number, table in enumerate((sequence.unshared_table, *sequence.depth_tables)):
                if table is not None:
                    tables[row, number, : len(table.cells)] = table.cells
        self._tables[:num] = torch.from_numpy(tables).to(self._device)
        sequences = [chunk.sequence for chunk in chunks]
        self._fill(self._token, [s.token_ids[-1] for s in sequences])
        self._fill(self._position, [len(s.token_ids) - 1 for s in sequences])
        self._fill(self._state_slot, [c.state_slots[0] for c in chunks])
        self._fill(self._depth, [c.depth for c in chunks])
        # Rows after the last sequence keep what an earlier run left in them: with these at zero
        # they neither exit nor go on.
        for memory in (self._active, self._remaining, self._emitted):
            memory.zero_()
        self._fill(self._active, [bool(c.active) for c in chunks])
        self._fill(self._remaining, [s.num_remaining for s in sequences])
        self._fill(self._min_recursions, [s.min_recursions for s in sequences])
        self._fill(self._max_recursions, [s.max_recursions for s in sequences])
        self._fill(self._entries, [[t.num_entries for t in s.depth_tables] for s in sequences])
        # A step samples at most one token for each sequence.
        uniforms = [[s.uniform(ahead) for ahead in range(num_steps)] for s in sequences]
        self._fill(self._uniforms[:, :num_steps], uniforms)

    def _fill(self, memory: Tensor, values: Sequence[object]) -> None:
        memory[: len(values)] = torch.tensor(values, dtype=memory.dtype, device=self._device)

    def _step(self, sampler: DeviceSampler) -> Float[Tensor, "b 4"]:
        """Run one step; nothing in it may wait for the device.

        Returns:
            (B, 4) whether the row's token exited, the token that was sampled after it, that one's
            log-probability, and the passes that the token in flight took; in float64, which holds
            every id.
        """
        logits = self._exit_graph()
        uniforms = self._uniforms.gather(1, self._emitted[:, None])[:, 0]
        token_ids, logprobs = sampler(logits, uniforms)
        self._sampled.copy_(token_ids)
        # Before the advance half, which puts the sampled token in the place of the one that exits.
        columns = (self._exits(), token_ids, logprobs, self._depth)
        found = torch.stack([column.double() for column in columns], dim=1)
        self._advance_graph()
        return found

    def _exits(self) -> Bool[Tensor, " b"]:
        """(B,) whether the token in flight has left the block, in rows that are in use."""
        return ~self._active & (self._remaining > 0)

    def _exit_half(self) -> Float[Tensor, "b v"]:
        """(B, V) logits of tokens that have left the block; they mean nothing in other rows."""
        exits, runner = self._exits(), self._runner
        x = runner.states.read_exiting_device(self._state_slots(exits))  # (B, E)
        if runner.coda is not None:
            x = eager(runner.coda).run(x, self._unshared_metadata(exits))
        return runner.compute_logits(x)

    def _advance_half(self) -> Tensor:
        """Let sampled tokens enter in place of those that exited; then run a pass of the block."""
        exits, states = self._exits(), self._runner.states
        self._remaining.sub_(exits.long())
        self._emitted.add_(exits)
        # The last token that may be sampled does not enter the model.
        enters = exits & (self._remaining > 0)
        self._token.copy_(torch.where(enters, self._sampled, self._token))
        self._position.add_(enters)
        self._depth.mul_(~enters)  # back to 0 where a new token enters
        x = self._runner.embed(self._token)  # (B, E)
        if self._runner.prelude is not None:
            x = eager(self._runner.prelude).run(x, self._unshared_metadata(enters))
        limits = RecursionLimits(
            min_recursions=self._min_recursions, max_recursions=self._max_recursions
        )
        goes_on = states.write_device(self._state_slots(enters), self._position, x, limits)
        # As `Scheduler.update_after_prelude`: a minimum overrules the first router.
        first = enters if goes_on is None else enters & (goes_on | (self._min_recursions > 0))
        self._active.logical_or_(first)

        slots = self._state_slots(self._active)
        update = eager(self._runner.block).run(states.read_device(slots), self._block_metadata())
        self._depth.add_(self._active)
        goes_on = states.update_device(slots, self._depth, self._position, update)
        # As `Scheduler.update_after_block`: router, then minimum, then maximum.
        if goes_on is not None:
            self._active.logical_and_(goes_on | (self._depth < self._min_recursions))
        maximum = self._max_recursions.clamp(max=self._max_passes)
        self._active.logical_and_(self._depth < maximum)
        return self._active  # a graph must return something

    def _state_slots(self, concerned: Bool[Tensor, " b"]) -> Int[Tensor, " b"]:
        """(B,) state slots; the spare one for rows that are not concerned."""
        return torch.where(concerned, self._state_slot, self._spare)

    def _unshared_metadata(self, concerned: Bool[Tensor, " b"]) -> AttentionMetadata:
        """Of the tokens in flight in prelude or coda, where an entry is its position."""
        return self._metadata(self._tables[:, 0], self._position, concerned, concerned)

    def _block_metadata(self) -> AttentionMetadata:
        """Of the tokens in flight at their depths; counts the entries of those that write."""
        active = self._active
        if self._kv_policy.entries_are_positions:
            # One table, filled by the first pass; later ones read it.
            table = torch.zeros_like(self._depth)
            entry, writes = self._position, active & (self._depth == 0)
        else:
            # Tokens that are through all passes have no table: any will do.
            table, writes = self._depth.clamp(max=self._entries.shape[1] - 1), active
            entry = self._entries.gather(1, table[:, None])[:, 0]
            self._entries.scatter_add_(1, table[:, None], active[:, None].long())
        rows = self._query_start_loc[:-1].long()  # 0 .. B - 1
        tables = self._tables[rows, table + 1]  # (B, P); 0 is that of the unshared layers
        return self._metadata(tables, entry, active, writes)

    def _metadata(
        self,
        tables: Int[Tensor, "b p"],
        entry: Int[Tensor, " b"],
        sees: Bool[Tensor, " b"],
        writes: Bool[Tensor, " b"],
    ) -> AttentionMetadata:
        """Attention metadata of B runs of one token.

        Args:
            tables: cells of each row's page table.
            entry: each token's own KV entry in its table.
            sees: rows whose token sees the entries up to its own; the others see none.
            writes: rows whose token stores its keys and values; the others store none.
        """
        # Rows that are not concerned may point behind a full table.
        page = (entry // self._block_size).clamp(max=tables.shape[1] - 1)
        cell = tables.gather(1, page[:, None])[:, 0]
        return AttentionMetadata(
            positions=self._position.int(),
            context_lens=torch.where(sees, entry + 1, 0).int(),
            query_start_loc=self._query_start_loc,
            page_tables=tables,
            slot_cells=torch.where(writes, cell, -1).int(),
            slot_offsets=(entry % self._block_size).int(),
            max_query_len=1,
        )
