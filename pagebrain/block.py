"""The block manager: a free list and a reference count for each physical block.

Block ids run from 0 to ``num_blocks - 1``. This module knows no tokens, sequences or tensors:
:class:`pagebrain.cache.CacheManager` maps sequences to blocks. The idea is that of pages in an operating system (Kwon et
al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023).
"""

from collections import deque
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from pagebrain.config import PageBrainConfig
from pagebrain.errors import BlockError, ConfigError, OutOfBlocksError


@runtime_checkable
class BlockManagerPart(Protocol):
    """What the cache manager calls on a block manager. One is made as ``BlockManager(config)``."""

    num_blocks: int

    @property
    def num_free_blocks(self) -> int: ...
    @property
    def free_blocks(self) -> tuple[int, ...]: ...
    def can_allocate(self, count: int) -> bool: ...
    def allocate(self, count: int = 1) -> list[int]: ...
    def free(self, block_ids: Iterable[int]) -> None: ...
    def ref_count(self, block_id: int) -> int: ...


class BlockManager:
    """Allocates and frees physical block ids. Each operation on one block is O(1).

    A block is free, or it has one or more holders. :meth:`allocate` sets the number of holders to 1, :meth:`share` adds one,
    :meth:`free` removes one. Blocks are reused in the order in which they were freed, oldest first.
    """

    supports = frozenset({"cuda_graph", "async_scheduling"})

    def __init__(self, config: PageBrainConfig) -> None:
        if config.num_blocks is None:
            raise ConfigError("num_blocks is not set: make the config with PageBrainConfig.for_model(base, ...)")
        self.num_blocks = config.num_blocks
        self._ref_counts = [0] * self.num_blocks
        self._free = deque(range(self.num_blocks))

    @property
    def num_free_blocks(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Ids of the free blocks, in the order in which they will be allocated."""
        return tuple(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether ``count`` blocks are free."""
        return count <= len(self._free)

    def allocate(self, count: int = 1) -> list[int]:
        """Take ``count`` free blocks, each with one holder.

        Raises ``OutOfBlocksError``, before anything changed, if fewer are free.
        """
        if count < 0:
            raise BlockError(f"count must be at least 0, got {count}")
        if not self.can_allocate(count):
            raise OutOfBlocksError(
                f"{count} blocks were asked for, but only {len(self._free)} of {self.num_blocks} are free: "
                "free a sequence, or give the engine a larger num_blocks"
            )
        block_ids = [self._free.popleft() for _ in range(count)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def share(self, block_id: int) -> None:
        """Add a holder to a block in use. Raises ``BlockError`` if the block is free."""
        if self.ref_count(block_id) == 0:
            raise BlockError(f"block {block_id} is free and cannot be shared: allocate it first")
        self._ref_counts[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Remove one holder of each block; a block without holders is free again.

        An id may be named several times. Raises ``BlockError``, before anything changed, if a block has fewer holders.
        """
        block_ids = list(block_ids)
        named: dict[int, int] = {}
        for block_id in block_ids:
            named[block_id] = named.get(block_id, 0) + 1
        for block_id, times in named.items():
            if times > self.ref_count(block_id):
                raise BlockError(
                    f"block {block_id} was freed {times} time(s), but has {self.ref_count(block_id)} holder(s): "
                    "each holder frees a block once"
                )
        for block_id in block_ids:
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free.append(block_id)

    def ref_count(self, block_id: int) -> int:
        """Holders of a block; 0 means free. Raises ``BlockError`` for an id that does not exist."""
        if not 0 <= block_id < self.num_blocks:
            raise BlockError(f"block ids run from 0 to {self.num_blocks - 1}, got {block_id}")
        return self._ref_counts[block_id]
