"""Task 8.2: a table is worked out as a whole and then put in its place; recursion along the chain; slices of the queues."""

import struct


class SharedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        old = list(self.block_table(seq_id))
        new = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        if self.must_copy(seq_id):
            page, copy = self.lengths[seq_id] // self.block_size, new.pop(0)
            self.copy_block(old[page], copy)
            released = [old[page]]
            self._tables[seq_id] = [*old[:page], copy, *old[page + 1 :], *new]
            self.block_manager.free(released)
        else:
            self._tables[seq_id] = old + new

    def block_keys(self, seq: data.Sequence, count: int) -> list[BlockKey]:
        if count > len(seq.block_keys):
            before = self.block_keys(seq, count - 1)
            own = seq.token_ids[(count - 1) * self.block_size : count * self.block_size]
            tokens = struct.pack(f"={len(own)}i", *own)
            hasher = blake2b(before[-1].chain_hash if before else b"", digest_size=16)
            hasher.update(tokens)
            seq.block_keys.append(BlockKey(hasher.digest(), tokens))
        return list(seq.block_keys[:count])

    def match(self, seq: data.Sequence) -> list[int]:
        found: list[int] = []
        while (len(found) + 1) * self.block_size < seq.num_tokens:
            block_id = self.block_manager.find(self.block_keys(seq, len(found) + 1)[-1])
            if block_id is None:
                return found
            found += [block_id]
        return found

    def register(self, seq: data.Sequence, first: int, end: int) -> None:
        before = self._tables[seq.seq_id]
        keys = self.block_keys(seq, end)
        after = list(before)
        for index in range(first, end):
            self.block_manager.register(before[index], keys[index])
            known = self.block_manager.find(keys[index])
            if known not in (None, before[index]):
                after[index] = known
        gained = [new for new, old in zip(after, before) if new != old]
        lost = [old for new, old in zip(after, before) if new != old]
        for block_id in gained:
            self.block_manager.share(block_id)
        self._tables[seq.seq_id] = after
        self.block_manager.free(lost)


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        parts: list[ScheduledSequence] = []
        cache, size = self.cache_manager, self.config.block_size
        for seq in list(self.waiting):
            left = budget - sum(part.num_tokens for part in parts)
            found = cache.match(seq)
            held = sum(cache.block_manager.ref_count(block_id) > 0 for block_id in found)
            needed = -(-seq.num_tokens // size) - held
            if left < 1 or len(self.running) >= self.config.max_num_seqs or needed > cache.num_free_blocks:
                break
            self.waiting.remove(seq)
            self.running = [*self.running, seq]
            cache.attach(seq.seq_id, found, size * len(found))
            seq.skip(size * len(found))
            parts.append(self.take(seq, min(left, seq.num_tokens - size * len(found))))
        return parts


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        seqs = []
        late = []
        running = self.scheduler.running
        for index in range(1, first.params.n):
            seq = self.new_sample(first, index)
            seqs.append(seq)
            if len(running) < self.config.max_num_seqs:
                self.cache.fork(first.seq_id, seq.seq_id, first.num_computed)
                seq.skip(first.num_computed)
                running.insert(running.index(first) + index, seq)
            else:
                late.append(seq)
        for seq in late[::-1]:
            self.scheduler.waiting.appendleft(seq)
        return seqs
