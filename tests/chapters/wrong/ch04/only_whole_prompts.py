"""Task 4.2: a prompt longer than the budget is not let in, and waits for ever."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if seq.num_unscheduled > budget or not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, seq.num_unscheduled))
            budget -= seq.num_tokens
        return scheduled
