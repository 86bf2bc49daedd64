"""Task 4.2: blocks are looked for only for the prompt, though a preempted sequence has an answer to compute too."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_prompt_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled
