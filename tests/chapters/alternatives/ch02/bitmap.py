"""Task 2.1: a bitmap of free blocks, searched from where the last search ended; slots by torch arithmetic."""


class BlockManager:
    def __init__(self, config: PageBrainConfig) -> None:
        assert config.num_blocks is not None
        self.num_blocks = config.num_blocks
        self._is_free = torch.ones(self.num_blocks, dtype=torch.bool)
        self._cursor = 0

    @property
    def num_free_blocks(self) -> int:
        return int(self._is_free.sum())

    @property
    def free_blocks(self) -> tuple[int, ...]:
        return tuple(
            self._is_free.roll(-self._cursor).nonzero().flatten().add(self._cursor).remainder(self.num_blocks).tolist()
        )

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_free_blocks

    def ref_count(self, block_id: int) -> int:
        if block_id < 0 or block_id >= self.num_blocks:
            raise BlockError(f"there is no block {block_id}")
        return 1 - int(self._is_free[block_id])

    def allocate(self, count: int = 1) -> list[int]:
        if count < 0:
            raise BlockError(f"count is {count}")
        block_ids = list(self.free_blocks[:count])
        if len(block_ids) < count:
            raise OutOfBlocksError(f"{count} blocks were asked for, {len(block_ids)} are free")
        self._is_free[block_ids] = False
        if block_ids:
            self._cursor = (block_ids[-1] + 1) % self.num_blocks
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        after = self._is_free.clone()
        for block_id in block_ids:
            if not 0 <= block_id < self.num_blocks or after[block_id]:
                raise BlockError(f"block {block_id} cannot be freed")
            after[block_id] = True
        self._is_free = after


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        missing = self.num_missing_blocks(seq_id, num_tokens)
        if not self.block_manager.can_allocate(missing):
            raise OutOfBlocksError(f"sequence {seq_id} needs {missing} more blocks")
        for _ in range(missing):
            self._tables.setdefault(seq_id, []).extend(self.block_manager.allocate())

    def free(self, seq_id: int) -> None:
        for block_id in self._tables.pop(seq_id, ()):
            self.block_manager.free([block_id])

    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = torch.tensor(self.block_table(seq_id), dtype=torch.int64)
        positions = torch.arange(start, start + max(count, 0))
        pages = positions.div(self.block_size, rounding_mode="floor")
        if start < 0 or count < 0 or start > len(table) * self.block_size or (count and int(pages[-1]) >= len(table)):
            raise BlockTableError(f"token {start + count - 1} of sequence {seq_id} is past its {len(table)} blocks")
        return (table[pages] * self.block_size + positions.remainder(self.block_size)).tolist()

    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        num_heads, head_dim = self.key_pools.shape[3:]
        keys = self.key_pools.new_empty(num_tokens, num_heads, head_dim)
        values = self.value_pools.new_empty(num_tokens, num_heads, head_dim)
        for page, start in enumerate(range(0, num_tokens, self.block_size)):
            block_id = self.block_table(seq_id)[page]
            size = min(self.block_size, num_tokens - start)
            keys[start : start + size] = self.key_pools[layer, block_id, :size]
            values[start : start + size] = self.value_pools[layer, block_id, :size]
        return keys, values
