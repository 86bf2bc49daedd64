"""Task 4.2: whoever does not fit is passed over, and a smaller one behind it is let in."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        for seq in list(self.waiting):
            if budget == 0 or len(self.running) == self.config.max_num_seqs:
                break
            if self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                self.waiting.remove(seq)
                self.running.append(seq)
                num_tokens = min(seq.num_unscheduled, budget)
                scheduled.append(self.take(seq, num_tokens))
                budget -= num_tokens
        return scheduled
