"""Task 4.1: what one prompt takes is not taken off the budget of the next."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        decodes = [seq for seq in self.running if seq.num_unscheduled == 1]
        budget = self.config.max_num_batched_tokens - len(decodes)
        scheduled = []
        for seq in self.running:
            num_tokens = 1 if seq in decodes else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
        return scheduled, max(0, self.config.max_num_batched_tokens - sum(part.num_tokens for part in scheduled))
