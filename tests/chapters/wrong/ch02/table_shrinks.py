"""Task 2.3: a table that covers more than is asked for gives the rest back."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        num_pages = (num_tokens + self.block_size - 1) // self.block_size
        table = list(self.block_table(seq_id))
        if num_pages < len(table):
            self.block_manager.free(table[num_pages:])
            table = table[:num_pages]
        else:
            table += self.block_manager.allocate(num_pages - len(table))
        self._tables[seq_id] = table
