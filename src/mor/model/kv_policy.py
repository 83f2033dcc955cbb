"""Which depths of a shared layer write keys and values, and which of them a query reads.

A token that passes a layer of the block at several depths can leave keys and values at each of
them, or at depth 0 only (arXiv 2507.10524, section 2.2.2: recursion-wise caching, recursive KV
sharing). Model, caches, engine and cost model all ask the policy; none compares its name.

Depths are 0, 1, .. R - 1 in the block and -1 (`sharing.UNSHARED`) in prelude and coda, which write
and read their own under either policy.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable


@runtime_checkable
class KVPolicy(Protocol):
    """How the depths of one shared layer divide keys and values among themselves."""

    @property
    def entries_are_positions(self) -> bool:
        """Whether entry i of a sequence belongs to its position i at every depth.

        Otherwise a depth holds the tokens that were there: entry i is the i-th of them.
        """
        ...

    def num_kv_depths(self, num_depths: int) -> int:
        """How many of `num_depths` depths have keys and values of their own."""
        ...

    def writes(self, depth: int) -> bool:
        """Whether tokens at this depth compute and store keys and values."""
        ...

    def kv_depth(self, depth: int) -> int:
        """The depth whose keys and values a query at this depth reads."""
        ...

    def is_read_later(self, depth: int) -> bool:
        """Whether queries at later depths read what this depth wrote."""
        ...

    def visible_fraction(self, depth_fraction: float) -> float:
        """Share of a sequence's tokens that have keys where a query at a depth looks.

        Args:
            depth_fraction: share of the tokens that are at that depth.
        """
        ...


class RecursionWiseKV:
    """Each depth stores the tokens that are there, and its queries see no others."""

    entries_are_positions = False

    def num_kv_depths(self, num_depths: int) -> int:
        """All of them."""
        return num_depths

    def writes(self, depth: int) -> bool:
        """Always."""
        return True

    def kv_depth(self, depth: int) -> int:
        """The same depth."""
        return depth

    def is_read_later(self, depth: int) -> bool:
        """Never."""
        return False

    def visible_fraction(self, depth_fraction: float) -> float:
        """The tokens that are at the depth."""
        return depth_fraction


class SharedKV:
    """Depth 0 stores every token (its capacity is 1), and all depths' queries see these."""

    entries_are_positions = True

    def num_kv_depths(self, num_depths: int) -> int:
        """One, if there is any."""
        return min(1, num_depths)

    def writes(self, depth: int) -> bool:
        """At depth 0, and outside the block."""
        return depth <= 0

    def kv_depth(self, depth: int) -> int:
        """Depth 0 in the block; outside, the same."""
        return min(depth, 0)

    def is_read_later(self, depth: int) -> bool:
        """At depth 0."""
        return depth == 0

    def visible_fraction(self, depth_fraction: float) -> float:
        """All tokens."""
        return 1.0


KV_POLICIES: Mapping[str, KVPolicy] = MappingProxyType(
    {"recursion_wise": RecursionWiseKV(), "shared": SharedKV()}
)
"""By `MoRConfig.kv_strategy`."""
