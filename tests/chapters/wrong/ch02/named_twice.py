"""Task 2.1: a block that is named twice in one call goes into the free list twice."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = list(block_ids)
        for block_id in block_ids:
            if block_id not in self._in_use:
                raise BlockError(f"block {block_id} is not in use")
        self._in_use -= set(block_ids)
        self._free += block_ids
