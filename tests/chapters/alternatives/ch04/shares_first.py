"""Task 4.1: all shares are worked out before a part is taken; running and waiting are cut with slices."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        shares = [seq.num_unscheduled if seq.num_unscheduled <= 1 else 0 for seq in self.running]
        scheduled = []
        for place, seq in enumerate(self.running):  # shrinks at its end while room is made, which ends the loop
            if seq.num_unscheduled > 1:
                left = self.config.max_num_batched_tokens - sum(shares)
                shares[place] = min(seq.num_unscheduled, left)
            if shares[place] == 0:
                continue
            if self.make_room(seq, seq.num_scheduled + shares[place]):
                scheduled.append(self.take(seq, shares[place]))
            elif shares[place] > 1:
                shares[place] = 0
        return scheduled, self.config.max_num_batched_tokens - sum(shares)

    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        for seq in tuple(self.waiting):
            no_seat = len(self.running) >= self.config.max_num_seqs
            if budget <= 0 or no_seat or not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            part = self.take(seq, min(seq.num_unscheduled, budget))
            budget -= part.num_tokens
            self.running.append(seq)
            scheduled.append(part)
        for _ in scheduled:
            self.waiting.popleft()
        return scheduled

    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        fits = self.cache_manager.can_grow(seq.seq_id, num_tokens)
        for victim in self.running[::-1]:
            if fits:
                return True
            del self.running[-1]
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted = [*self.preempted, victim]
            self.waiting.extendleft([victim])
            if victim is seq:
                return False
            fits = self.cache_manager.can_grow(seq.seq_id, num_tokens)
        return fits
