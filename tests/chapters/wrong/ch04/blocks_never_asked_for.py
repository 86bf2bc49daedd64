"""Task 4.2: whoever has a seat is let in, whether there are blocks or not."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting.popleft()
            self.running.append(seq)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled
