"""Task 4.1: two passes, decodes first, without the parts of those preempted later on; room is made recursively."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        limit = self.config.max_num_batched_tokens
        parts: dict[int, ScheduledSequence] = {}
        decodes = [seq for seq in self.running if seq.num_unscheduled == 1]
        prompts = [seq for seq in self.running if seq.num_unscheduled > 1]
        budget = limit - len(decodes)
        for seq in decodes:
            if seq in self.running and self.make_room(seq, seq.num_tokens):
                parts[seq.seq_id] = self.take(seq, 1)
        for seq in prompts:
            num_tokens = min(seq.num_unscheduled, budget)
            if num_tokens > 0 and seq in self.running and self.make_room(seq, seq.num_scheduled + num_tokens):
                parts[seq.seq_id] = self.take(seq, num_tokens)
                budget -= num_tokens
        return [parts[seq.seq_id] for seq in self.running if seq.seq_id in parts], budget

    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        for _ in range(self.config.max_num_seqs - len(self.running)):
            left = budget - sum(part.num_tokens for part in scheduled)
            if left < 1 or not self.waiting:
                break
            seq = self.waiting.popleft()
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                self.waiting.appendleft(seq)
                break
            scheduled.append(self.take(seq, min(left, seq.num_unscheduled)))
            self.running = [*self.running, seq]
        return scheduled

    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if self.cache_manager.can_grow(seq.seq_id, num_tokens):
            return True
        victim = self.running.pop()
        self.waiting.insert(0, victim)
        self.preempted.append(victim)
        self.cache_manager.retire(victim)
        victim.preempt()
        return victim is not seq and self.make_room(seq, num_tokens)
