"""Task 4.3: of two victims the one that arrived later waits in front of the other."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        victims = []
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            victims.append(victim)
            if victim is seq:
                break
        self.preempted.extend(victims)
        self.waiting.extendleft(reversed(victims))
        return seq not in victims
