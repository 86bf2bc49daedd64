"""Task 2.3: a sequence that cannot grow is left as it is, without an error."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        if self.can_grow(seq_id, num_tokens):
            block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
            self._tables[seq_id] = [*self.block_table(seq_id), *block_ids]
