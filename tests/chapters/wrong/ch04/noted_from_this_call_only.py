"""Task 4.3: a call's victims replace those of an earlier call in the same step."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        self.preempted = []
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True
