"""Task 2.3: the new blocks replace the table in place of being appended to it."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        missing = self.num_missing_blocks(seq_id, num_tokens)
        if missing > 0:
            self._tables[seq_id] = self.block_manager.allocate(missing)
