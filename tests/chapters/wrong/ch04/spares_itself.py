"""Task 4.3: a sequence never gives its own blocks back, an earlier one has to."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            others = [other for other in self.running if other is not seq]
            if not others:
                return False
            victim = others[-1]
            self.running.remove(victim)
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
        return True
