"""Wrong solutions of chapter 04. ``# %%`` names each, its docstring the task and the mistake."""

# %% decode_once_it_wrote
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


# %% decodes_cost_nothing
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


# %% decodes_wait_for_prompts
"""Task 4.1: the budget is spent in order, so that a prompt's chunk can leave nothing for a decode behind it."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens
        scheduled = []
        for seq in self.running:
            num_tokens = min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= num_tokens
        return scheduled, budget


# %% each_prompt_has_the_whole_budget
"""Task 4.1: what one prompt takes is not taken off the budget of the next."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        decodes = [seq for seq in self.running if seq.num_unscheduled == 1]
        budget = self.config.max_num_batched_tokens - len(decodes)
        scheduled = []
        for seq in self.running:
            num_tokens = 1 if seq in decodes else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
        return scheduled, max(0, self.config.max_num_batched_tokens - sum(part.num_tokens for part in scheduled))


# %% empty_parts
"""Task 4.1: a sequence for which nothing is left of the budget is scheduled with zero tokens."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if is_decode else num_tokens
        return scheduled, budget


# %% latest_first
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


# %% no_chunks_of_one_token
"""Task 4.1: a chunk of a single token is not worth it, and the budget's last token is left over."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            worth_it = is_decode or num_tokens > 1
            if worth_it and self.make_room(seq, seq.num_scheduled + num_tokens):
                budget -= 0 if is_decode else num_tokens
                scheduled.append(self.take(seq, num_tokens))
            index += 1
        return scheduled, budget


# %% only_whole_rests
"""Task 4.1: a prompt whose rest is larger than the budget gets nothing, in place of as much as fits."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            num_tokens = seq.num_unscheduled
            if num_tokens == 0 or (num_tokens > 1 and num_tokens > budget):
                continue
            if self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if num_tokens == 1 else num_tokens
        return scheduled, budget


# %% preempted_still_scheduled
"""Task 4.1: the loop runs over a copy of running, and so takes sequences that were preempted on the way."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in list(self.running):
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                if not is_decode:
                    budget -= num_tokens
        return scheduled, budget


# %% room_for_new_tokens_only
"""Task 4.1: room is made for as many tokens as are new, not for the length that the sequence grows to."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                if not is_decode:
                    budget -= num_tokens
        return scheduled, budget


# %% stops_at_the_first_without_room
"""Task 4.1: the loop ends at a sequence that gets nothing, so that decodes behind it are left out."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens == 0 or not self.make_room(seq, seq.num_scheduled + num_tokens):
                break
            scheduled.append(self.take(seq, num_tokens))
            budget -= 0 if is_decode else num_tokens
        return scheduled, budget


# %% victims_parts_kept
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


# %% a_block_kept_back
"""Task 4.2: a sequence is let in only if one token more than it has would fit too."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens + 1):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% answer_forgotten_in_blocks
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


# %% back_of_the_queue
"""Task 4.2: the first in the queue, if it does not fit, goes to the queue's end."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting.popleft()
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                self.waiting.append(seq)
                break
            self.running.append(seq)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% blocks_counted_before
"""Task 4.2: what fits is decided for all sequences before any has taken blocks, so that two may count on the same ones."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        fitting = []
        for seq in self.waiting:
            if len(self.running) + len(fitting) == self.config.max_num_seqs:
                break
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            fitting.append(seq)
        scheduled = []
        for seq in fitting:
            if budget == 0:
                break
            self.waiting.popleft()
            self.running.append(seq)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% blocks_for_the_chunk_only
"""Task 4.2: blocks are looked for only for the first chunk, not for all tokens that are there."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            num_tokens = min(seq.num_unscheduled, budget)
            if not self.cache_manager.can_grow(seq.seq_id, num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, num_tokens))
            budget -= num_tokens
        return scheduled


# %% blocks_never_asked_for
"""Task 4.2: a sequence with a free seat is let in, whether there are blocks or not."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting.popleft()
            self.running.append(seq)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% budget_not_reduced
"""Task 4.2: each new sequence may take the whole budget."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
        return scheduled


# %% let_in_without_tokens
"""Task 4.2: sequences are let in although nothing is left of the budget."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            num_tokens = min(seq.num_unscheduled, budget)
            if num_tokens > 0:
                scheduled.append(self.take(seq, num_tokens))
            budget -= num_tokens
        return scheduled


# %% one_per_step
"""Task 4.2: one sequence at most is let in per step."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        if budget <= 0 or not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return []
        seq = self.waiting[0]
        if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
            return []
        self.running.append(self.waiting.popleft())
        return [self.take(seq, min(seq.num_unscheduled, budget))]


# %% one_seat_too_many
"""Task 4.2: one sequence more is let in than there are seats."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) <= self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            num_tokens = min(seq.num_unscheduled, budget)
            scheduled.append(self.take(seq, num_tokens))
            budget -= num_tokens
        return scheduled


# %% only_whole_prompts
"""Task 4.2: a prompt longer than the budget is not let in, and waits for ever."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if seq.num_unscheduled > budget or not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, seq.num_unscheduled))
            budget -= seq.num_tokens
        return scheduled


# %% shortest_first
"""Task 4.2: of those that wait the shortest is let in first."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = min(self.waiting, key=lambda seq: seq.num_tokens)
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.waiting.remove(seq)
            self.running.append(seq)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% small_ones_overtake
"""Task 4.2: a sequence that does not fit is passed over, and a smaller one behind it is let in."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        for seq in list(self.waiting):
            if budget == 0 or len(self.running) == self.config.max_num_seqs:
                break
            if self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                self.waiting.remove(seq)
                self.running.append(seq)
                num_tokens = min(seq.num_unscheduled, budget)
                scheduled.append(self.take(seq, num_tokens))
                budget -= num_tokens
        return scheduled


# %% answer_thrown_away
"""Task 4.3: a preempted sequence loses the tokens that it has written."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            del victim.token_ids[victim.num_prompt_tokens :]
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% blocks_not_retired
"""Task 4.3: a preempted sequence keeps its blocks."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% not_marked
"""Task 4.3: a preempted sequence is not marked, and goes on as if its K and V were still there."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% noted_from_this_call_only
"""Task 4.3: a call's victims replace those of an earlier call in the same step."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        self.preempted = []
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% oldest_preempted
"""Task 4.3: the earliest arrival is preempted."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop(0)
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% one_victim_only
"""Task 4.3: one sequence at most is preempted, even if that does not free enough."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if self.cache_manager.can_grow(seq.seq_id, num_tokens):
            return True
        victim = self.running.pop()
        victim.preempt()
        self.cache_manager.retire(victim)
        self.preempted.append(victim)
        self.waiting.appendleft(victim)
        return victim is not seq and self.cache_manager.can_grow(seq.seq_id, num_tokens)


# %% own_preemption_unnoticed
"""Task 4.3: the answer is yes even if the sequence was preempted itself."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
        return True


# %% preempts_when_it_fits
"""Task 4.3: room is checked for one token too many, so that a sequence is preempted although the blocks just suffice."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens + 1):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% refuses_if_latest
"""Task 4.3: the latest arrival, if it is the one that needs room, keeps its blocks and its seat."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.running[-1] is seq:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
        return True


# %% spares_itself
"""Task 4.3: a sequence never gives its own blocks back, an earlier one has to."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            others = [other for other in self.running if other is not seq]
            if not others:
                return False
            victim = others[-1]
            self.running.remove(victim)
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
        return True


# %% still_running
"""Task 4.3: a sequence that gives up its own blocks stays in running while it waits."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running[-1]
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
            self.running.pop()
        return True


# %% victim_at_the_back
"""Task 4.3: a preempted sequence waits at the back of the queue."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.append(victim)
            if victim is seq:
                return False
        return True


# %% victim_not_noted
"""Task 4.3: a preempted sequence is not noted, so that another is let in within the same step."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% victims_in_wrong_order
"""Task 4.3: of two victims the one that arrived later waits in front of the other."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        victims = []
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            victims.append(victim)
            if victim is seq:
                break
        self.preempted.extend(victims)
        self.waiting.extendleft(reversed(victims))
        return seq not in victims
