"""Task 7.5: a sequence counts as in flight only while a token of it is unread."""


class LateRetirement:
    def collect(self) -> None:
        for seq in [seq for seq in self.pending.values() if seq.num_unread_tokens == 0]:
            del self.pending[seq.seq_id]
            self.cache.free(seq.seq_id)
            self.rows.release(seq.seq_id)
