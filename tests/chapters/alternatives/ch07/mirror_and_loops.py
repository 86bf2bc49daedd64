"""Task 7.3: changes are found against a copy of what was sent; attention goes page by page, as often as a table is long."""

import bisect


class BatchRows:
    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        changes: dict[tuple[int, int], int] = {}
        for entry in group.scheduled:
            seq = entry.seq
            is_new = seq.seq_id not in self.row_of
            if is_new:
                self.row_of[seq.seq_id] = self.free.pop(0)
            row = self.row_of[seq.seq_id]
            if is_new:
                changes[row, CONTEXT] = entry.start
                changes[row, TOKEN] = seq.token_ids[entry.start]
            sent = self.num_sent.get(seq.seq_id, 0)
            for page, block_id in enumerate(cache.block_table(seq.seq_id)):
                if page >= sent:
                    changes[row, BLOCKS + page] = block_id
                    self.num_sent[seq.seq_id] = page + 1
        if changes:
            self.send([(row, column, number) for (row, column), number in sorted(changes.items())])
        return list(map(self.row_of.__getitem__, (entry.seq.seq_id for entry in group)))

    def release(self, seq_id: int) -> None:
        row = self.row_of.pop(seq_id, None)
        if row is None:
            return
        self.num_sent.pop(seq_id, None)
        self.free.insert(0, row)

    def activate(self, rows: Sequence[int], bucket: int) -> None:
        self.active_rows.fill_(self.dummy_row)
        self.active_rows[: len(rows)] = upload(list(rows), self.device)


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    in_order = sorted(buckets)
    place = bisect.bisect_left(in_order, num_rows)
    if place == len(in_order):
        raise ValueError(f"{num_rows} rows are more than the largest bucket, {in_order[-1]}, has")
    return in_order[place]


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows.narrow(0, 0, sampled.shape[0])
    here = rows.state.index_select(0, active)
    token_ids, positions, tables = here[:, TOKEN], here[:, CONTEXT], here[:, BLOCKS:]
    size = cache.block_size
    pages = torch.arange(tables.shape[1], device=rows.device)
    is_newest = pages[None] == (positions // size)[:, None]
    slots = (tables * is_newest).sum(dim=1) * size + positions % size

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.write(layer, slots, key, value)
        maximum = torch.full_like(query[..., 0], -torch.inf)
        total, acc = torch.zeros_like(maximum), torch.zeros_like(query)
        scale = attention_scale(model.config, layer)
        offsets = torch.arange(size, device=rows.device)
        for page in range(tables.shape[1]):
            keys, values = cache.key_pools[layer][tables[:, page]], cache.value_pools[layer][tables[:, page]]
            scores = (keys * query[:, None]).sum(-1) * scale  # [num_rows, block_size, num_heads]
            hidden = page * size + offsets[None] > positions[:, None]
            scores = scores.masked_fill(hidden[..., None], -torch.inf)
            larger = torch.maximum(maximum, scores.amax(dim=1))
            shrink, weights = (maximum - larger).exp(), (scores - larger[:, None]).exp()
            total = total * shrink + weights.sum(dim=1)
            acc = acc * shrink[..., None] + (weights[..., None] * values).sum(dim=1)
            maximum = larger
        return acc / total[..., None]

    scores = forward(model, token_ids, positions, attend, torch.arange(len(active), device=rows.device))
    best = scores.max(dim=-1).indices
    logits[:] = scores
    sampled[:] = best
    goes_on = active != rows.dummy_row
    rows.token_ids.index_copy_(0, active, best)
    rows.context_lens.index_copy_(0, active, positions + goes_on.long())


class Engine:
    def step(self) -> SequenceGroup | None:
        group = self.scheduler.schedule()
        if group is None and not self.in_flight:
            return None
        if group is not None:
            self.launch(group)
            if len(self.in_flight) <= self.depth:
                return SequenceGroup(())
        oldest = self.in_flight[0]
        del self.in_flight[0]
        return self.read(oldest)

    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        token_of = {entry.seq.seq_id: (token, place) for place, (entry, token) in enumerate(zip(step.sampling, tokens))}
        kept = []
        for entry in step.group:
            seq = entry.seq
            seq.num_unread_steps -= 1
            if entry.samples:
                seq.num_unread_tokens -= 1
            if seq.is_finished:
                continue
            kept.append(entry)
            if seq.seq_id in token_of:
                token, place = token_of[seq.seq_id]
                self.give(seq, token, step.logits[place] if step.logits is not None else None)
        return SequenceGroup(tuple(kept), step.group.preempted)


class LateRetirement:
    def collect(self) -> None:
        still: dict[int, data.Sequence] = {}
        pending, self.pending = self.pending, still
        for seq_id, seq in pending.items():
            if seq.num_unread_steps:
                still[seq_id] = seq
                continue
            self.rows.release(seq_id)
            self.cache.free(seq_id)


class Scheduler:
    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        fits = self.cache_manager.can_grow(seq.seq_id, num_tokens)
        while not fits and not self.retirement.num_blocks:
            victim = self.running[-1]
            self.running = self.running[:-1]
            self.preempted.append(victim)
            self.waiting.insert(0, victim)
            victim.preempt()
            self.retirement.retire(victim)
            if victim is seq:
                break
            fits = self.cache_manager.can_grow(seq.seq_id, num_tokens)
        return fits and seq in self.running
