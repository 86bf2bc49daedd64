"""Task 7.5: blocks that are coming count as there."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return True
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True
