"""Task 4.1: decodes come first, and the part of one that a prompt's chunk then preempts stays in the step."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens
        scheduled = []
        for is_decode in (True, False):
            for seq in self.running:
                if (seq.num_unscheduled == 1) != is_decode or any(part.seq is seq for part in scheduled):
                    continue
                num_tokens = min(seq.num_unscheduled, budget)
                if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                    scheduled.append(self.take(seq, num_tokens))
                    budget -= num_tokens
        return scheduled, budget
