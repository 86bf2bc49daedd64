"""Wrong solutions of chapter 04. ``# %%`` names each, its docstring the task and the mistake."""

# %% chunks_of_whole_blocks
"""Task 4.1: a chunk that does not end a prompt is cut to whole blocks."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if not is_decode and num_tokens < seq.num_unscheduled:
                end = (seq.num_scheduled + num_tokens) // self.config.block_size * self.config.block_size
                num_tokens = max(0, end - seq.num_scheduled)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if is_decode else num_tokens
        return scheduled, budget


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


# %% decode_though_it_may_not_grow
"""Task 4.1: a sequence is a decode if one token is missing, even if it may not grow any more."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens
        budget -= sum(seq.num_tokens - seq.num_scheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            missing = seq.num_tokens - seq.num_scheduled
            num_tokens = 1 if missing == 1 else min(missing, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if missing == 1 else num_tokens
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


# %% equal_shares
"""Task 4.1: prompts share what is left in equal parts."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        prompts = [seq for seq in self.running if seq.num_unscheduled > 1]
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        each = budget // max(1, len(prompts))
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, each)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
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


# %% make_room_answer_ignored
"""Task 4.1: what make_room answers is not looked at."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens > 0:
                self.make_room(seq, seq.num_scheduled + num_tokens)
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if is_decode else num_tokens
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


# %% only_one_prompt
"""Task 4.1: only the first prompt gets a chunk in a step."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled, chunk_given = [], False
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if not is_decode and chunk_given:
                continue
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                if not is_decode:
                    chunk_given, budget = True, budget - num_tokens
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


# %% plan_kept_for_the_same_sequences
"""Task 4.1: which sequences decode is kept as long as the same ones run."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        ids = [seq.seq_id for seq in self.running]
        if getattr(self, "_ids", None) != ids:
            self._ids, self._decodes = ids, {seq.seq_id for seq in self.running if seq.num_unscheduled == 1}
        decodes = self._decodes
        budget = self.config.max_num_batched_tokens - len(decodes)
        scheduled = []
        for seq in self.running:
            is_decode = seq.seq_id in decodes
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if is_decode else num_tokens
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


# %% range_of_the_first_length
"""Task 4.1: the loop counts to the length that running had at the beginning."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for index in range(len(self.running)):
            seq = self.running[index]
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if is_decode else num_tokens
        return scheduled, budget


# %% recounted_for_each
"""Task 4.1: the decodes behind a sequence are counted anew for each prompt, a scan of all sequences for each."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        scheduled, given = [], 0
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            to_come = sum(1 for other in self.running[index:] if other.num_unscheduled == 1 and other is not seq)
            left = self.config.max_num_batched_tokens - given - to_come
            num_tokens = min(seq.num_unscheduled, left)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                given += num_tokens
            index += 1
        return scheduled, self.config.max_num_batched_tokens - given


# %% room_asked_without_a_part
"""Task 4.1: make_room is asked even for prompts that get nothing, and may preempt for them."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if self.make_room(seq, seq.num_scheduled + max(1, num_tokens)) and num_tokens > 0:
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if is_decode else num_tokens
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


# %% room_for_the_whole_rest
"""Task 4.1: room is made for the whole rest of a prompt, though only a chunk is taken."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= 0 if is_decode else num_tokens
        return scheduled, budget


# %% running_sorted
"""Task 4.1: running itself is sorted, decodes first."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        self.running.sort(key=lambda seq: seq.num_unscheduled > 1)
        budget = self.config.max_num_batched_tokens
        scheduled = []
        for seq in self.running:
            num_tokens = min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
                budget -= num_tokens
        return scheduled, budget


# %% sampled_by_hand
"""Task 4.1: parts are made by hand, each of them samples."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        for seq in self.running:
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                self.cache_manager.grow(seq.seq_id, seq.num_scheduled + num_tokens)
                scheduled.append(ScheduledSequence(seq, seq.num_scheduled, num_tokens, True))
                budget -= 0 if is_decode else num_tokens
        return scheduled, budget


# %% shortest_rest_first
"""Task 4.1: the prompt with the shortest rest is served first."""


class Scheduler:
    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        budget = self.config.max_num_batched_tokens
        wanted = {}
        for seq in sorted(self.running, key=lambda seq: seq.num_unscheduled):
            wanted[seq.seq_id] = min(seq.num_unscheduled, budget)
            budget -= wanted[seq.seq_id]
        scheduled = []
        for seq in self.running:
            num_tokens = wanted[seq.seq_id]
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                scheduled.append(self.take(seq, num_tokens))
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


# %% all_blocks_at_once
"""Task 4.2: all blocks are given at once, not those of the first part."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.cache_manager.grow(seq.seq_id, seq.num_tokens)
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% answer_dropped_when_let_in
"""Task 4.2: a preempted sequence begins again with its prompt alone."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            del seq.token_ids[seq.num_prompt_tokens :]
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


# %% blocks_for_prompt_and_first_chunk
"""Task 4.2: blocks are asked for the prompt and the first chunk, not for the answer so far."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            num_tokens = min(seq.num_unscheduled, budget)
            if not self.cache_manager.can_grow(seq.seq_id, max(seq.num_prompt_tokens, num_tokens)):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, num_tokens))
            budget -= num_tokens
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


# %% chunk_only_for_the_first
"""Task 4.2: only the first to come in may have a chunk, others must fit into the budget as a whole."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if scheduled and seq.num_unscheduled > budget:
                break
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% first_part_is_the_prompt
"""Task 4.2: the first part is as long as the prompt, for a preempted sequence too."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_prompt_tokens, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% front_of_running
"""Task 4.2: those who come in stand at the front of running."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.insert(0, self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
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


# %% queue_taken_from_its_end
"""Task 4.2: the queue is taken from its end."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[-1]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.pop())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% reserves_the_longest_answer
"""Task 4.2: blocks are asked for the longest text that a sequence may become."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.max_num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% rounded_to_power_of_two
"""Task 4.2: tokens are rounded up to whole blocks by bits, which only powers of two bear."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        mask = self.config.block_size - 1
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, (seq.num_tokens + mask) & ~mask):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
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


# %% stays_in_waiting
"""Task 4.2: who comes in is not taken out of waiting."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        for seq in self.waiting:
            if budget <= 0 or len(self.running) >= self.config.max_num_seqs or seq in self.running:
                break
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(seq)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% whole_blocks_only
"""Task 4.2: full blocks are counted only, so that the last block of a sequence is forgotten."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        size = self.config.block_size
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            num_tokens = max(min(seq.num_unscheduled, budget), seq.num_tokens // size * size)
            if not self.cache_manager.can_grow(seq.seq_id, num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% whole_queue_asked
"""Task 4.2: the cache is asked about every sequence of the queue, though only few can come in."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        fits = {seq.seq_id: self.cache_manager.can_grow(seq.seq_id, seq.num_tokens) for seq in self.waiting}
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not fits[seq.seq_id] or not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% all_later_preempted
"""Task 4.3: all later arrivals are preempted at once."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if self.cache_manager.can_grow(seq.seq_id, num_tokens):
            return True
        while self.running and self.running[-1] is not seq:
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
        if self.cache_manager.can_grow(seq.seq_id, num_tokens):
            return True
        self.running.pop()
        seq.preempt()
        self.cache_manager.retire(seq)
        self.preempted.append(seq)
        self.waiting.appendleft(seq)
        return False


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


# %% asks_for_the_missing_tokens
"""Task 4.3: the cache is asked for what is missing to the length, not for the length."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens - seq.num_scheduled):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% blocks_by_hand
"""Task 4.3: blocks are counted by bits, which only powers of two bear."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        shift = self.config.block_size.bit_length() - 1
        needed = ((num_tokens - 1) >> shift) + 1
        while needed - len(self.cache_manager.block_table(seq.seq_id)) > self.cache_manager.num_free_blocks:
            victim = self.running.pop()
            victim.preempt()
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


# %% fewest_tokens_preempted
"""Task 4.3: the one with the fewest tokens is preempted."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = min(self.running, key=lambda other: other.num_tokens)
            self.running.remove(victim)
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% freed_not_retired
"""Task 4.3: the blocks are freed past the interface."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.free(victim.seq_id)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% ids_noted
"""Task 4.3: the ids of the victims are noted, not the sequences."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim.seq_id)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% looks_again_and_again
"""Task 4.3: it looks again and again whether blocks came back."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        for _ in range(1000):
            if self.cache_manager.can_grow(seq.seq_id, num_tokens):
                return True
        victim = self.running.pop()
        victim.preempt()
        self.cache_manager.retire(victim)
        self.preempted.append(victim)
        self.waiting.appendleft(victim)
        return victim is not seq and self.make_room(seq, num_tokens)


# %% marked_by_hand
"""Task 4.3: the victim's status is set by hand, and its counts are kept."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.status = data.SequenceStatus.PREEMPTED
            victim.num_preemptions += 1
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% no_victim_if_hopeless
"""Task 4.3: if even all later arrivals' blocks would not do, none is preempted and the answer is no."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        place = self.running.index(seq)
        tables = [len(self.cache_manager.block_table(other.seq_id)) for other in self.running[place + 1 :]]
        missing = self.cache_manager.num_missing_blocks(seq.seq_id, num_tokens)
        if missing > self.cache_manager.num_free_blocks + sum(tables):
            return False
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
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


# %% one_block_spare
"""Task 4.3: one more is preempted than is needed."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if self.cache_manager.can_grow(seq.seq_id, num_tokens):
            return True
        while True:
            enough = self.cache_manager.can_grow(seq.seq_id, num_tokens)
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
            if enough or self.cache_manager.can_grow(seq.seq_id, num_tokens + self.config.block_size):
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


# %% says_no_after_a_preemption
"""Task 4.3: after a preemption the answer is no, the sequence has to ask again in the next step."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if self.cache_manager.can_grow(seq.seq_id, num_tokens):
            return True
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                break
        return False


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


# %% two_victims_at_most
"""Task 4.3: a sequence that is not the last asks twice and gives up after one victim."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        for _ in range(2):
            if self.cache_manager.can_grow(seq.seq_id, num_tokens):
                return True
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return self.cache_manager.can_grow(seq.seq_id, num_tokens)


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


# %% as_many_as_all_texts_need
"""Task 4.4: the blocks that all four texts need at their full length are added up; nothing was measured."""


def answer_4_4() -> tuple[float, str]:
    return 16, "The four texts need five, five, four and two blocks when they are complete, which gives sixteen in all."


# %% number_without_a_text
"""Task 4.4: the number alone is returned."""


def answer_4_4() -> tuple[float, str]:
    return 12


# %% one_block_too_few
"""Task 4.4: one block less, with which one sequence is preempted once."""


def answer_4_4() -> tuple[float, str]:
    return 11, "Texts hold blocks only for the tokens that they have, and a smaller pool costs some tokens computed again."
