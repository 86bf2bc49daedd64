"""Task 2.2: only the first token is checked against the table, a later one raises IndexError."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start // self.block_size >= len(table):
            raise BlockTableError(f"token {start} of sequence {seq_id} is past its {len(table)} blocks")
        pages = [divmod(position, self.block_size) for position in range(start, start + count)]
        return [table[page] * self.block_size + offset for page, offset in pages]
