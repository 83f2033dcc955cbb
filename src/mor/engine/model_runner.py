"""Turns plans into tensors and runs the model's stages on them.

Shape letters: N tokens of the plan, E width, V vocabulary.
"""

import itertools
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mor.engine.config import EngineConfig
from mor.engine.kernels.layer_stack import KernelBackend, LayerCall, layers_of
from mor.engine.kv_cache import KVCache
from mor.engine.pages import PageTable
from mor.engine.plan import (
    BlockOutput,
    BlockPlan,
    CodaOutput,
    CodaPlan,
    PreludeOutput,
    PreludePlan,
    PromptLogprobs,
    SamplerOutput,
    SamplingInput,
)
from mor.engine.request import Chunk
from mor.engine.sampler import is_greedy, sample
from mor.engine.states import make_hidden_states, state_slots_of
from mor.model.sampling import MAX_LOGPROBS
from mor.model.sharing import block_schedule
from mor.model.transformer import MoRModel
from mor.ops.paged import AttentionMetadata
from mor.ops.sampling import score

_SCORED_ROWS = 128  # rows of whole logits at a time: (128, V) is an allocation that is used again


class ModelRunner:
    """Runs what the scheduler has planned; knows of requests only what plans say."""

    def __init__(
        self,
        model: MoRModel,
        config: EngineConfig,
        cache: KVCache,
        kernels: KernelBackend,
        num_state_slots: int,
    ) -> None:
        self.model_config = model.config
        self.cache = cache
        self.kernels = kernels
        self.device = cache.kv.k.device
        self.dtype = cache.kv.k.dtype
        self.compute_seconds = 0.0
        """Time inside layers, head, routers and sampler; the rest of a step is bookkeeping."""
        self._norm = model.norm
        self._embedding = model.embed_tokens.weight.detach()
        self._head = model.lm_head.weight.detach()
        # One spare slot: multi-step decoding lets tokens that a phase does not concern write there.
        self.states = make_hidden_states(
            model, kernels, num_state_slots + 1, self.dtype, self.device
        )
        # Prelude and coda share page tables: their layers are counted through, prelude first.
        unshared = layers_of(model.prelude) + layers_of(model.coda)
        apps = [LayerCall(layer=m, kv_layer=i, writes_kv=True) for i, m in enumerate(unshared)]
        num = len(model.prelude)
        self.prelude = kernels.build_stack(apps[:num]) if num else None
        self.coda = kernels.build_stack(apps[num:]) if apps[num:] else None
        self.block = kernels.build_stack(_block_calls(model))
        self._kv_policy = model.config.kv_policy
        self._num_groups = 1 if model.config.sharing == "sequence" else model.config.num_recursions

    # -- phases ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def run_prelude(self, plan: PreludePlan) -> PreludeOutput:
        """Embed the plan's tokens, run the prelude, and ask the first router."""
        self.cache.copy_pages(plan.page_copies)
        if not plan.chunks:
            return PreludeOutput()
        ids = [t for c in plan.chunks for t in c.sequence.token_ids[c.start : c.start + len(c)]]
        began = time.perf_counter()
        x = self.embed(self._ints(ids))  # (N, E)
        if self.prelude is not None:
            x = self.prelude.run(x, self._unshared_metadata(plan.chunks))
        goes_on = self.states.write(plan.chunks, x)
        self.compute_seconds += time.perf_counter() - began
        return PreludeOutput(goes_on=tuple(goes_on))

    @torch.inference_mode()
    def run_block(self, plan: BlockPlan) -> BlockOutput:
        """One pass of the block over the plan's active tokens; then their routers decide."""
        metadata = self._block_metadata(plan)
        slots = [c.state_slots[i] for c in plan.chunks for i in c.active]
        # Passes that each token will have behind it: the depth of the router that judges it.
        depths = [c.depth + 1 for c in plan.chunks for _ in c.active]
        began = time.perf_counter()
        update = self.block.run(self.states.read(slots), metadata)  # (N, E)
        goes_on = self.states.update(slots, depths, metadata.positions, update)
        self.compute_seconds += time.perf_counter() - began
        return BlockOutput(goes_on=tuple(goes_on))

    @torch.inference_mode()
    def run_coda(self, plan: CodaPlan) -> CodaOutput:
        """Run coda and head; sample after the plan's `sampled_chunks`, score prompt tokens."""
        began = time.perf_counter()
        has_scored = any(chunk.prompt_logprob_range for chunk in plan.chunks)
        output = CodaOutput()
        # A model without coda layers has nothing to do for tokens that nobody asks about.
        if self.coda is not None or plan.sampled_chunks or has_scored:
            x = self.states.read_exiting(state_slots_of(plan.chunks))  # (N, E)
            if self.coda is not None:
                x = self.coda.run(x, self._unshared_metadata(plan.chunks))
            # starts[i]: row of x that holds the first token of chunk i
            starts = [0, *itertools.accumulate(map(len, plan.chunks))]
            sampler_output = SamplerOutput()
            if plan.sampled_chunks:
                last = self._ints([starts[i + 1] - 1 for i in plan.sampled_chunks])
                logits = self.compute_logits(x.index_select(0, last))
                sampler_output = self._sample(logits, plan.sampling_inputs)
            output = CodaOutput(
                sampler_output=sampler_output,
                prompt_logprobs=self._score(plan, starts, x),
            )
        self.compute_seconds += time.perf_counter() - began
        return output

    # -- parts ----------------------------------------------------------------------------------

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def embed(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n e"]:
        """(N, E) what goes into the prelude."""
        return F.embedding(tokens, self._embedding).to(self.dtype)

    def compute_logits(self, x: Float[Tensor, "n e"]) -> Float[Tensor, "n v"]:
        """(N, V) logits."""
        return self.kernels.compute_logits(self._norm, self._head, x)

    def _sample(
        self, logits: Float[Tensor, "n v"], inputs: Sequence[SamplingInput]
    ) -> SamplerOutput:
        """One token for each row of logits; the backend's own way if all are greedy."""
        if all(is_greedy(one) and one.params.logprobs is None for one in inputs):
            found = self.kernels.greedy(logits)
            if found is not None:
                token_ids, logprobs = found
                return SamplerOutput(
                    token_ids=tuple(token_ids),
                    logprobs=tuple(logprobs),
                    top_logprobs=tuple(dict[int, float]() for _ in inputs),
                )
        return sample(logits, inputs)

    def _score(
        self, plan: CodaPlan, starts: Sequence[int], x: Float[Tensor, "n e"]
    ) -> tuple[PromptLogprobs, ...]:
        """Log-probabilities of the prompt tokens that the plan's chunks predict.

        Args:
            starts: for each chunk, the row of `x` that holds its first token.
            x: (N, E) states after the coda.
        """
        # (chunk, place in it) of each token whose successor is scored, over all chunks: short
        # chunks share a product with the head.
        lines = [(i, p) for i, chunk in enumerate(plan.chunks) for p in chunk.prompt_logprob_range]
        found: dict[int, tuple[list[float], list[dict[int, float]]]] = {}
        for start in range(0, len(lines), _SCORED_ROWS):
            part = [(i, p, plan.chunks[i]) for i, p in lines[start : start + _SCORED_ROWS]]
            wanted = [chunk.sequence.token_ids[chunk.start + p + 1] for _, p, chunk in part]
            num_tops = [chunk.sequence.params.logprobs or 0 for _, _, chunk in part]
            max_top = max(num_tops)
            rows = self._ints([starts[i] + p for i, p, _ in part])
            logits = self.compute_logits(x.index_select(0, rows))
            best = self.kernels.greedy(logits) if max_top <= 1 else None
            scores, likeliest = score(logits, self._ints(wanted), max_top, MAX_LOGPROBS, best)
            for (i, _, _), num_top, logprob, top in zip(
                part, num_tops, scores, likeliest, strict=True
            ):
                logprobs, top_logprobs = found.setdefault(i, ([], []))
                logprobs.append(logprob)
                top_logprobs.append(dict(list(top.items())[:num_top]))
        return tuple(
            PromptLogprobs(chunk=i, logprobs=tuple(logprobs), top_logprobs=tuple(tops))
            for i, (logprobs, tops) in found.items()
        )

    # -- attention metadata ---------------------------------------------------------------------

    def _unshared_metadata(self, chunks: Sequence[Chunk]) -> AttentionMetadata:
        """Of all tokens of these chunks in prelude or coda, where an entry is its position."""
        tables = [c.sequence.unshared_table for c in chunks]
        ranges = [list(range(c.start, c.start + len(c))) for c in chunks]
        return self._metadata(tables, ranges, ranges, len(chunks))

    def _block_metadata(self, plan: BlockPlan) -> AttentionMetadata:
        """Of the plan's active tokens, at the depths of their chunks."""
        tables: list[PageTable | None] = []
        positions: list[list[int]] = []
        entries: list[list[int]] = []
        for chunk, first in zip(plan.chunks, plan.first_kv_entries, strict=True):
            tables.append(chunk.sequence.depth_tables[self._kv_policy.kv_depth(chunk.depth)])
            positions.append([chunk.start + i for i in chunk.active])
            ordinal = range(first, first + len(chunk.active))
            is_position = self._kv_policy.entries_are_positions
            entries.append(positions[-1] if is_position else list(ordinal))
        depths = [chunk.depth for chunk in plan.chunks for _ in chunk.active]
        # Depths rise over the plan: where each one's tokens begin, and where the last one's end.
        groups = tuple(np.searchsorted(depths, range(self._num_groups + 1)).tolist())
        return self._metadata(tables, positions, entries, plan.num_writing_chunks, groups)

    def _metadata(
        self,
        tables: list[PageTable | None],
        positions: list[list[int]],
        entries: list[list[int]],
        num_writing: int,
        groups: tuple[int, ...] = (),
    ) -> AttentionMetadata:
        """Attention metadata of runs of tokens, each with its page table.

        Args:
            tables: of each run.
            positions: of each run's tokens, for RoPE.
            entries: index of each token's own KV entry in its run's table: it sees those up to it.
            num_writing: runs, the first ones, that store their keys and values.
            groups: `AttentionMetadata.depth_start_loc`.
        """
        width = max(len(t.cells) for t in tables if t is not None)
        table = np.zeros((len(tables), width), np.int32)
        slots: list[tuple[int, int]] = []
        for number, (t, run) in enumerate(zip(tables, entries, strict=True)):
            assert t is not None
            table[number, : len(t.cells)] = t.cells
            if number < num_writing:
                slots += [t.cell_and_offset(entry) for entry in run]
        runs = np.cumsum([0, *map(len, entries)])
        return AttentionMetadata(
            positions=self._int32([p for run in positions for p in run]),
            context_lens=self._int32([entry + 1 for run in entries for entry in run]),
            query_start_loc=self._int32(runs),
            page_tables=self._int32(table),
            slot_cells=self._int32([cell for cell, _ in slots]),
            slot_offsets=self._int32([slot for _, slot in slots]),
            depth_start_loc=groups,
            max_query_len=max(map(len, entries)),
        )

    def _int32(self, values: list[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int32)).to(self.device)


def _block_calls(model: MoRModel) -> list[LayerCall]:
    """One pass of the shared block; with sharing='sequence' one pass is all recursions."""
    config = model.config
    layers = layers_of(model.block)
    every = tuple(range(config.num_recursions)) if config.relaxation_rank else ()
    if config.sharing == "cycle":
        return [
            LayerCall(layer=m, kv_layer=i, writes_kv=True, depths=every)
            for i, m in enumerate(layers)
        ]
    schedule = block_schedule(config.sharing, config.num_block_layers, config.num_recursions)
    policy = config.kv_policy
    num_kv_depths = policy.num_kv_depths(config.num_recursions)
    return [
        LayerCall(
            layer=layers[slot.layer],
            kv_layer=slot.layer * num_kv_depths + policy.kv_depth(slot.depth),
            writes_kv=policy.writes(slot.depth),
            depths=every[slot.depth : slot.depth + 1],
        )
        for slot in schedule
    ]
