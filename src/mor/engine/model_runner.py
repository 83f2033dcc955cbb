"""Plans into tensors: the model's stages over the lanes of a tick.

Shape letters: N lanes, E width, V vocabulary.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mor.engine.config import EngineConfig
from mor.engine.kv_cache import KVCache
from mor.engine.layer_stack import KernelBackend, LayerCall, layers_of
from mor.engine.pages import PageTable
from mor.engine.request import Chunk
from mor.engine.sampler import SamplerOutput, SamplingInput, is_greedy, sample
from mor.engine.scheduler import BlockPlan, PreludePlan
from mor.engine.states import make_hidden_states, state_slots_of
from mor.model.sampling import MAX_LOGPROBS
from mor.model.sharing import block_schedule
from mor.model.transformer import MoRModel
from mor.ops.paged import AttentionMetadata
from mor.ops.sampling import score

_SCORED_ROWS = 128  # logits that are whole at one time: an allocation that is used again


@dataclass(frozen=True, kw_only=True)
class CodaOutput:
    """What came out of a finish phase."""

    sampler_output: SamplerOutput
    prompt_logprobs: dict[int, tuple[list[float], list[dict[int, float]]]] = field(
        default_factory=dict
    )
    """By the chunk's place in the plan: log-probabilities of the token after each of its `scored`
    ones, and of the likeliest ones there."""


class ModelRunner:
    """Runs what the scheduler has planned; knows nothing of requests beyond their chunks."""

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
        """Time inside layers, head, routers and sampler: the rest of a tick is bookkeeping."""
        self._norm = model.norm
        self._embedding = model.embed_tokens.weight.detach()
        self._head = model.lm_head.weight.detach()
        self.states = make_hidden_states(
            model, kernels, num_state_slots + 1, self.dtype, self.device
        )  # one spare
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
    def run_prelude(self, plan: PreludePlan) -> list[bool]:
        """Embed and run the prelude; for each token, whether it takes its first pass."""
        self.cache.copy_pages(plan.page_copies)
        if not plan.chunks:
            return []
        ids = [t for c in plan.chunks for t in c.sequence.token_ids[c.start : c.start + len(c)]]
        began = time.perf_counter()
        x = self.embed(self._ints(ids))
        if self.prelude is not None:
            x = self.prelude.run(x, self._unshared_metadata(plan.chunks))
        goes_on = self.states.enter(plan.chunks, x)
        self.compute_seconds += time.perf_counter() - began
        return goes_on

    @torch.inference_mode()
    def run_block(self, plan: BlockPlan) -> list[bool]:
        """One pass of the block over all present tokens; for each, whether it is sent on."""
        metadata = self._block_metadata(plan)
        rows = [c.state_slots[i] for c in plan.chunks for i in c.active]
        depths = [c.depth + 1 for c in plan.chunks for _ in c.active]
        began = time.perf_counter()
        update = self.block.run(self.states.take(rows), metadata)
        goes_on = self.states.advance(rows, depths, metadata.positions, update)
        self.compute_seconds += time.perf_counter() - began
        return goes_on

    @torch.inference_mode()
    def run_coda(self, chunks: list[Chunk], sampling: dict[int, SamplingInput]) -> CodaOutput:
        """Run coda and head; sample after the last token of each chunk that `sampling` names."""
        began = time.perf_counter()
        scored = {
            i: places for i, chunk in enumerate(chunks) if (places := chunk.prompt_logprob_range)
        }
        result = CodaOutput(sampler_output=SamplerOutput(tokens=[], logprobs=[], top_logprobs=[]))
        if self.coda is not None or sampling or scored:
            x = self.states.leave(state_slots_of(chunks))
            if self.coda is not None:
                x = self.coda.run(x, self._unshared_metadata(chunks))
            ends = np.cumsum([len(c) for c in chunks])
            if sampling:
                last = self._ints([int(ends[i]) - 1 for i in sampling])
                logits = self.compute_logits(x.index_select(0, last))
                result = CodaOutput(sampler_output=self._sample(logits, list(sampling.values())))
            lines = [(i, int(ends[i]) - len(chunks[i]) + p, p) for i in scored for p in scored[i]]
            self._score(chunks, lines, x, result)
        self.compute_seconds += time.perf_counter() - began
        return result

    # -- parts ----------------------------------------------------------------------------------

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def embed(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n e"]:
        """(N, E) what goes into the prelude."""
        return F.embedding(tokens, self._embedding).to(self.dtype)

    def compute_logits(self, x: Float[Tensor, "n e"]) -> Float[Tensor, "n v"]:
        """(N, V) logits."""
        return self.kernels.compute_logits(self._norm, self._head, x)

    def _sample(self, logits: Float[Tensor, "n v"], rows: list[SamplingInput]) -> SamplerOutput:
        if all(is_greedy(row) and row.params.logprobs is None for row in rows):
            found = self.kernels.greedy(logits)
            if found is not None:
                return SamplerOutput(
                    tokens=found[0], logprobs=found[1], top_logprobs=[{} for _ in rows]
                )
        return sample(logits, rows)

    def _score(
        self, chunks: list[Chunk], lines: list[tuple[int, int, int]], x: Tensor, result: CodaOutput
    ) -> None:
        """Note scores of prompt tokens; a line is a chunk, a row of `x`, a place in the chunk."""
        for start in range(0, len(lines), _SCORED_ROWS):
            part = lines[start : start + _SCORED_ROWS]
            wanted = [chunks[i].sequence.token_ids[chunks[i].start + p + 1] for i, _, p in part]
            tops = [chunks[i].sequence.params.logprobs or 0 for i, _, _ in part]
            logits = self.compute_logits(x.index_select(0, self._ints([row for _, row, _ in part])))
            best = self.kernels.greedy(logits) if max(tops) <= 1 else None
            scores, likeliest = score(logits, self._ints(wanted), max(tops), MAX_LOGPROBS, best)
            for (i, _, _), num, one, top in zip(part, tops, scores, likeliest, strict=True):
                found, others = result.prompt_logprobs.setdefault(i, ([], []))
                found.append(one)
                others.append(dict(list(top.items())[:num]))

    # -- lanes ----------------------------------------------------------------------------------

    def _unshared_metadata(self, chunks: list[Chunk]) -> AttentionMetadata:
        """Every token of these chunks, in the unshared layers: entry and position are the same."""
        tables = [c.sequence.unshared_table for c in chunks]
        ranges = [list(range(c.start, c.start + len(c))) for c in chunks]
        return self._metadata(tables, ranges, ranges, len(chunks))

    def _block_metadata(self, plan: BlockPlan) -> AttentionMetadata:
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
        """The first `num_writing` runs store their keys and values; `entries` sees itself last."""
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
