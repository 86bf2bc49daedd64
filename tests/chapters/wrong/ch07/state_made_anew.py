"""Task 7.1: state is copied before it is changed, once a table has grown."""


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
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        if changes and all(column > BLOCKS for _, column, _ in changes):
            self.state = self.state.clone()
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]
