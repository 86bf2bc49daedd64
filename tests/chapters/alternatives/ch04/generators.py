"""Task 4.2: generators and small helpers; budgets run down from iterators, and the victim is found by its number."""

from collections.abc import Iterator


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        wanted = {seq: seq.num_unscheduled for seq in self.running}
        left = self.config.max_num_batched_tokens - list(wanted.values()).count(1)
        parts = []
        for seq, count in wanted.items():
            if seq.status is data.SequenceStatus.PREEMPTED:  # everything behind it is preempted as well
                break
            share = count if count <= 1 else min(count, left)
            if share and self.make_room(seq, share + seq.num_scheduled):
                parts.append(self.take(seq, share))
                left -= share if count > 1 else 0
        return parts, left

    def admit(self, budget: int) -> list[ScheduledSequence]:
        return list(self._admitted(budget))

    def _admitted(self, budget: int) -> Iterator[ScheduledSequence]:
        while self._fits(budget):
            seq = self.waiting.popleft()
            self.running += [seq]
            part = self.take(seq, sorted((budget, seq.num_unscheduled))[0])
            budget -= part.num_tokens
            yield part

    def _fits(self, budget: int) -> bool:
        if not (self.waiting and budget and self.config.max_num_seqs > len(self.running)):
            return False
        return self.cache_manager.can_grow(self.waiting[0].seq_id, self.waiting[0].num_tokens)

    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        for victim in iter(lambda: None if self.cache_manager.can_grow(seq.seq_id, num_tokens) else self.running[-1], None):
            self.running.remove(victim)
            self.waiting.appendleft(victim)
            self.preempted += [victim]
            self.cache_manager.retire(victim)
            victim.preempt()
            if not self.running or victim is seq:
                break
        return seq in self.running
