"""Task 2.1: checking the blocks uses up an iterator, so that none of them is freed afterwards."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        seen = set()
        for block_id in block_ids:
            if block_id not in self._in_use or block_id in seen:
                raise BlockError(f"block {block_id} cannot be freed")
            seen.add(block_id)
        for block_id in block_ids:
            self._in_use.remove(block_id)
            self._free.append(block_id)
