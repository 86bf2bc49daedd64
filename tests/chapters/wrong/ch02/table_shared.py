"""Task 2.3: all new sequences get the same list as their table."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int, table: list[int] = []) -> None:  # noqa: B006
        if seq_id in self._tables:
            table = self._tables[seq_id]
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table.extend(block_ids)
        self._tables[seq_id] = table

    def free(self, seq_id: int) -> None:
        table = self._tables.pop(seq_id, [])
        self.block_manager.free(table)
        table.clear()
