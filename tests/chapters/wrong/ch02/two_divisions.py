"""Task 2.2: start and index are divided apart, so that a page edge between them is missed."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        slots = []
        for i in range(count):
            page = start // self.block_size + i // self.block_size
            slots.append(table[page] * self.block_size + (start + i) % self.block_size)
        return slots
