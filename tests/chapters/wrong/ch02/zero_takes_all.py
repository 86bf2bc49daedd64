"""Task 2.1: a slice with a negative count takes all free blocks when none is asked for."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks were asked for, {len(self._free)} are free")
        block_ids = self._free[-count:]
        del self._free[-count:]
        self._in_use.update(block_ids)
        return block_ids
