"""Task 2.1: a negative id counts as a block that can be freed."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = list(block_ids)
        for block_id in block_ids:
            if block_id >= self.num_blocks or block_id in self._free or block_ids.count(block_id) > 1:
                raise BlockError(f"block {block_id} cannot be freed")
        for block_id in block_ids:
            self._in_use.discard(block_id)
            self._free.append(block_id)
