"""What paged attention works on: the pool of KV cells, and the tokens of one pass over the layers.

A *cell* holds S key-value slots of one layer. A page is a row of neighboring cells, one for each
layer of a stack, so a page table names the cell of a stack's first layer and layer `i` adds `i`.
That keeps one pool for stacks of different heights (the block; prelude and coda together). With
S = 4 and a stack of two layers, a sequence of six entries whose page table is [6, 2]:

    cell        2        3         ..  6        7
    layer       0        1             0        1
    entries     4 5 - -  4 5 - -       0 1 2 3  0 1 2 3

Shape letters: C cells, N tokens, W tokens that write, U runs (a sequence's tokens at one depth),
P table width, H query heads, G key-value heads, D head size, S slots of a cell (the page size),
T longest sequence.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PagedKV:
    """The pool. Keys are stored after RoPE, transposed, so that a query meets S of them at once."""

    k: Float[Tensor, "c g d s"]
    v: Float[Tensor, "c g s d"]


@dataclass(frozen=True, kw_only=True)
class RopeTable:
    """RoPE's cosines and sines for every position a sequence can have."""

    cos: Float[Tensor, "t half"]
    sin: Float[Tensor, "t half"]


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """The tokens of one pass, in runs: tokens of a run share a sequence and a depth.

    Within a run tokens are in time order. All integers are int32. Two runs, one of three new tokens
    after two cached entries and one of a single token after seven:

        query_start_loc  [0, 3, 4]
        context_lens     [3, 4, 5,  8]
        page_tables      [[6, 2], [0, 4]]      (S = 4)
    """

    positions: Int[Tensor, " n"]
    """Original position of each token in its sequence: what RoPE rotates by."""
    context_lens: Int[Tensor, " n"]
    """Entries of its run's table that a token sees, from the first on; its own is among them."""
    query_start_loc: Int[Tensor, " u1"]
    """(U + 1) run u has the tokens query_start_loc[u] .. query_start_loc[u + 1] - 1."""
    page_tables: Int[Tensor, "u p"]
    """Cells of each run's pages, for layer 0; entry e lies in cell page_tables[u, e // S]."""
    slot_cells: Int[Tensor, " w"]
    """Cell, for layer 0, in which each of the first W tokens stores its key and value; -1: in none.
    The other tokens' entries are there already."""
    slot_offsets: Int[Tensor, " w"]
    """Slot of that cell, 0 .. S - 1."""
    depth_start_loc: tuple[int, ...] = ()
    """In the block: tokens depth_start_loc[r] .. depth_start_loc[r + 1] - 1 are at depth r; empty
    in prelude and coda."""
    max_query_len: int = 0
    """Tokens of the longest run, 1 in pure decode; 0: unknown. It affects speed only."""
