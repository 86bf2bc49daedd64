"""Task 2.2: a sequence without a table raises KeyError."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables[seq_id]
        if start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        pages = [divmod(position, self.block_size) for position in range(start, start + count)]
        return [table[page] * self.block_size + offset for page, offset in pages]
