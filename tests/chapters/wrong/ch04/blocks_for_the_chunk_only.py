"""Task 4.2: blocks are looked for only for the first chunk, not for all tokens that are there."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            num_tokens = min(seq.num_unscheduled, budget)
            if not self.cache_manager.can_grow(seq.seq_id, num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, num_tokens))
            budget -= num_tokens
        return scheduled
