"""Task 4.1: what remains of the budget goes to the latest arrival first."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        shares = {}
        for seq in reversed(self.running):
            shares[seq.seq_id] = 1 if seq.num_unscheduled == 1 else min(seq.num_unscheduled, budget)
            if seq.num_unscheduled > 1:
                budget -= shares[seq.seq_id]
        scheduled = []
        for seq in self.running:
            num_tokens = shares[seq.seq_id]
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
        return scheduled, budget
