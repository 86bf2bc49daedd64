"""Task 2.1: blocks are numbered on from the lowest free one, though some of those numbers may be in use."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks were asked for, {len(self._free)} are free")
        first = min(self._free, default=0)
        block_ids = [(first + i) % self.num_blocks for i in range(count)]
        self._free = [block_id for block_id in self._free if block_id not in block_ids]
        self._in_use.update(block_ids)
        return block_ids
