"""Batches for the tests of the Triton kernels: ragged runs of tokens, pages in random order."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from mor.ops.paged import AttentionMetadata, PagedKV, RopeTable

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
LENGTH, LAYERS = 512, 3  # positions that the rotations know; cells of a page


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The tensors of one pass; `LAYERS` neighboring cells make a page."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv: PagedKV
    metadata: AttentionMetadata
    rotations: RopeTable


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make(
    runs: list[tuple[int, int]],
    *,
    seed: int = 0,
    heads: tuple[int, int] = (6, 2),
    dim: int = 16,
    size: int = 8,
    spare: int = 2,
    writing: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
) -> Batch:
    """Runs of (tokens, entries of the table): the last token of a run sees all its entries.

    Cells come in random order; `spare` pages, and as many columns of the tables, are out of use.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    pages = [-(-seen // size) for _, seen in runs]
    order = torch.randperm(sum(pages) + spare, generator=generator) * LAYERS
    tables = torch.full((len(runs), max(pages) + spare), -1, dtype=torch.int32)
    for row, cells in zip(tables, order.split([*pages, spare])[:-1], strict=True):
        row[: len(cells)] = cells
    metadata = [(u, s + 1) for u, (n, last) in enumerate(runs) for s in range(last - n, last)]
    writes = [(int(tables[u, (s - 1) // size]), (s - 1) % size) for u, s in metadata][:writing]
    (h, g), stored, total = heads, cache or dtype, len(order) * LAYERS
    angles = randn(LENGTH, dim // 2, dtype=torch.float32)
    return Batch(
        q=randn(len(metadata), h, dim),
        k=randn(len(writes), g, dim),
        v=randn(len(writes), g, dim),
        kv=PagedKV(
            k=randn(total, g, dim, size, dtype=stored), v=randn(total, g, size, dim, dtype=stored)
        ),
        metadata=AttentionMetadata(
            positions=torch.randint(LENGTH, (len(metadata),), generator=generator).int().to(DEVICE),
            context_lens=ints([seen for _, seen in metadata]),
            query_start_loc=ints(
                [sum(count for count, _ in runs[:u]) for u in range(len(runs) + 1)]
            ),
            page_tables=tables.to(DEVICE),
            slot_cells=ints([cell for cell, _ in writes]),
            slot_offsets=ints([slot for _, slot in writes]),
        ),
        rotations=RopeTable(cos=angles.cos(), sin=angles.sin()),
    )
