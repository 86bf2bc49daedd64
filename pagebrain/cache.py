"""The block table of each sequence: which physical blocks hold its K and V, and when they are freed.

The :class:`CacheManager` grows block tables a block at a time, computes the slot of each token's K and V (the slot mapping),
and frees a sequence's blocks when no step in flight reads them. With prefix caching, a sequence that begins with the same
tokens as an earlier one gets that one's full blocks and does not compute them. :meth:`CacheManager.fork` lets a sequence
continue the tokens of another one. All of this is host code. The plan of the
next step carries the changes of the tables to the executor. The manager owns the
:class:`~pagebrain.attention.kv_pool.KVPool` that the tables point into. Only the attention backend reads and writes it.
"""

import functools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pagebrain.block import BlockKey, BlockManagerPart
from pagebrain.config import PageBrainConfig
from pagebrain.errors import BlockTableError, IntegrityError, OutOfBlocksError
from pagebrain.swap_space import SwapSpace

if TYPE_CHECKING:
    from pagebrain.attention.kv_pool import KVPool


class NewBlocks(NamedTuple):
    """Blocks added to a sequence's block table, from column ``first_column`` on."""

    seq_id: int
    first_column: int
    block_ids: tuple[int, ...]


class TableChanges(NamedTuple):
    """What changed since the last plan. The next plan carries it, see
    :class:`~pagebrain.engine.sequence.SequenceGroup`."""

    released: tuple[int, ...]
    new_blocks: tuple[NewBlocks, ...]
    copied_blocks: tuple[tuple[int, int], ...] = ()
    swapped_out: tuple[tuple[int, int], ...] = ()
    swapped_in: tuple[tuple[int, int], ...] = ()


class RetiringSequence(Protocol):
    """What the deferred free reads of a sequence; see :class:`~pagebrain.engine.sequence.Sequence`."""

    seq_id: int
    num_unread_steps: int


class CachedRequest(Protocol):
    """What prefix caching reads of a sequence's request."""

    @property
    def first_parent(self) -> bytes: ...


class CachedSequence(Protocol):
    """What prefix caching reads of a sequence; see :class:`~pagebrain.engine.sequence.Sequence`.

    ``block_keys`` holds the keys of its first full blocks. Only the cache manager changes it.
    """

    seq_id: int
    token_ids: list[int]
    num_scheduled: int
    num_computed: int
    num_to_catch_up: int
    block_keys: list[BlockKey]

    @property
    def request(self) -> "CachedRequest": ...


class BlockTables:
    """Block tables by sequence id. The cache manager has them, and an executor keeps a copy by applying the plans."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.by_id: dict[int, list[int]] = {}

    def apply(self, released: Iterable[int], new_blocks: Iterable[NewBlocks]) -> None:
        """Apply the changes of a plan: drop released tables, then add new blocks."""
        for seq_id in released:
            self.by_id.pop(seq_id, None)
        for seq_id, first_column, block_ids in new_blocks:
            table = self.by_id.setdefault(seq_id, [])
            table[first_column:] = block_ids

    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        """Physical slots for tokens ``start .. start + count - 1`` of a sequence; slot = block_id * block_size + offset.

        Raises ``BlockTableError`` if the sequence's table does not cover ``start + count`` tokens.
        """
        table = self.by_id.get(seq_id, [])
        block_size = self.block_size
        if start < 0 or count < 0 or start + count > len(table) * block_size:
            raise BlockTableError(
                f"tokens {start}..{start + count - 1} of sequence {seq_id} were asked for, but its {len(table)} blocks hold "
                f"{len(table) * block_size} tokens: grow the table first"
            )
        return [
            table[position // block_size] * block_size + position % block_size for position in range(start, start + count)
        ]

    def padded(self, seq_ids: Iterable[int]) -> Tensor:
        """The tables as one int64 tensor ``[num_seqs, max_blocks]``, short ones padded with block 0."""
        tables = [self.by_id.get(seq_id, []) for seq_id in seq_ids]
        width = max(map(len, tables), default=0)
        return torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int64).view(
            len(tables), width
        )


class CacheManager:
    """A block table per sequence id, and the pool of K and V that the tables point into."""

    def __init__(self, block_manager: BlockManagerPart, config: PageBrainConfig) -> None:
        self.block_manager = block_manager
        self.config = config
        self.block_size = config.block_size
        self.num_blocks = block_manager.num_blocks
        self._tables = BlockTables(config.block_size)
        self._retiring: dict[int, RetiringSequence] = {}
        # Changes that no plan has carried yet: sequence id -> first new column of its table; ids of freed sequences.
        self._first_new: dict[int, int] = {}
        self._released: dict[int, None] = {}  # an ordered set
        self._last_released: tuple[int, ...] = ()
        self._copied: list[tuple[int, int]] = []  # (from, to)
        self.can_share = "prefix_caching" in getattr(block_manager, "supports", ())
        self.prefix_caching = config.prefix_caching and self.can_share
        self.swap_space = SwapSpace(config.num_swap_blocks, config.preemption_mode)

    @functools.cached_property
    def pool(self) -> "KVPool":
        """K and V of all blocks, allocated at the first access. Host code runs without it."""
        from pagebrain.attention.kv_pool import KVPool

        return KVPool.for_config(self.config, self.num_blocks)

    # Block tables -----------------------------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Number of free blocks."""
        return self.block_manager.num_free_blocks

    @property
    def seq_ids(self) -> tuple[int, ...]:
        """Ids of the sequences that have a block table."""
        return tuple(self._tables.by_id)

    def block_table(self, seq_id: int) -> tuple[int, ...]:
        """Physical block ids of a sequence in logical order; empty for a sequence without blocks."""
        return tuple(self._tables.by_id.get(seq_id, ()))

    def num_missing_blocks(self, seq_id: int, num_tokens: int) -> int:
        """Blocks that the sequence's table lacks to hold ``num_tokens`` tokens."""
        return max(0, self.config.blocks_for(num_tokens) - len(self._tables.by_id.get(seq_id, ())))

    def can_grow(self, seq_id: int, num_tokens: int) -> bool:
        """Whether :meth:`grow` would succeed."""
        return self.block_manager.can_allocate(self.num_missing_blocks(seq_id, num_tokens))

    def grow(self, seq_id: int, num_tokens: int) -> None:
        """Allocate the blocks that the sequence's table lacks to hold ``num_tokens`` tokens.

        Raises ``OutOfBlocksError``, before anything changed, if too few blocks are free.
        """
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        self._append(seq_id, block_ids)

    def _append(self, seq_id: int, block_ids: list[int]) -> None:
        if block_ids:
            table = self._tables.by_id.setdefault(seq_id, [])
            self._first_new.setdefault(seq_id, len(table))
            table.extend(block_ids)

    def replace_all(self, restarting: Iterable[int], targets: dict[int, int]) -> None:
        """Free the sequences in ``restarting``, then :meth:`grow` each of ``targets`` (id -> tokens).

        Raises ``OutOfBlocksError``, before anything changed, if too few blocks would be free.
        """
        restarting = set(restarting)
        freed = [block_id for seq_id in restarting for block_id in self._tables.by_id.get(seq_id, ())]
        num_freed = sum(1 for block_id in freed if self.block_manager.ref_count(block_id) == 1)
        missing = sum(
            self.config.blocks_for(num_tokens) if seq_id in restarting else self.num_missing_blocks(seq_id, num_tokens)
            for seq_id, num_tokens in targets.items()
        )
        if missing > self.num_free_blocks + num_freed:
            raise OutOfBlocksError(
                f"{missing} blocks are needed for {len(targets)} sequences, but {self.num_free_blocks + num_freed} of "
                f"{self.num_blocks} are free or would be freed: free a sequence, or make the cache with a larger num_blocks"
            )
        for seq_id in restarting:
            self.free(seq_id)
        for seq_id, num_tokens in targets.items():
            self.grow(seq_id, num_tokens)

    def free(self, seq_id: int) -> None:
        """Free a sequence's blocks at once; without blocks nothing happens.

        The last block is freed first, so that it is evicted first: without its beginning, a cached prefix is useless.
        """
        table = self._tables.by_id.get(seq_id, [])
        self.block_manager.free(reversed(table))
        if self._copied:  # what no plan has carried yet is not copied into blocks that others may get
            self._copied = [(source, target) for source, target in self._copied if target not in table]
        if self._tables.by_id.pop(seq_id, None) is not None:
            self._first_new.pop(seq_id, None)
            self._released[seq_id] = None

    # Prefix caching ---------------------------------------------------------------------------------------------------

    def find_prefix(self, seq: CachedSequence) -> list[int]:
        """Cached blocks with the tokens that the sequence computes next; none if it holds blocks for some of them already.

        At least one token is left to compute: without it there is nothing to sample from.
        """
        first = len(self._tables.by_id.get(seq.seq_id, ()))
        if not self.prefix_caching or seq.num_scheduled != first * self.block_size:
            return []
        manager: Any = self.block_manager
        limit = (len(seq.token_ids) - 1) // self.block_size
        found: list[int] = []
        for key in self._keys(seq, first, limit):
            block_id = manager.find(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def will_find(self, seq: CachedSequence, other: CachedSequence, num_tokens: int) -> bool:
        """Whether ``other`` still computes ``num_tokens`` tokens or more, in full blocks, that ``seq`` can share then."""
        end = other.num_computed // self.block_size + self.config.blocks_for(num_tokens)
        limit = min((len(seq.token_ids) - 1) // self.block_size, other.num_to_catch_up // self.block_size)
        if not self.prefix_caching or end > limit:
            return False
        (own,), (others,) = self._keys(seq, end - 1, end), self._keys(other, end - 1, end)
        return own == others

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that :meth:`find_prefix` can find, free or held."""
        manager: Any = self.block_manager
        return manager.num_cached_blocks if self.prefix_caching else 0

    @property
    def num_evicted_blocks(self) -> int:
        """How many contents the prefix cache lost since the start."""
        manager: Any = self.block_manager
        return manager.num_evicted if self.prefix_caching else 0

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free."""
        return sum(1 for block_id in block_ids if self.block_manager.ref_count(block_id) == 0)

    def attach(self, seq: CachedSequence, block_ids: list[int]) -> None:
        """Append blocks from :meth:`find_prefix` to the sequence's block table, which holds them from now on."""
        manager: Any = self.block_manager
        for block_id in block_ids:
            manager.share(block_id)
        self._append(seq.seq_id, block_ids)

    def register(self, seq: CachedSequence, start: int, end: int) -> None:
        """Make the blocks findable that tokens ``start .. end - 1`` of the sequence have filled.

        K and V of its first ``end`` tokens have been computed, and the step that did it has been read.
        """
        manager: Any = self.block_manager
        table = self._tables.by_id[seq.seq_id]
        first, limit = start // self.block_size, end // self.block_size
        for index, key in enumerate(self._keys(seq, first, limit), start=first):
            manager.register(table[index], key)

    def _keys(self, seq: CachedSequence, first: int, limit: int) -> Iterator[BlockKey]:
        """The keys of blocks ``first .. limit - 1``; each is computed once, when it is first asked for."""
        keys, size = seq.block_keys, self.block_size
        for index in range(min(len(keys), first), limit):
            if index == len(keys):
                tokens = array("i", seq.token_ids[index * size : (index + 1) * size]).tobytes()
                keys.append(BlockKey.after(keys[-1].chain_hash if keys else seq.request.first_parent, tokens))
            if index >= first:
                yield keys[index]

    # Forks ------------------------------------------------------------------------------------------------------------

    def fork(self, parent: CachedSequence, child: CachedSequence, num_tokens: int, *, copies: bool = True) -> None:
        """Let ``child``, which has no blocks, continue the first ``num_tokens`` tokens of ``parent``.

        K and V of these tokens have been computed. The two share the full blocks among them. Each of them writes its next
        token into the last block if it has free slots, so the child gets a copy of it (copy-on-write). The executor makes
        the copy before it computes the next plan. Without ``copies`` the child takes the last block over from a parent that
        writes nothing more and is freed next.

        Raises ``OutOfBlocksError``, before anything changed, if no block is free for the copy.
        """
        table = self._tables.by_id[parent.seq_id]
        num_full = num_tokens // self.block_size
        last = table[num_full : self.config.blocks_for(num_tokens)]
        if copies:
            targets = self.block_manager.allocate(len(last))
            self.attach(child, table[:num_full])
            self._append(child.seq_id, targets)
            self._copied.extend(zip(last, targets))
        else:
            self.attach(child, table[:num_full] + last)
        child.block_keys[:] = parent.block_keys[:num_full]

    # Swapping ---------------------------------------------------------------------------------------------------------

    def swap_out(self, seq_id: int, num_tokens: int) -> bool:
        """Keep K and V of a sequence's first ``num_tokens`` tokens in the swap space, if it takes them.

        The caller retires the blocks. Steps in flight write the last of these tokens before the copy is made.
        """
        blocks = self._tables.by_id.get(seq_id, [])[: self.config.blocks_for(num_tokens)]
        if not self.swap_space.takes(len(blocks), num_tokens):
            return False
        self.swap_space.put(seq_id, blocks)
        return True

    def swap_in(self, seq_id: int, num_tokens: int) -> None:
        """Grow the sequence's table to the ``num_tokens`` tokens that were swapped out, and copy the new blocks back.

        A table that begins with blocks of the prefix cache keeps them.

        Raises ``OutOfBlocksError``, before anything changed, if too few blocks are free.
        """
        first = len(self._tables.by_id.get(seq_id, ()))
        self.grow(seq_id, num_tokens)
        self.swap_space.take(seq_id, first, self._tables.by_id[seq_id][first:])

    # Deferred free ----------------------------------------------------------------------------------------------------

    @property
    def num_retiring_blocks(self) -> int:
        """Blocks that only retired sequences hold: they will be free when the steps in flight have been read."""
        tables = self._tables.by_id
        held = Counter(block_id for seq_id in self._retiring for block_id in tables.get(seq_id, ()))
        return sum(1 for block_id, count in held.items() if self.block_manager.ref_count(block_id) == count)

    def retire(self, seq: RetiringSequence) -> None:
        """Free the blocks of a sequence that ended or was preempted, as soon as its last step in flight has been read.

        A step in flight may still read these blocks; ``seq.num_unread_steps`` counts such steps.
        """
        self._retiring[seq.seq_id] = seq
        self.collect()

    def collect(self) -> None:
        """Free the blocks of retired sequences that no step in flight reads. Called after each step was read."""
        for seq in [seq for seq in self._retiring.values() if seq.num_unread_steps == 0]:
            del self._retiring[seq.seq_id]
            self.free(seq.seq_id)

    # Changes for the executor -----------------------------------------------------------------------------------------

    def take_changes(self) -> TableChanges:
        """Changes since the last call. They belong into the next plan, which must reach the executor."""
        self._last_released = tuple(self._released)
        tables = self._tables.by_id
        new_blocks = tuple(
            [NewBlocks(seq_id, first, tuple(tables[seq_id][first:])) for seq_id, first in self._first_new.items()]
        )
        copied = tuple(self._copied)
        self._first_new.clear()
        self._released.clear()
        self._copied.clear()
        swapped = self.swap_space.take_changes() if self.swap_space.num_slots else ()
        return TableChanges(self._last_released, new_blocks, copied, *swapped)

    def report_anew(self) -> None:
        """Let the next plan carry all tables, because the executor may not have applied the last plan.

        The executor drops its state of these sequences and builds it again. Copies are not repeated: a forked sequence
        whose first step was not read computes the tokens of the copied block itself. What was swapped out is computed
        again too.
        """
        self._copied.clear()
        self.swap_space.drop_all()
        self._released.update(dict.fromkeys((*self._last_released, *self._tables.by_id)))
        self._first_new = dict.fromkeys(self._tables.by_id, 0)

    # Slots ------------------------------------------------------------------------------------------------------------

    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        """See :meth:`BlockTables.slots`."""
        return self._tables.slots(seq_id, start, count)

    def slot_mapping(self, seq_id: int, start: int, count: int) -> Tensor:
        """:meth:`slots` as an int64 tensor ``[count]``."""
        return torch.tensor(self.slots(seq_id, start, count), dtype=torch.int64)

    def block_tables(self, seq_ids: Iterable[int]) -> Tensor:
        """See :meth:`BlockTables.padded`."""
        return self._tables.padded(seq_ids)

    # Integrity --------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless each block is free or held, and its count equals its number of holders."""
        self.swap_space.check_integrity()
        holders = Counter(block_id for table in self._tables.by_id.values() for block_id in table)
        free_list = self.block_manager.free_blocks
        free = set(free_list)
        if len(free) != len(free_list):
            raise IntegrityError(f"the free list names a block twice: {free_list}")
        for block_id in range(self.num_blocks):
            count = self.block_manager.ref_count(block_id)
            if count != holders[block_id]:
                raise IntegrityError(
                    f"block {block_id} counts {count} holders, but {holders[block_id]} block tables name it"
                )
            if (count == 0) != (block_id in free):
                listed = "is" if block_id in free else "is not"
                raise IntegrityError(f"block {block_id} has {count} holders and {listed} in the free list")
