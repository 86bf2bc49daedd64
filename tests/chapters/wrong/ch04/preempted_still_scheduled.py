"""Task 4.1: the loop runs over a copy of running, and so takes sequences that were preempted on the way."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in list(self.running):
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                if not is_decode:
                    budget -= num_tokens
        return scheduled, budget
