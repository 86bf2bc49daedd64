"""Task 2.1: freeing a block that is not in use raises the set's KeyError."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        in_use = set(self._in_use)
        block_ids = list(block_ids)
        for block_id in block_ids:
            in_use.remove(block_id)
        self._in_use = in_use
        self._free.extend(block_ids)
