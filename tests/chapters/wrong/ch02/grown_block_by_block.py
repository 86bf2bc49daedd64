"""Task 2.3: a table grows block by block and has grown in part when the error is raised."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        while self.num_missing_blocks(seq_id, num_tokens) > 0:
            block_ids = self.block_manager.allocate(1)
            self._tables.setdefault(seq_id, []).extend(block_ids)
