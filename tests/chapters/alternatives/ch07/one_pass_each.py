"""Task 7.4: changes by columns, a step of scatters and where, and an apply that walks over the group once."""


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        rows: list[int] = []
        changes: list[tuple[int, int, int]] = []
        for seq, start in ((entry.seq, entry.start) for entry in group):
            row = self.row_of.get(seq.seq_id)
            if row is None:
                row = self.row_of.setdefault(seq.seq_id, self.free.pop(len(self.free) // 2))
                changes.extend(((row, CONTEXT, start), (row, TOKEN, seq.token_ids[start])))
            table, known = list(cache.block_table(seq.seq_id)), self.num_sent.get(seq.seq_id, 0)
            changes.extend((row, column, block) for column, block in enumerate(table[known:], BLOCKS + known))
            self.num_sent[seq.seq_id] = len(table)
            rows.append(row)
        self.send(changes)
        return rows

    def release(self, seq_id: int) -> None:
        try:
            row = self.row_of.pop(seq_id)
        except KeyError:
            return
        del self.num_sent[seq_id]
        self.free += [row]

    def activate(self, rows: Sequence[int], bucket: int) -> None:
        names = upload([rows[place] if place < len(rows) else self.dummy_row for place in range(bucket)], self.device)
        self.active_rows.narrow(0, 0, bucket).copy_(names)


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    for bucket in sorted(buckets):
        if num_rows <= bucket:
            return bucket
    raise ValueError(f"no bucket of {sorted(buckets)} holds {num_rows} rows")


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: logits.shape[0]]
    state = rows.state[active]
    token_ids, positions, tables = state[:, TOKEN], state[:, CONTEXT], state[:, BLOCKS:]
    pages = torch.div(positions, cache.block_size, rounding_mode="floor")
    blocks = torch.take_along_dim(tables, pages.unsqueeze(1), dim=1).squeeze(1)
    slots = torch.add(torch.remainder(positions, cache.block_size), blocks, alpha=cache.block_size)
    numbers = torch.arange(active.numel(), device=active.device)
    scores = forward(model, token_ids, positions, attend_rows(model, cache, tables, slots, positions), numbers)
    logits.copy_(scores)
    sampled.copy_(scores.argmax(-1))
    rows.state[:, TOKEN].index_copy_(0, active, sampled)
    grown = torch.where(active == rows.dummy_row, torch.zeros_like(positions), positions + 1)
    rows.state[:, CONTEXT].index_copy_(0, active, grown)


class Engine:
    def step(self) -> SequenceGroup | None:
        group = self.scheduler.schedule()
        if group is not None:
            self.launch(group)
        is_behind = len(self.in_flight) > (self.depth if group is not None else 0)
        if is_behind:
            return self.read(self.in_flight.popleft())
        return SequenceGroup(()) if group is not None else None

    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        places = {id(entry): place for place, entry in enumerate(step.sampling)}
        kept: list[ScheduledSequence] = []
        for entry in step.group:
            seq = entry.seq
            seq.num_unread_steps, seq.num_unread_tokens = (
                seq.num_unread_steps - 1,
                seq.num_unread_tokens - int(entry.samples),
            )
            if seq.status is SequenceStatus.FINISHED:
                continue
            kept.append(entry)
            if (place := places.get(id(entry))) is not None:
                self.give(seq, tokens[place], step.logits[place] if step.logits is not None else None)
        return dataclasses.replace(step.group, scheduled=tuple(kept))


class LateRetirement:
    def collect(self) -> None:
        ready = [seq_id for seq_id, seq in self.pending.items() if seq.num_unread_steps < 1]
        for seq_id in ready:
            self.rows.release(seq_id)
            self.cache.free(seq_id)
            self.pending.pop(seq_id)


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        while True:
            if self.cache_manager.can_grow(seq.seq_id, num_tokens):
                return True
            if any(self.cache_manager.block_table(seq_id) for seq_id in self.retirement.pending):
                return False
            *rest, victim = self.running
            self.running[:] = rest
            self.waiting.appendleft(victim)
            self.preempted.append(victim)
            victim.preempt()
            self.retirement.retire(victim)
            if victim.seq_id == seq.seq_id:
                return False
