"""Task 2.2: all tokens of a call are put into the page of the first one."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        block_id = table[start // self.block_size]
        return [block_id * self.block_size + position % self.block_size for position in range(start, start + count)]
