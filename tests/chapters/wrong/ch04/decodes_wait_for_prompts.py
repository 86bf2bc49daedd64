"""Task 4.1: the budget is spent in order, so that a prompt's chunk can leave nothing for a decode behind it."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens
        scheduled = []
        for seq in self.running:
            num_tokens = min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= num_tokens
        return scheduled, budget
