"""Task 4.2: of those that wait the shortest is let in first."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = min(self.waiting, key=lambda seq: seq.num_tokens)
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.waiting.remove(seq)
            self.running.append(seq)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled
