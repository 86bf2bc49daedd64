"""Task 4.1: decodes are not counted against the budget."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens
        scheduled = []
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            index += 1
            if seq.num_unscheduled == 1:
                num_tokens = 1
            else:
                num_tokens = min(seq.num_unscheduled, budget)
                budget -= num_tokens
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
        return scheduled, budget
