"""Task 4.1: a chunk of a single token is not worth it, and the budget's last token is left over."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            worth_it = is_decode or num_tokens > 1
            if worth_it and self.make_room(seq, seq.num_scheduled + num_tokens):
                budget -= 0 if is_decode else num_tokens
                scheduled.append(self.take(seq, num_tokens))
            index += 1
        return scheduled, budget
