"""Task 2.1: a freed block still counts as in use, so that it can be freed again."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = list(block_ids)
        for block_id in block_ids:
            if block_id not in self._in_use or block_ids.count(block_id) > 1:
                raise BlockError(f"block {block_id} cannot be freed")
        self._free.extend(block_ids)
