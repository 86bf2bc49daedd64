"""Task 7.4: who was preempted meanwhile gets nothing, and is not returned either: the token is computed again later."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = tuple(entry for entry in step.group if entry.seq.status is SequenceStatus.RUNNING)
        for index, entry in enumerate(step.sampling):
            if entry in kept:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept, step.group.preempted)
