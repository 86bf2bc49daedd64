"""Task 7.4: only those who sample are returned, and chunks of prompts are left out."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = []
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                kept.append(entry)
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(tuple(kept))
