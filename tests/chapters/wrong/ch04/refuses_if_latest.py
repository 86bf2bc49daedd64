"""Task 4.3: the latest arrival, if it is the one that needs room, keeps its blocks and its seat."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.running[-1] is seq:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
        return True
