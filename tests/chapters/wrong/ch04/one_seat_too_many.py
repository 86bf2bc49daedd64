"""Task 4.2: one sequence more is let in than there are seats."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) <= self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            num_tokens = min(seq.num_unscheduled, budget)
            scheduled.append(self.take(seq, num_tokens))
            budget -= num_tokens
        return scheduled
