"""Task 7.5: the blocks come back, the batch rows never."""


class LateRetirement:
    def collect(self) -> None:
        for seq in list(self.pending.values()):
            if seq.num_unread_steps == 0:
                del self.pending[seq.seq_id]
                self.cache.free(seq.seq_id)
