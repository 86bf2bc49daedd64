"""Task 2.1: names are counted with Counter.update; the free blocks are the keys of a dict, the oldest first."""


class BlockManager:
    def __init__(self, config: PageBrainConfig) -> None:
        assert config.num_blocks is not None
        self.num_blocks = config.num_blocks
        self._free = dict.fromkeys(range(self.num_blocks))

    def ref_count(self, block_id: int) -> int:
        if block_id not in range(self.num_blocks):
            raise BlockError(f"block ids run from 0 to {self.num_blocks - 1}, got {block_id}")
        return int(block_id not in self._free)

    def allocate(self, count: int = 1) -> list[int]:
        if count < 0:
            raise BlockError(f"a count of {count} makes no sense")
        if len(self._free) < count:
            raise OutOfBlocksError(f"{count} blocks are more than the {len(self._free)} free ones")
        block_ids = list(itertools.islice(self._free, count))
        for block_id in block_ids:
            del self._free[block_id]
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        named: Counter[int] = Counter()
        named.update(block_ids)
        if wrong := [block_id for block_id, times in named.items() if times > self.ref_count(block_id)]:
            raise BlockError(f"blocks {wrong} are free already, or named twice")
        self._free.update(dict.fromkeys(named))


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        if missing := self.num_missing_blocks(seq_id, num_tokens):
            self._tables[seq_id] = self._tables.get(seq_id, []) + self.block_manager.allocate(missing)

    def free(self, seq_id: int) -> None:
        self.block_manager.free(block_id for block_id in self._tables.pop(seq_id, []))

    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        pages = [*self.block_table(seq_id)]
        if min(start, count, len(pages) * self.block_size - start - count) < 0:
            raise BlockTableError(f"sequence {seq_id}: no slots for {count} tokens from {start}")
        found = []
        while len(found) < count:
            page, offset = divmod(start + len(found), self.block_size)
            first = pages[page] * self.block_size + offset
            found += range(first, first + min(self.block_size - offset, count - len(found)))
        return found

    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        sizes = [min(self.block_size, num_tokens - first) for first in range(0, num_tokens, self.block_size)]
        pieces = [*zip(self.block_table(seq_id), sizes)]
        if len(pieces) == 1:  # a view
            return self.key_pools[layer, pieces[0][0], :num_tokens], self.value_pools[layer, pieces[0][0], :num_tokens]
        keys, values = (
            torch.cat([pool[layer, block_id, :size] for block_id, size in pieces])
            for pool in (self.key_pools, self.value_pools)
        )
        return keys, values


def answer_2_5() -> tuple[float, str]:
    return 16.0, "The step in which all texts are long decides, since every story holds most of its blocks at that time."
