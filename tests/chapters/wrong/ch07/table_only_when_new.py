"""Task 7.1: blocks travel only when the row is taken."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            if self.num_sent[seq_id] == 0:
                changes += [(row, BLOCKS + page, table[page]) for page in range(len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]
