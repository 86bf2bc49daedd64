"""Task 4.1: a sequence that has written something gets one token, even if it has to compute its text again."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        decodes = [seq for seq in self.running if seq.num_unscheduled == 1 or seq.output_token_ids]
        budget = self.config.max_num_batched_tokens - len(decodes)
        scheduled = []
        for seq in self.running:
            num_tokens = min(seq.num_unscheduled, 1 if seq in decodes else budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if seq in decodes else num_tokens
        return scheduled, budget
