"""Task 4.2: the first in the queue, if it does not fit, goes to the queue's end."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting.popleft()
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                self.waiting.append(seq)
                break
            self.running.append(seq)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled
