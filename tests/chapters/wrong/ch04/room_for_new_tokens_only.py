"""Task 4.1: room is made for as many tokens as are new, not for the length that the sequence grows to."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                if not is_decode:
                    budget -= num_tokens
        return scheduled, budget
