"""Task 7.5: nobody waits for blocks that are on their way: everybody behind is preempted."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True
