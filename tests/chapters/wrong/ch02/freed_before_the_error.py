"""Task 2.1: blocks are freed one by one, and those before the bad one stay freed."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            if block_id not in self._in_use:
                raise BlockError(f"block {block_id} is not in use")
            self._in_use.remove(block_id)
            self._free.append(block_id)
