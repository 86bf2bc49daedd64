"""Task 2.3: the sequence has an empty table after the error, though it had none before."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        table = self._tables.setdefault(seq_id, [])
        table.extend(self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens)))
