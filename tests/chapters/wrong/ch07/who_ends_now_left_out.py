"""Task 7.4: who is returned is worked out at the end, without those who ended with this very token."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        return SequenceGroup(kept, step.group.preempted)
