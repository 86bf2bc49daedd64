"""Task 2.3: a call adds one block at most, even if the tokens need several."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        if num_tokens > len(self.block_table(seq_id)) * self.block_size:
            self._tables.setdefault(seq_id, [])
            self._tables[seq_id] += self.block_manager.allocate(1)
