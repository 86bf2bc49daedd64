"""Task 7.5: while blocks are coming nobody gets any, not even free ones."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if self.retirement.num_blocks > 0:
            return False
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True
