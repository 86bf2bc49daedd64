"""Task 7.5: whether blocks are coming is asked once, before anybody is preempted."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if not self.cache_manager.can_grow(seq.seq_id, num_tokens) and self.retirement.num_blocks > 0:
            return False
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True
