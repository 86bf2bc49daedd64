"""Task 4.3: a preempted sequence is not noted, so that somebody is let in within the same step."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True
