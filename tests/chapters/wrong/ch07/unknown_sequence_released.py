"""Task 7.1: release fails for a sequence that has no row."""


class BatchRows:
    def release(self, seq_id: int) -> None:
        self.free.append(self.row_of.pop(seq_id))
        del self.num_sent[seq_id]
