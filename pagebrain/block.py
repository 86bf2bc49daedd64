"""The block manager: a free list, a reference count for each physical block, and an index of the blocks' contents.

Block ids run from 0 to ``num_blocks - 1``. This module knows no sequences or tensors: :class:`pagebrain.cache.CacheManager`
maps sequences to blocks. The idea is that of pages in an operating system (Kwon et al., "Efficient Memory Management for
Large Language Model Serving with PagedAttention", SOSP 2023). The index makes prefix caching possible: a block whose content
is known stays findable after it was freed, until its memory is needed.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple, Protocol, runtime_checkable

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


class BlockKey(NamedTuple):
    """The content of a full block: the hash of all tokens up to its end, and its own tokens."""

    chain_hash: bytes  # 16 bytes
    tokens: bytes  # block_size native 32-bit integers

    @classmethod
    def after(cls, parent: bytes, tokens: bytes) -> "BlockKey":
        """The key of the block that follows the one with the chain hash ``parent``; ``b""`` for the first block.

        The hash is the same in every process, so that processes can tell each other what they hold.
        """
        return cls(blake2b(parent + tokens, digest_size=16).digest(), tokens)


class BlockManager:
    """Allocates and frees physical block ids. Each operation on one block is O(1).

    A block is free, or it has one or more holders. :meth:`allocate` sets the number of holders to 1, :meth:`share` adds one,
    :meth:`free` removes one.

    A block with a registered content is *cached*: :meth:`find` returns it, also while it is free. :meth:`allocate` takes
    free blocks that are not cached first, in the order in which they were freed. Then it evicts cached ones, in the same
    order: the one that was freed first loses its content.

    Attributes:
        num_evicted: how many contents were lost since the start.
    """

    supports = frozenset({"cuda_graph", "async_scheduling", "prefix_caching"})

    def __init__(self, config: PageBrainConfig) -> None:
        if config.num_blocks is None:
            raise ConfigError("num_blocks is not set: make the config with PageBrainConfig.for_model(base, ...)")
        self.num_blocks = config.num_blocks
        self._ref_counts = [0] * self.num_blocks
        self._free = deque(range(self.num_blocks))  # without those that are cached
        self._free_cached: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, BlockKey] = {}  # cached blocks
        self._by_hash: dict[bytes, int] = {}  # the same the other way round
        self.num_evicted = 0

    @property
    def num_free_blocks(self) -> int:
        """Number of free blocks, cached ones included."""
        return len(self._free) + len(self._free_cached)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Ids of the free blocks, in the order in which they will be allocated."""
        return (*self._free, *self._free_cached)

    @property
    def num_cached_blocks(self) -> int:
        """Number of cached blocks, free or held."""
        return len(self._key_of)

    @property
    def cached_blocks(self) -> dict[int, BlockKey]:
        """The contents of the cached blocks, free or held."""
        return dict(self._key_of)

    def can_allocate(self, count: int) -> bool:
        """Whether ``count`` blocks are free."""
        return count <= self.num_free_blocks

    def allocate(self, count: int = 1) -> list[int]:
        """Take ``count`` free blocks, each with one holder.

        Raises ``OutOfBlocksError``, before anything changed, if fewer are free.
        """
        if count < 0:
            raise BlockError(f"count must be at least 0, got {count}")
        if not self.can_allocate(count):
            raise OutOfBlocksError(
                f"{count} blocks were asked for, but only {self.num_free_blocks} of {self.num_blocks} are free: "
                "free a sequence, or give the engine a larger num_blocks"
            )
        block_ids = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def _evict(self) -> int:
        block_id, _ = self._free_cached.popitem(last=False)
        del self._by_hash[self._key_of.pop(block_id).chain_hash]
        self.num_evicted += 1
        return block_id

    def share(self, block_id: int) -> None:
        """Add a holder to a block that is in use or cached. Raises ``BlockError`` if it is neither."""
        if self.ref_count(block_id) == 0:
            if block_id not in self._free_cached:
                raise BlockError(f"block {block_id} is free and cannot be shared: allocate it first")
            del self._free_cached[block_id]
        self._ref_counts[block_id] += 1

    def register(self, block_id: int, key: BlockKey) -> None:
        """Make the content of a block findable. K and V of all its tokens must have been computed.

        No effect if another block with this content is cached: the two stay apart, and this one is never found. Raises
        ``BlockError`` if the block is free or is cached with another content.
        """
        if self.ref_count(block_id) == 0:
            raise BlockError(f"block {block_id} is free, and a free block has no content to register")
        if self._key_of.get(block_id, key) != key:
            raise BlockError(f"block {block_id} is registered with another content: a full block does not change")
        if self._by_hash.setdefault(key.chain_hash, block_id) == block_id:
            self._key_of[block_id] = key

    def find(self, key: BlockKey) -> int | None:
        """The cached block with this content, or ``None``. The tokens are compared, and not the hash alone."""
        block_id = self._by_hash.get(key.chain_hash)
        return block_id if block_id is not None and self._key_of[block_id].tokens == key.tokens else None

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
            if self._ref_counts[block_id] > 0:
                continue
            if block_id in self._key_of:
                self._free_cached[block_id] = None
            else:
                self._free.append(block_id)

    def ref_count(self, block_id: int) -> int:
        """Holders of a block; 0 means free. Raises ``BlockError`` for an id that does not exist."""
        if not 0 <= block_id < self.num_blocks:
            raise BlockError(f"block ids run from 0 to {self.num_blocks - 1}, got {block_id}")
        return self._ref_counts[block_id]
