"""Task 4.2: sequences are let in although nothing is left of the budget."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            num_tokens = min(seq.num_unscheduled, budget)
            if num_tokens > 0:
                scheduled.append(self.take(seq, num_tokens))
            budget -= num_tokens
        return scheduled
