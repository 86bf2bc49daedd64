"""The K and V pools, and each sequence's block table into them.

The :class:`CacheManager` turns the block manager's numbers into memory: it owns the pools, grows block tables a block at a
time, says in which slot each token's K and V belong (the slot mapping), and writes them there. Attention only reads.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pagebrain.config import PageBrainConfig
from pagebrain.errors import BlockTableError, IntegrityError, OutOfBlocksError
from pagebrain.parts import BlockManagerPart


class CacheManager:
    """Pools of K and V for all layers, and a block table per sequence id.

    ``key_pools[layer]`` and ``value_pools[layer]`` are logically ``[num_blocks, block_size, num_heads, head_dim]``. In
    memory a head's slots of one block lie side by side, so that a gathered page is a ready matrix for each head.

    ``has_dummy_block`` adds a block, ``dummy_block``, that no sequence is ever given: padding may write there. ``on_grow``,
    if set, hears of every block table that got longer: sequence id, first new column, block ids.
    """

    def __init__(self, block_manager: BlockManagerPart, config: PageBrainConfig, has_dummy_block: bool = False) -> None:
        num_layers, num_heads, head_dim = config.require_shape()
        self.block_manager = block_manager
        self.config = config
        self.block_size = config.block_size
        self.num_blocks = block_manager.num_blocks
        self.dummy_block = self.num_blocks if has_dummy_block else None
        self.on_grow: Callable[[int, int, list[int]], None] | None = None
        shape = (num_layers, self.num_blocks + has_dummy_block, num_heads, self.block_size, head_dim)
        # Zeros, not empty: a masked slot is multiplied by a weight of 0, and 0 * NaN would be NaN.
        pools = [torch.zeros(shape, dtype=config.torch_dtype, device=config.device) for _ in range(2)]
        self.key_pools: tuple[Tensor, ...] = pools[0].transpose(2, 3).unbind(0)
        self.value_pools: tuple[Tensor, ...] = pools[1].transpose(2, 3).unbind(0)
        self._tables: dict[int, list[int]] = {}
        from pagebrain.attention.choice import default_writer  # here, because attention is built on this module

        self._write_kv = default_writer(pools[0].device, pools[0].dtype, head_dim)

    # Block tables -----------------------------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self.block_manager.num_free_blocks

    @property
    def seq_ids(self) -> tuple[int, ...]:
        """Ids of the sequences that have a block table."""
        return tuple(self._tables)

    def block_table(self, seq_id: int) -> tuple[int, ...]:
        """Physical block ids of a sequence in logical order; empty for one that holds nothing."""
        return tuple(self._tables.get(seq_id, ()))

    def num_missing_blocks(self, seq_id: int, num_tokens: int) -> int:
        """Blocks that the sequence's table lacks to hold ``num_tokens`` tokens."""
        return max(0, self.config.blocks_for(num_tokens) - len(self._tables.get(seq_id, ())))

    def can_grow(self, seq_id: int, num_tokens: int) -> bool:
        """Whether :meth:`grow` would succeed."""
        return self.block_manager.can_allocate(self.num_missing_blocks(seq_id, num_tokens))

    def grow(self, seq_id: int, num_tokens: int) -> None:
        """Make the sequence's table cover ``num_tokens`` tokens, taking no more blocks than that needs.

        Raises ``OutOfBlocksError``, before anything changed, if too few blocks are free.
        """
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table = self._tables.setdefault(seq_id, [])
        table.extend(block_ids)
        if self.on_grow is not None and block_ids:
            self.on_grow(seq_id, len(table) - len(block_ids), block_ids)

    def replace_all(self, restarting: Iterable[int], targets: dict[int, int]) -> None:
        """Free the sequences in ``restarting``, then :meth:`grow` each of ``targets`` (id -> tokens): all of it or nothing.

        Raises ``OutOfBlocksError``, before anything changed, if too few blocks are free even then.
        """
        restarting = set(restarting)
        freed = [block_id for seq_id in restarting for block_id in self._tables.get(seq_id, ())]
        num_freed = sum(1 for block_id in freed if self.block_manager.ref_count(block_id) == 1)
        missing = sum(
            self.config.blocks_for(num_tokens) if seq_id in restarting else self.num_missing_blocks(seq_id, num_tokens)
            for seq_id, num_tokens in targets.items()
        )
        if missing > self.num_free_blocks + num_freed:
            raise OutOfBlocksError(
                f"{missing} blocks are needed for {len(targets)} sequences, but {self.num_free_blocks + num_freed} of "
                f"{self.num_blocks} can be had: free a sequence, or make the cache with a larger num_blocks"
            )
        for seq_id in restarting:
            self.free(seq_id)
        for seq_id, num_tokens in targets.items():
            self.grow(seq_id, num_tokens)

    def free(self, seq_id: int) -> None:
        """Give a sequence's blocks back; a sequence that holds none is left alone."""
        self.block_manager.free(self._tables.get(seq_id, ()))
        self._tables.pop(seq_id, None)

    # Slots ------------------------------------------------------------------------------------------------------------

    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        """Physical slots for tokens ``start .. start + count - 1`` of a sequence; slot = block_id * block_size + offset.

        Raises ``BlockTableError`` if the sequence's table does not cover ``start + count`` tokens.
        """
        table = self._tables.get(seq_id, [])
        block_size = self.block_size
        if start < 0 or count < 0 or start + count > len(table) * block_size:
            raise BlockTableError(
                f"tokens {start}..{start + count - 1} of sequence {seq_id} were asked for, but its {len(table)} blocks hold "
                f"{len(table) * block_size} tokens: grow the table first"
            )
        return [
            table[position // block_size] * block_size + position % block_size for position in range(start, start + count)
        ]

    def slot_mapping(self, seq_id: int, start: int, count: int) -> Tensor:
        """:meth:`slots` as an int64 tensor ``[count]``."""
        return torch.tensor(self.slots(seq_id, start, count), dtype=torch.int64)

    def block_tables(self, seq_ids: Iterable[int]) -> Tensor:
        """The block tables as one int64 tensor ``[num_seqs, max_blocks]``, short ones filled up with block 0."""
        tables = [self._tables.get(seq_id, []) for seq_id in seq_ids]
        width = max(map(len, tables), default=0)
        return torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int64).view(
            len(tables), width
        )

    def write(self, layer: int, slot_mapping: Tensor, key: Tensor, value: Tensor) -> None:
        """Put K and V ``[num_tokens, num_heads, head_dim]`` of new tokens into their slots ``[num_tokens]`` of one layer."""
        self._write_kv(key, value, self.key_pools[layer], self.value_pools[layer], slot_mapping)

    # Integrity --------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless free plus held blocks are all blocks, and every holder is counted exactly once."""
        holders = Counter(block_id for table in self._tables.values() for block_id in table)
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
