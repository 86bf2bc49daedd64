"""Task 2.1: a heap that hands out the lowest ids first; block tables are tuples, replaced as a whole."""

import heapq


class BlockManager:
    def __init__(self, config: PageBrainConfig) -> None:
        assert config.num_blocks is not None
        self.num_blocks = config.num_blocks
        self._heap = list(range(self.num_blocks))
        self._holders = [0] * self.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return len(self._heap)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        return tuple(sorted(self._heap))

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._heap)

    def ref_count(self, block_id: int) -> int:
        if not 0 <= block_id < self.num_blocks:
            raise BlockError(f"there is no block {block_id}")
        return self._holders[block_id]

    def allocate(self, count: int = 1) -> list[int]:
        if count < 0:
            raise BlockError(f"count is {count}")
        if count > len(self._heap):
            raise OutOfBlocksError(f"{count} blocks were asked for, {len(self._heap)} are free")
        taken = []
        while len(taken) < count:
            taken.append(heapq.heappop(self._heap))
            self._holders[taken[-1]] = 1
        return taken

    def free(self, block_ids: Iterable[int]) -> None:
        returned: set[int] = set()
        for block_id in block_ids:
            if block_id in returned or not self.ref_count(block_id):
                raise BlockError(f"block {block_id} is free already")
            returned.add(block_id)
        for block_id in returned:
            self._holders[block_id] = 0
            heapq.heappush(self._heap, block_id)


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        table = self.block_table(seq_id)
        missing = -(-num_tokens // self.block_size) - len(table)
        if missing > 0:
            self._tables[seq_id] = (*table, *self.block_manager.allocate(missing))

    def free(self, seq_id: int) -> None:
        if seq_id in self._tables:
            self.block_manager.free(reversed(self._tables[seq_id]))
            del self._tables[seq_id]

    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        block_ids = self.block_table(seq_id)
        covered = [block_id * self.block_size + offset for block_id in block_ids for offset in range(self.block_size)]
        if min(start, count) < 0 or start + count > len(covered):
            raise BlockTableError(f"sequence {seq_id} covers {len(covered)} tokens, {start + count} were asked for")
        return covered[start : start + count]

    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        slots = torch.tensor(self.slots(seq_id, 0, num_tokens), dtype=torch.int64)
        pools = self.key_pools[layer], self.value_pools[layer]
        keys, values = (pool.reshape(-1, *pool.shape[2:]).index_select(0, slots) for pool in pools)
        return keys, values
