"""Wrong solutions of chapter 07. ``# %%`` names each, its docstring the task and the mistake."""

# %% context_sent_again
"""Task 7.1: the context length is sent at every step."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start])]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, CONTEXT, entry.start)]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% newest_block_only
"""Task 7.1: of a table that has grown only the last block travels."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            if len(table) > self.num_sent[seq_id]:
                changes += [(row, BLOCKS + len(table) - 1, table[-1])]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% newest_token_sent
"""Task 7.1: a new row gets the last token of the prompt, not the one that comes next."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[-1]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% old_blocks_remembered
"""Task 7.1: what was sent is remembered across a release, so the blocks of a sequence that comes again do not travel."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent.get(seq_id, 0), len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]

    def release(self, seq_id: int) -> None:
        if seq_id in self.row_of:
            self.free.append(self.row_of.pop(seq_id))


# %% row_by_sequence_number
"""Task 7.1: the row is worked out from the sequence's number, although another may hold it."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = seq_id % self.dummy_row
                if row in self.free:
                    self.free.remove(row)
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% row_never_free
"""Task 7.1: release forgets the sequence, but its row is lost."""


class BatchRows:
    def release(self, seq_id: int) -> None:
        self.row_of.pop(seq_id, None)
        self.num_sent.pop(seq_id, None)


# %% rows_in_order_of_rows
"""Task 7.1: the rows are returned in order of their numbers."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return sorted(self.row_of[entry.seq.seq_id] for entry in group)


# %% sent_one_by_one
"""Task 7.1: each sequence's changes travel on their own."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        for entry in group:
            changes = []
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
            self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% starts_at_zero
"""Task 7.1: a new row always starts with no context."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, 0)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% state_made_anew
"""Task 7.1: state is copied before it is changed, once a table has grown."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        if changes and all(column > BLOCKS for _, column, _ in changes):
            self.state = self.state.clone()
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% table_only_when_new
"""Task 7.1: blocks travel only when the row is taken."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            if self.num_sent[seq_id] == 0:
                changes += [(row, BLOCKS + page, table[page]) for page in range(len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% token_sent_when_known
"""Task 7.1: the token is sent again whenever the host knows it, over a newer one on the GPU."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            elif entry.start < len(entry.seq.token_ids):
                changes += [(self.row_of[seq_id], TOKEN, entry.seq.token_ids[entry.start])]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% unknown_sequence_released
"""Task 7.1: release fails for a sequence that has no row."""


class BatchRows:
    def release(self, seq_id: int) -> None:
        self.free.append(self.row_of.pop(seq_id))
        del self.num_sent[seq_id]


# %% whole_table_every_time
"""Task 7.1: the whole block table is sent at every step."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% bound_anew_when_padded
"""Task 7.2: active_rows becomes a new tensor when the batch is padded."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        if len(rows) == bucket:
            self.active_rows[:bucket] = upload(rows, self.device)
        else:
            padding = [self.dummy_row] * (len(self.active_rows) - len(rows))
            self.active_rows = upload([*rows, *padding], self.device)


# %% first_that_fits
"""Task 7.2: the first bucket of the list that is large enough, which need not be the smallest."""


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    for bucket in buckets:
        if bucket >= num_rows:
            return bucket
    raise ValueError(f"{num_rows} rows fit into no bucket")


# %% larger_not_equal
"""Task 7.2: a bucket that is exactly full is passed over."""


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    fitting = [bucket for bucket in buckets if bucket > num_rows]
    if not fitting:
        raise ValueError(f"{num_rows} rows fit into no bucket")
    return min(fitting)


# %% largest_if_too_many
"""Task 7.2: too many rows get the largest bucket, and some are left out."""


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    return min((bucket for bucket in buckets if bucket >= num_rows), default=max(buckets))


# %% padded_with_row_zero
"""Task 7.2: the rest is filled with zeros, and row 0 belongs to a sequence."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        self.active_rows[:bucket].zero_()
        self.active_rows[: len(rows)] = upload(rows, self.device)


# %% padded_with_the_last_row
"""Task 7.2: the rest is filled with the last active row, which is then computed more than once."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        padded = [*rows, *[rows[-1] if rows else self.dummy_row] * (bucket - len(rows))]
        self.active_rows[:bucket].copy_(upload(padded, self.device))


# %% rows_sorted
"""Task 7.2: rows are sorted, so that tokens come back in another order than their sequences."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        padded = [*sorted(rows), *[self.dummy_row] * (bucket - len(rows))]
        self.active_rows[:bucket].copy_(upload(padded, self.device))


# %% stale_rows_left
"""Task 7.2: what is left over still names the rows of an earlier step."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        self.active_rows[: len(rows)] = upload(rows, self.device)


# %% all_seats_computed
"""Task 7.3: tokens are written for all of active_rows, those behind the bucket included."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    everyone = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, everyone))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.token_ids.index_fill_(0, rows.active_rows[len(sampled) :], 0)
    rows.context_lens[rows.dummy_row :].zero_()


# %% dummy_at_one
"""Task 7.3: the dummy is put back to position 1."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    everyone = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, everyone))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].fill_(1)


# %% dummy_gets_on
"""Task 7.3: the dummy's context grows with every step, until it leaves its block."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    everyone = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, everyone))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1


# %% everybody_gets_on
"""Task 7.3: the context of all rows grows, active or not."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    everyone = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, everyone))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens.add_(1)
    rows.context_lens[rows.dummy_row :].zero_()


# %% first_block_only
"""Task 7.3: slots are worked out as if the first block went on for ever."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    slots = tables[:, 0] * cache.block_size + positions
    attend = attend_rows(model, cache, tables, slots, positions)
    everyone = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, everyone))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()


# %% first_rows_not_active_rows
"""Task 7.3: with more than one row, the first rows are computed, not the active ones."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    if len(sampled) > 1:
        active = torch.arange(len(sampled), device=rows.device)
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    everyone = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, everyone))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()


# %% scale_of_the_textbook
"""Task 7.3: attention is always scaled by the head's size, and the model's scale is not used."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.write(layer, slots, key, value)
        keys, values = (pools[layer][tables].flatten(1, 2) for pools in (cache.key_pools, cache.value_pools))
        scale = query.shape[-1] ** -0.5
        return masked_attention(query[:, None], keys, values, positions[:, None], scale)[:, 0]

    everyone = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, everyone))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()


# %% scores_left_behind
"""Task 7.3: the scores go into a tensor of their own, and the caller's stay as they were."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    everyone = torch.arange(len(sampled), device=rows.device)
    logits = forward(model, rows.token_ids[active], positions, attend, everyone)
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()


# %% table_as_it_was_captured
"""Task 7.3: pages that no sequence holds when the step is captured are left out for ever."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    width = max(1, max(rows.num_sent.values(), default=0))
    positions, tables = rows.context_lens[active], rows.block_tables[active][:, :width]
    blocks = rows.block_tables[active].gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    everyone = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, everyone))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()


# %% a_token_for_every_step
"""Task 7.4: every entry counts as a token read, whether it sampled or not."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= 1
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept, step.group.preempted)


# %% chunks_stay_unread
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


# %% depth_ignored
"""Task 7.4: a step is always launched ahead, at depth 0 as well."""


class Engine:
    def step(self) -> SequenceGroup | None:
        group = self.scheduler.schedule()
        if group is not None:
            self.launch(group)
        if self.in_flight and (group is None or len(self.in_flight) > 1):
            return self.read(self.in_flight.popleft())
        return None if group is None else SequenceGroup(())


# %% done_when_nothing_is_read
"""Task 7.4: the last steps are read, and None comes a call too early for sequences that still wait."""


class Engine:
    def step(self) -> SequenceGroup | None:
        group = self.scheduler.schedule()
        if group is None:
            while self.in_flight:
                self.read(self.in_flight.popleft())
            return None
        self.launch(group)
        if len(self.in_flight) > self.depth:
            return self.read(self.in_flight.popleft())
        return SequenceGroup(())


# %% drains
"""Task 7.4: once two steps are in flight both are read: every second step is waited for."""


class Engine:
    def step(self) -> SequenceGroup | None:
        group = self.scheduler.schedule()
        if group is not None:
            self.launch(group)
        if self.in_flight and (group is None or len(self.in_flight) > self.depth):
            while self.in_flight:
                got = self.read(self.in_flight.popleft())
            return got
        return None if group is None else SequenceGroup(())


# %% only_those_who_sample
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


# %% pairs_by_group_order
"""Task 7.4: tokens are taken to be in the order of the group."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(entry for entry in step.group if entry.samples):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept, step.group.preempted)


# %% past_the_end_given
"""Task 7.4: a token that was sampled past the end is given all the same."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(step.sampling):
            self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept, step.group.preempted)


# %% preempted_left_out
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


# %% preempted_loses_its_token
"""Task 7.4: who was preempted meanwhile gets nothing."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(step.sampling):
            if entry.seq.status is SequenceStatus.RUNNING:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept, step.group.preempted)


# %% reads_first
"""Task 7.4: what is in flight is read before the next step is planned: nothing is ever launched ahead."""


class Engine:
    def step(self) -> SequenceGroup | None:
        got = self.read(self.in_flight.popleft()) if self.in_flight else None
        group = self.scheduler.schedule()
        if group is not None:
            self.launch(group)
            if self.depth == 0:
                return self.read(self.in_flight.popleft())
        return got if got is not None or group is None else SequenceGroup(())


# %% scores_not_given
"""Task 7.4: tokens are given without their scores."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None)
        return SequenceGroup(kept, step.group.preempted)


# %% tokens_close_ranks
"""Task 7.4: ended sequences are left out first, and their tokens go to the next."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(entry for entry in step.sampling if not entry.seq.is_finished):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept, step.group.preempted)


# %% who_ends_now_left_out
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


# %% whole_group_returned
"""Task 7.4: those who had ended before are returned too."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return step.group


# %% as_in_chapter_04
"""Task 7.5: blocks that are on their way are not waited for: all sequences behind are preempted."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% asked_once
"""Task 7.5: whether blocks are coming is asked once, before any sequence is preempted."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if not self.cache_manager.can_grow(seq.seq_id, num_tokens) and self.retirement.num_blocks > 0:
            return False
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% freed_at_once
"""Task 7.5: blocks come back at once, although steps are in flight."""


class LateRetirement:
    def collect(self) -> None:
        for seq_id in list(self.pending):
            del self.pending[seq_id]
            self.cache.free(seq_id)
            self.rows.release(seq_id)


# %% one_at_a_time
"""Task 7.5: at most one sequence gives its blocks back in a call."""


class LateRetirement:
    def collect(self) -> None:
        for seq in self.pending.values():
            if seq.num_unread_steps == 0:
                del self.pending[seq.seq_id]
                self.cache.free(seq.seq_id)
                self.rows.release(seq.seq_id)
                break


# %% pending_for_ever
"""Task 7.5: who has given everything back stays pending, and gives again."""


class LateRetirement:
    def collect(self) -> None:
        for seq in self.pending.values():
            if seq.num_unread_steps == 0:
                self.cache.free(seq.seq_id)
                self.rows.release(seq.seq_id)


# %% rows_not_released
"""Task 7.5: the blocks come back, the batch rows never."""


class LateRetirement:
    def collect(self) -> None:
        for seq in list(self.pending.values()):
            if seq.num_unread_steps == 0:
                del self.pending[seq.seq_id]
                self.cache.free(seq.seq_id)


# %% stops_at_the_first_in_flight
"""Task 7.5: the first that is still in flight holds up all behind it."""


class LateRetirement:
    def collect(self) -> None:
        while self.pending:
            seq = next(iter(self.pending.values()))
            if seq.num_unread_steps > 0:
                break
            del self.pending[seq.seq_id]
            self.cache.free(seq.seq_id)
            self.rows.release(seq.seq_id)


# %% tokens_counted
"""Task 7.5: a sequence counts as in flight only while a token of it is unread."""


class LateRetirement:
    def collect(self) -> None:
        for seq in [seq for seq in self.pending.values() if seq.num_unread_tokens == 0]:
            del self.pending[seq.seq_id]
            self.cache.free(seq.seq_id)
            self.rows.release(seq.seq_id)


# %% waits_although_there_is_room
"""Task 7.5: while blocks are coming no sequence gets any, not even free ones."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if self.retirement.num_blocks > 0:
            return False
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% waits_in_the_queue
"""Task 7.5: who has to wait for blocks is put back into the queue."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                self.running.remove(seq)
                self.waiting.appendleft(seq)
                return False
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% yes_for_blocks_to_come
"""Task 7.5: blocks that are coming count as there."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return True
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% compares_with_the_gpu
"""Task 7.1: what the GPU has is read back and compared, for which the host waits."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [
                (row, BLOCKS + page, table[page])
                for page in range(len(table))
                if page >= self.num_sent[seq_id] or int(self.state[row, BLOCKS + page]) != table[page] and False
            ]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% reads_the_row_back
"""Task 7.1: the row's blocks are read back with tolist, for which the host waits."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        known = self.state.tolist()
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table)) if known]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% plan_kept_between_calls
"""Task 7.1: the rows of a group are kept, and used again for a group of the same sequences."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        kept = self.__dict__.setdefault("kept", {})
        key = tuple(entry.seq.seq_id for entry in group)
        if (
            key in kept
            and all(s in self.row_of for s in key)
            and all(self.num_sent[s] == len(cache.block_table(s)) for s in key)
        ):
            return kept[key]
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        kept[key] = [self.row_of[entry.seq.seq_id] for entry in group]
        return kept[key]


# %% num_sent_counts_tokens
"""Task 7.1: num_sent is counted from the tokens, and a block that came early travels twice."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = -(-entry.context_len // cache.block_size)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% table_of_the_step_only
"""Task 7.1: blocks past this step's tokens are left out and counted as sent."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [
                (row, BLOCKS + page, table[page])
                for page in range(self.num_sent[seq_id], min(len(table), -(-entry.context_len // cache.block_size)))
            ]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% written_not_sent
"""Task 7.1: numbers are written into state one by one, and send is never called."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        for row, column, number in changes:
            self.state[row, column] = number
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% row_kept_in_free
"""Task 7.1: a row is taken from free without being removed."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free[-1 - len(self.row_of)]
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% next_power_of_two
"""Task 7.2: buckets are taken to be the powers of two."""


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    fitting = [bucket for bucket in buckets if bucket >= num_rows]
    if not fitting:
        raise ValueError(f"{num_rows} rows fit into none of the buckets {list(buckets)}")
    return min(max(fitting), 1 << (num_rows - 1).bit_length())


# %% sent_number_by_number
"""Task 7.2: each row is written on its own: a launch for each."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        for place in range(bucket):
            self.active_rows[place] = rows[place] if place < len(rows) else self.dummy_row


# %% sent_with_a_plain_tensor
"""Task 7.2: a plain torch.tensor travels, for which the host waits."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        padded = [*rows, *[self.dummy_row] * (bucket - len(rows))]
        self.active_rows[:bucket].copy_(torch.tensor(padded, device=self.device))


# %% looks_before_it_writes
"""Task 7.2: what is there is compared first, and the host waits for the answer."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        padded = [*rows, *[self.dummy_row] * (bucket - len(rows))]
        if self.active_rows[:bucket].tolist() != padded:
            self.active_rows[:bucket].copy_(upload(padded, self.device))


# %% last_call_remembered
"""Task 7.2: the last call is remembered, and a call with the same rows writes nothing, in another bucket either."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        if list(rows) == getattr(self, "last", None):
            return
        self.last = list(rows)
        padded = [*rows, *[self.dummy_row] * (bucket - len(rows))]
        self.active_rows[:bucket].copy_(upload(padded, self.device))


# %% whole_pool_copied
"""Task 7.3: the whole pool is copied in each step before attention reads it."""


def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]  # [bucket]
    positions, tables = rows.context_lens[active], rows.block_tables[active]  # [bucket], [bucket, max_blocks]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    keys = cache.key_pools.clone()
    attend = attend_rows(model, cache, tables, slots, positions)
    all_rows = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, all_rows))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()
    del keys


# %% model_run_twice
"""Task 7.3: the model runs twice, for the scores and for the token."""


def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]  # [bucket]
    positions, tables = rows.context_lens[active], rows.block_tables[active]  # [bucket], [bucket, max_blocks]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    all_rows = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, all_rows))
    again = forward(model, rows.token_ids[active], positions, attend, all_rows)
    sampled.copy_(again.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()


# %% first_rows_get_the_tokens
"""Task 7.3: the tokens go to the first rows, not to the active ones."""


def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]  # [bucket]
    positions, tables = rows.context_lens[active], rows.block_tables[active]  # [bucket], [bucket, max_blocks]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    all_rows = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, all_rows))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[: len(sampled)] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()


# %% dummy_put_back_before
"""Task 7.3: the dummy's context is put back before the step and not after it."""


def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    rows.context_lens[rows.dummy_row :].zero_()
    active = rows.active_rows[: len(sampled)]  # [bucket]
    positions, tables = rows.context_lens[active], rows.block_tables[active]  # [bucket], [bucket, max_blocks]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    all_rows = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, all_rows))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    pass


# %% preempted_dropped
"""Task 7.4: the group that is returned has lost its preempted sequences."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept)


# %% waits_before_it_launches
"""Task 7.4: the oldest step's tokens are waited for before the next is launched."""


class Engine:
    def step(self) -> SequenceGroup | None:
        if self.in_flight:
            self.in_flight[0].tokens.wait()
        if (group := self.scheduler.schedule()) is not None:
            self.launch(group)
        if self.in_flight and (group is None or len(self.in_flight) > self.depth):
            return self.read(self.in_flight.popleft())
        return None if group is None else SequenceGroup(())


# %% counts_set_to_zero
"""Task 7.4: counts are set to 0 instead of being taken back."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps = 0
            entry.seq.num_unread_tokens = 0
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept, step.group.preempted)


# %% counts_of_the_sampling_only
"""Task 7.4: counts of ended sequences are left as they are."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            if entry.seq.is_finished:
                continue
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept, step.group.preempted)


# %% the_newest_is_read
"""Task 7.4: the newest step is read, not the oldest."""


class Engine:
    def step(self) -> SequenceGroup | None:
        if (group := self.scheduler.schedule()) is not None:
            self.launch(group)
        if self.in_flight and (group is None or len(self.in_flight) > self.depth):
            return self.read(self.in_flight.pop())
        return None if group is None else SequenceGroup(())


# %% scores_of_the_group
"""Task 7.4: scores are taken by the place in the group."""


class Engine:
    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                self.give(
                    entry.seq,
                    tokens[index],
                    None
                    if step.logits is None
                    else step.logits[[e.seq.seq_id for e in step.group if e.samples].index(entry.seq.seq_id)],
                )
        return SequenceGroup(kept, step.group.preempted)


# %% finished_only
"""Task 7.5: only sequences that have ended are freed, preempted ones stay pending."""


class LateRetirement:
    def collect(self) -> None:
        for seq in [seq for seq in self.pending.values() if seq.num_unread_steps == 0 and seq.is_finished]:
            del self.pending[seq.seq_id]
            self.cache.free(seq.seq_id)
            self.rows.release(seq.seq_id)


# %% row_released_at_once
"""Task 7.5: the row is released at once, the blocks late."""


class LateRetirement:
    def collect(self) -> None:
        for seq in self.pending.values():
            self.rows.release(seq.seq_id)
        for seq in [seq for seq in self.pending.values() if seq.num_unread_steps == 0]:
            del self.pending[seq.seq_id]
            self.cache.free(seq.seq_id)
            self.rows.release(seq.seq_id)


# %% requester_goes_last
"""Task 7.5: the sequence that asks is never preempted itself, so that another may be preempted for it."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return False
            victim = self.running.pop(-1 if self.running[-1] is not seq or len(self.running) < 2 else -2)
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% preempted_appended
"""Task 7.5: a victim goes to the end of the waiting queue."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.append(victim)
            if victim is seq:
                return False
        return True


# %% not_noted_as_preempted
"""Task 7.5: a victim is not noted in preempted."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% freed_past_the_retirement
"""Task 7.5: a victim's blocks are freed by the cache at once, past the retirement."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.free(victim.seq_id)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% pending_counted_as_sequences
"""Task 7.5: blocks are awaited only while more than one sequence is pending."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if len(self.retirement.pending) > 1:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% waits_only_for_enough
"""Task 7.5: blocks on their way are awaited only if they are enough."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if (
                self.retirement.num_blocks
                >= -(-num_tokens // self.cache_manager.block_size)
                - len(self.cache_manager.block_table(seq.seq_id))
                - self.cache_manager.num_free_blocks
            ):
                return False
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% gap_of_the_eager_steps
"""Task 7.6: the gap of the run without graphs."""


def answer_7_6() -> tuple[float, str]:
    return 392.4, "The host reads the tokens, schedules and launches, and the GPU has to wait for it."


# %% gap_in_milliseconds
"""Task 7.6: milliseconds instead of microseconds."""


def answer_7_6() -> tuple[float, str]:
    return 0.4971, "The host reads the tokens, schedules and launches, and the GPU has to wait for it."


# %% longest_gap
"""Task 7.6: the longest gap instead of the median."""


def answer_7_6() -> tuple[float, str]:
    return 675.7, "The host reads the tokens, schedules and launches, and the GPU has to wait for it."


# %% release_row_zero
"""Task 7.1: row 0 is not given back: the number 0 is taken for no row."""


class BatchRows:
    def release(self, seq_id: int) -> None:
        row = self.row_of.pop(seq_id, None)
        self.num_sent.pop(seq_id, None)
        if row:
            self.free.append(row)


# %% from_the_start_of_the_step
"""Task 7.6: the time from the start of a step to its first kernel."""


def answer_7_6() -> tuple[float, str]:
    return 472.8, "The host reads the tokens, schedules and launches, and the GPU has to wait for it."


# %% mean_gap
"""Task 7.6: the mean of the gaps instead of the median."""


def answer_7_6() -> tuple[float, str]:
    return 502.9, "The host reads the tokens, schedules and launches, and the GPU has to wait for it."


# %% gap_without_a_text
"""Task 7.6: the number is right, and the text is empty."""


def answer_7_6() -> tuple[float, str]:
    return 497.1, ""


# %% num_sent_kept
"""Task 7.1: release does not forget how many blocks were sent, and the sequence that comes again has a row."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent.get(seq_id, 0), len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]

    def release(self, seq_id: int) -> None:
        if seq_id in self.row_of:
            self.free.append(self.row_of.pop(seq_id))


# %% row_not_put_back
"""Task 7.1: a released row does not go back to the free ones."""


class BatchRows:
    def release(self, seq_id: int) -> None:
        if seq_id in self.row_of:
            del self.row_of[seq_id]
            del self.num_sent[seq_id]


# %% blocks_from_column_zero
"""Task 7.1: the columns of the block table are counted from 0, over token and context length."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]


# %% rows_counted_on_the_host
"""Task 7.3: the numbers of the rows are made without a device: on a GPU a tensor of the host's, which a capture refuses."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, torch.arange(len(sampled))))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()


# %% first_rows_grow
"""Task 7.3: the first rows of state grow, whichever are active."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    all_rows = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, all_rows))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[: len(sampled)] += 1
    rows.context_lens[rows.dummy_row :].zero_()


# %% dummy_taken_back_by_one
"""Task 7.3: one is taken from the dummy's context after each step, also after one without padding."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    all_rows = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, all_rows))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].sub_(1)


# %% slot_without_the_block_size
"""Task 7.3: the slot is the block's number plus the offset."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    all_rows = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, all_rows))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()


# %% victim_retired_by_the_cache
"""Task 7.5: a victim is retired as in chapter 04, which frees its blocks at once."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True


# %% victim_freed_at_once
"""Task 7.5: a victim's blocks are freed at once."""


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.free(victim.seq_id)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True
