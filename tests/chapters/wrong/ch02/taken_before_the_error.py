"""Task 2.1: blocks are taken one by one, and those taken before the error are lost."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        block_ids = []
        for _ in range(count):
            if not self._free:
                raise OutOfBlocksError(f"no block is free, {count} were asked for")
            block_ids.append(self._free.pop())
            self._in_use.add(block_ids[-1])
        return block_ids
