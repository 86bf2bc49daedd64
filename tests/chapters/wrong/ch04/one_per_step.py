"""Task 4.2: one sequence at most is let in per step."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        if budget <= 0 or not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return []
        seq = self.waiting[0]
        if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
            return []
        self.running.append(self.waiting.popleft())
        return [self.take(seq, min(seq.num_unscheduled, budget))]
