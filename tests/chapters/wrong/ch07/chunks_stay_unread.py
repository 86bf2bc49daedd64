"""Task 7.4: only steps that sampled count as read."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.sampling:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= 1
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept, step.group.preempted)
