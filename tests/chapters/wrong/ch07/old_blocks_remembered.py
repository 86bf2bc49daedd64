"""Task 7.1: what was sent is remembered across a release, so the blocks of whoever comes again do not travel."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent.get(seq_id, 0), len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]

    def release(self, seq_id: int) -> None:
        if seq_id in self.row_of:
            self.free.append(self.row_of.pop(seq_id))
