"""Task 4.3: one sequence at most is preempted, even if that does not free enough."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if self.cache_manager.can_grow(seq.seq_id, num_tokens):
            return True
        victim = self.running.pop()
        victim.preempt()
        self.retirement.retire(victim)
        self.preempted.append(victim)
        self.waiting.appendleft(victim)
        return victim is not seq and self.cache_manager.can_grow(seq.seq_id, num_tokens)
