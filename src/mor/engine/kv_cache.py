"""The memory behind the pages: one tensor of keys, one of values.

What page, cell and KV entry are, and a drawing: `mor.engine.pages`.
"""

from collections.abc import Sequence

import torch

from mor.engine.config import EngineConfig
from mor.engine.pages import PageLayout
from mor.errors import CapacityError, ConfigError
from mor.model.config import MoRConfig
from mor.ops.memory import free_memory, lazy_zeros
from mor.ops.paged import PagedKV

_SHARE_OF_FREE_MEMORY = 0.5  # the rest is for activations, and for other programs


class KVCache:
    """Memory for the KV entries of all layers and depths, and the layouts of page tables in it.

    Raises:
        ConfigError: `kv_cache_memory_bytes` holds no page, or it does not go with `block_size`.
        CapacityError: the machine does not have so much memory.
    """

    def __init__(
        self, model: MoRConfig, config: EngineConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        _, kv_heads, head_dim = model.num_heads_and_dim
        block = model.num_block_layers
        kv_depths = model.kv_policy.num_kv_depths(model.num_recursions)
        if model.sharing == "sequence":
            block *= kv_depths  # all depths of a token run in one pass
        unshared = model.num_prelude_layers + model.num_coda_layers
        # One pool for both stacks: a page is as high as the higher one.
        self.layers_per_page = height = max(block, unshared)
        self.block = self._layout(config, block)
        self.unshared = self._layout(config, unshared) if unshared else None
        self.table_width = -(-model.max_position_embeddings // config.block_size) + height
        """Cell groups of the longest page table that a sequence can have. It grows by whole pages:
        the last one may bring up to `layers_per_page` groups more than the entries take."""
        # Bytes of a cell: keys and values of `block_size` entries of one layer.
        cell = 2 * kv_heads * head_dim * config.block_size * dtype.itemsize
        self.page_bytes = cell * self.layers_per_page
        self.num_pages = self._num_pages(model, config, device)
        shape = (self.num_pages * self.layers_per_page, kv_heads)  # (cells, G)
        try:
            # Untouched pages of memory cost nothing on a CPU. Nobody counts on the zeros: no result
            # depends on an entry that was not written.
            self.kv = PagedKV(
                k=lazy_zeros((*shape, head_dim, config.block_size), dtype, device),
                v=lazy_zeros((*shape, config.block_size, head_dim), dtype, device),
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            taken = self.num_pages * self.page_bytes
            raise CapacityError(
                f"no room for {taken} bytes: lower kv_cache_memory_bytes."
            ) from error

    def _layout(self, config: EngineConfig, layers: int) -> PageLayout:
        return PageLayout(
            block_size=config.block_size, layers=layers, layers_per_page=self.layers_per_page
        )

    def max_pages(self, model: MoRConfig, tokens: int) -> int:
        """Pages that a sequence takes if each of its tokens takes every recursion."""
        kv_depths = model.kv_policy.num_kv_depths(model.num_recursions)
        passes = 1 if model.sharing == "sequence" else kv_depths
        unshared = self.unshared.pages_for(tokens) if self.unshared is not None else 0
        return unshared + passes * self.block.pages_for(tokens)

    def _num_pages(self, model: MoRConfig, config: EngineConfig, device: torch.device) -> int:
        """Pages that the config's memory holds; without one, half of the free memory at most."""
        max_length = self.max_pages(model, model.max_position_embeddings)
        if config.kv_cache_memory_bytes is not None:
            pages = config.kv_cache_memory_bytes // self.page_bytes
            # A sequence of one token takes a page in each of its tables.
            if pages < 1 + model.num_recursions:
                raise ConfigError(
                    f"kv_cache_memory_bytes={config.kv_cache_memory_bytes} hold {pages} pages of "
                    f"{self.page_bytes} bytes: a sequence of {model.max_position_embeddings} "
                    f"tokens takes up to {max_length * self.page_bytes}: raise it."
                )
            return pages
        share = int(free_memory(device) * _SHARE_OF_FREE_MEMORY) // self.page_bytes
        pages = min(share, max_length * config.max_num_seqs)
        if pages < max_length:
            raise ConfigError(
                f"half of the free memory holds {pages} pages, but one sequence of "
                f"{model.max_position_embeddings} tokens takes up to {max_length}: free some "
                f"memory, or set kv_cache_memory_bytes yourself ({self.page_bytes} bytes a page)."
            )
        return pages

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, in this order: (from, to).

        The order matters: a page that was copied from may have been freed and be copied to later.
        """
        height = self.layers_per_page  # cells of a page
        for source, target in pairs:
            for cells in (self.kv.k, self.kv.v):
                start = target * height
                cells[start : start + height] = cells[source * height : (source + 1) * height]
