"""Task 7.1: rows are written as slices of columns, and the step adds to its rows in place."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        rows, changes = [], []
        for entry in group:
            seq_id, table = entry.seq.seq_id, cache.block_table(entry.seq.seq_id)
            if seq_id not in self.row_of:
                self.row_of[seq_id] = min(self.free)
                self.free.remove(self.row_of[seq_id])
                numbers = [entry.seq.token_ids[entry.start], entry.start, *table]
                first = TOKEN
            else:
                first = BLOCKS + self.num_sent[seq_id]
                numbers = list(table[self.num_sent[seq_id] :])
            self.num_sent[seq_id] = len(table)
            rows.append(self.row_of[seq_id])
            changes += [(rows[-1], column, number) for column, number in enumerate(numbers, start=first)]
        self.send(changes)
        return rows

    def release(self, seq_id: int) -> None:
        held = {self.row_of[seq_id]} if seq_id in self.row_of else set()
        self.free = sorted(held.union(self.free))
        self.row_of = {other: row for other, row in self.row_of.items() if other != seq_id}
        self.num_sent = {other: count for other, count in self.num_sent.items() if other != seq_id}

    def activate(self, rows: Sequence[int], bucket: int) -> None:
        names = [self.dummy_row for _ in range(bucket)]
        names[: len(rows)] = rows
        self.active_rows[0:bucket] = upload(names, self.device)


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    best = None
    for bucket in buckets:
        if bucket >= num_rows and (best is None or bucket < best):
            best = bucket
    if best is None:
        raise ValueError(num_rows)
    return best


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    bucket, size = len(sampled), cache.block_size
    active = rows.active_rows[:bucket]
    positions = rows.context_lens[active]
    slots = rows.block_tables[active, positions // size] * size + positions.remainder(size)
    tables = rows.block_tables[active]
    attend = attend_rows(model, cache, tables, slots, positions)
    last = torch.arange(bucket, device=active.device)
    logits[...] = forward(model, rows.token_ids.gather(0, active), positions, attend, last)
    torch.argmax(logits, dim=1, out=sampled)
    rows.token_ids.scatter_(0, active, sampled)
    rows.context_lens[active] += 1
    rows.context_lens[rows.dummy_row].fill_(0)


class Engine:
    def step(self) -> SequenceGroup | None:
        if (group := self.scheduler.schedule()) is not None:
            self.launch(group)
        limit = 0 if group is None else self.depth
        while len(self.in_flight) > limit:
            return self.read(self.in_flight.popleft())
        return SequenceGroup(()) if group is not None else None

    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        before = {entry.seq.seq_id for entry in step.group if entry.seq.is_finished}
        scores = [None] * len(tokens) if step.logits is None else list(step.logits)
        for entry, token, row in zip(step.sampling, tokens, scores, strict=True):
            entry.seq.num_unread_tokens -= 1
            if entry.seq.seq_id not in before:
                self.give(entry.seq, token, row)
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
        return SequenceGroup(tuple(entry for entry in step.group if entry.seq.seq_id not in before), step.group.preempted)


class LateRetirement:
    def collect(self) -> None:
        for seq_id in tuple(self.pending):
            if not self.pending[seq_id].num_unread_steps:
                del self.pending[seq_id]
                self.cache.free(seq_id)
                self.rows.release(seq_id)


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        if self.cache_manager.can_grow(seq.seq_id, num_tokens):
            return True
        if self.retirement.num_blocks:
            return False
        victim = self.running.pop()
        victim.preempt()
        self.waiting.appendleft(victim)
        self.preempted.append(victim)
        self.retirement.retire(victim)
        return victim is not seq and self.make_room(seq, num_tokens)
