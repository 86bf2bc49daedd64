"""Task 4.1: a prompt whose rest is larger than the budget gets nothing, in place of as much as fits."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            num_tokens = seq.num_unscheduled
            if num_tokens == 0 or (num_tokens > 1 and num_tokens > budget):
                continue
            if self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if num_tokens == 1 else num_tokens
        return scheduled, budget
