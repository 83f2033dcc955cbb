"""What paged attention works on: the pool of KV cells, and the lanes of one pass over the layers.

A *cell* holds S key-value slots of one layer. A page is a row of neighboring cells, one for each
layer of a stack, so a page table names the cell of a stack's first layer and layer `i` adds `i`.
That keeps one pool for stacks of different heights (the block; prelude and coda together).

Shape letters: C cells, N lanes, W lanes that write, U runs, P table width, H query heads,
G key-value heads, D head size, S slots of a cell (the page size), T longest sequence.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PagedKV:
    """The pool. Keys are stored after RoPE, and turned, so that a query meets S of them at once."""

    k: Float[Tensor, "c g d s"]
    v: Float[Tensor, "c g s d"]


@dataclass(frozen=True, kw_only=True)
class RopeTable:
    """RoPE's angles for every position a sequence can have."""

    cos: Float[Tensor, "t half"]
    sin: Float[Tensor, "t half"]


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """The tokens of one pass, in runs: lanes of a run share a sequence and a depth.

    Within a run lanes are in time order. All integers are int32.
    """

    positions: Int[Tensor, " n"]
    """Original position of each token in its sequence: what RoPE rotates by."""
    context_lens: Int[Tensor, " n"]
    """Entries of its run's table that a lane sees, from the first on; its own is among them."""
    query_start_loc: Int[Tensor, " u1"]
    """(U + 1) run u has the lanes runs[u] .. runs[u + 1]."""
    page_tables: Int[Tensor, "u p"]
    """Cells of each run's pages, for layer 0; entry e lies in cell tables[u, e // S]."""
    slot_cells: Int[Tensor, " w"]
    """Where the first W lanes store their keys and values: the cell of layer 0 (-1: nowhere) .."""
    slot_offsets: Int[Tensor, " w"]
    """.. and the slot in it. Lanes from W on find theirs there already."""
    depth_start_loc: tuple[int, ...] = ()
    """In the block: lanes groups[r] .. groups[r + 1] are at depth r, where depths may differ."""
    max_query_len: int = 0
    """Lanes of the longest run; 0: unknown. A hint, 1 in pure decode."""
