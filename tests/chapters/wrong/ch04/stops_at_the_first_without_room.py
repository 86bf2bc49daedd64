"""Task 4.1: the loop ends at a sequence that gets nothing, so that decodes behind it are left out."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens == 0 or not self.make_room(seq, seq.num_scheduled + num_tokens):
                break
            scheduled.append(self.take(seq, num_tokens))
            budget -= 0 if is_decode else num_tokens
        return scheduled, budget
