"""Task 4.2: who fits is decided for all before anyone has taken blocks, so that two may count on the same ones."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        fitting = []
        for seq in self.waiting:
            if len(self.running) + len(fitting) == self.config.max_num_seqs:
                break
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            fitting.append(seq)
        scheduled = []
        for seq in fitting:
            if budget == 0:
                break
            self.waiting.popleft()
            self.running.append(seq)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled
