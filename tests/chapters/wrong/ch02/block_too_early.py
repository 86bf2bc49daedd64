"""Task 2.3: a length that is a multiple of the block size gets one block more than it needs."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        num_pages = num_tokens // self.block_size + 1
        missing = max(0, num_pages - len(self.block_table(seq_id)))
        block_ids = self.block_manager.allocate(missing)
        self._tables.setdefault(seq_id, []).extend(block_ids)
