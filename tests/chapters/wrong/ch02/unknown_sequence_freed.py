"""Task 2.3: freeing a sequence that holds no blocks raises KeyError."""


class PagedCache:
    def free(self, seq_id: int) -> None:
        self.block_manager.free(self._tables.pop(seq_id))
