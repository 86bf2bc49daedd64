"""Wrong solutions of chapter 08. ``# %%`` names each, its docstring the task and the mistake."""

# %% checks_on_the_way
"""Task 8.1: the error comes when some blocks have lost their holder already."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            if self.ref_count(block_id) == 0:
                raise BlockError(f"block {block_id} is free")
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self.put_back(block_id)


# %% fork_copies
"""Task 8.1: the last block is copied at once, where sharing would do."""


class SharedCache:
    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // self.block_size)
        self.attach(child_id, self.block_table(parent_id)[:num_blocks], num_tokens)
        if num_tokens % self.block_size:
            shared, [own] = self._tables[child_id][-1], self.block_manager.allocate()
            self.copy_block(shared, own)
            self._tables[child_id][-1] = own
            self.block_manager.free([shared])


# %% fork_of_everything
"""Task 8.1: the child gets all blocks of the parent, also those behind the tokens."""


class SharedCache:
    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        self.attach(child_id, self.block_table(parent_id), num_tokens)


# %% fork_of_full_blocks
"""Task 8.1: the last block is left out if it is not full."""


class SharedCache:
    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        self.attach(child_id, self.block_table(parent_id)[: num_tokens // self.block_size], num_tokens)


# %% free_for_the_first_holder
"""Task 8.1: a block is put back as soon as one of its holders frees it."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = list(block_ids)
        for block_id, count in Counter(block_ids).items():
            if count > self.ref_count(block_id):
                raise BlockError(f"block {block_id} has too few holders")
        for block_id in block_ids:
            if self._holders[block_id] > 0:
                self._holders[block_id] = 0
                self.put_back(block_id)


# %% length_of_the_parent
"""Task 8.1: the child's length is the parent's."""


class SharedCache:
    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // self.block_size)
        self.attach(child_id, self.block_table(parent_id)[:num_blocks], self.lengths[parent_id])


# %% named_twice_counts_once
"""Task 8.1: a block that is named twice loses one holder."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = list(dict.fromkeys(block_ids))
        for block_id in block_ids:
            if self.ref_count(block_id) == 0:
                raise BlockError(f"block {block_id} is free")
        for block_id in block_ids:
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self.put_back(block_id)


# %% not_a_holder
"""Task 8.1: the child's table names the blocks, and no holder is counted."""


class SharedCache:
    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // self.block_size)
        self._tables[child_id] = list(self.block_table(parent_id)[:num_blocks])
        self.lengths[child_id] = num_tokens


# %% one_table_for_both
"""Task 8.1: parent and child have the same list as their table."""


class SharedCache:
    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // self.block_size)
        self.attach(child_id, self.block_table(parent_id)[:num_blocks], num_tokens)
        self._tables[child_id] = self._tables[parent_id]


# %% put_back_sorted
"""Task 8.1: blocks are put back in the order of their ids."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = sorted(block_ids)
        for block_id, count in Counter(block_ids).items():
            if count > self.ref_count(block_id):
                raise BlockError(f"block {block_id} has too few holders")
        for block_id in block_ids:
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self.put_back(block_id)


# %% read_twice
"""Task 8.1: the iterable is read once for the checks, and again to free."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        for block_id, count in Counter(block_ids).items():
            if count > self.ref_count(block_id):
                raise BlockError(f"block {block_id} has too few holders")
        for block_id in block_ids:
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self.put_back(block_id)


# %% share_any_free_block
"""Task 8.1: a free block that is not cached is shared too."""


class BlockManager:
    def share(self, block_id: int) -> None:
        if self.ref_count(block_id) == 0:
            del self._free[block_id]
        self._holders[block_id] += 1


# %% share_forgets_the_content
"""Task 8.1: a cached block that is shared again loses its content."""


class BlockManager:
    def share(self, block_id: int) -> None:
        if self.ref_count(block_id) == 0:
            if block_id not in self._keys:
                raise BlockError(f"block {block_id} holds nothing")
            del self._free[block_id]
            del self._index[self._keys.pop(block_id).chain_hash]
        self._holders[block_id] += 1


# %% share_held_blocks_only
"""Task 8.1: a free block is refused, also if it is cached."""


class BlockManager:
    def share(self, block_id: int) -> None:
        if self.ref_count(block_id) == 0:
            raise BlockError(f"block {block_id} is free")
        self._holders[block_id] += 1


# %% share_leaves_it_free
"""Task 8.1: a free cached block gets a holder, and stays among the free ones."""


class BlockManager:
    def share(self, block_id: int) -> None:
        if self.ref_count(block_id) == 0 and block_id not in self._keys:
            raise BlockError(f"block {block_id} holds nothing")
        self._holders[block_id] += 1


# %% share_means_two
"""Task 8.1: a shared block has two holders, however many it had."""


class BlockManager:
    def share(self, block_id: int) -> None:
        if self.ref_count(block_id) == 0:
            if block_id not in self._keys:
                raise BlockError(f"block {block_id} holds nothing")
            del self._free[block_id]
            self._holders[block_id] = 1
        else:
            self._holders[block_id] = 2


# %% times_not_counted
"""Task 8.1: each name is checked, but not how often a block is named."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = list(block_ids)
        for block_id in block_ids:
            if self.ref_count(block_id) == 0:
                raise BlockError(f"block {block_id} is free")
        for block_id in block_ids:
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self.put_back(block_id)


# %% all_tables_follow
"""Task 8.2: every table that names the shared block gets the copy."""


class SharedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        must_copy = self.must_copy(seq_id)
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table = self._tables.setdefault(seq_id, [])
        if must_copy:
            page = self.lengths[seq_id] // self.block_size
            shared, copy = table[page], block_ids.pop()
            self.copy_block(shared, copy)
            for other in self._tables.values():
                other[:] = [copy if block_id == shared else block_id for block_id in other]
            self.block_manager.free([shared])
        table.extend(block_ids)


# %% any_shared_block
"""Task 8.2: a copy is due as soon as any block of the table is shared."""


class SharedCache:
    def must_copy(self, seq_id: int) -> bool:
        return any(self.block_manager.ref_count(block_id) > 1 for block_id in self.block_table(seq_id))


# %% contents_stay_behind
"""Task 8.2: the new block does not get the K and V of the old one."""


class SharedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        must_copy = self.must_copy(seq_id)
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table = self._tables.setdefault(seq_id, [])
        if must_copy:
            page = self.lengths[seq_id] // self.block_size
            shared, table[page] = table[page], block_ids.pop()
            self.block_manager.free([shared])
        table.extend(block_ids)


# %% copied_the_wrong_way
"""Task 8.2: the new block is copied over the shared one."""


class SharedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        must_copy = self.must_copy(seq_id)
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table = self._tables.setdefault(seq_id, [])
        if must_copy:
            page = self.lengths[seq_id] // self.block_size
            shared, table[page] = table[page], block_ids.pop()
            self.copy_block(table[page], shared)
            self.block_manager.free([shared])
        table.extend(block_ids)


# %% copies_its_own_block
"""Task 8.2: a block that is not full is copied, also for its only holder."""


class SharedCache:
    def must_copy(self, seq_id: int) -> bool:
        page = self.lengths.get(seq_id, 0) // self.block_size
        return page < len(self.block_table(seq_id))


# %% copy_before_the_rest_is_there
"""Task 8.2: the copy is made before it is known whether there are blocks for the rest."""


class SharedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        if self.must_copy(seq_id):
            page, table = self.lengths[seq_id] // self.block_size, self._tables[seq_id]
            shared, [copy] = table[page], self.block_manager.allocate()
            self.copy_block(shared, copy)
            table[page] = copy
            self.block_manager.free([shared])
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        self._tables.setdefault(seq_id, []).extend(block_ids)


# %% empty_table_after_an_error
"""Task 8.2: a sequence that got no blocks has an empty table."""


class SharedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        must_copy = self.must_copy(seq_id)
        table = self._tables.setdefault(seq_id, [])
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        if must_copy:
            page = self.lengths[seq_id] // self.block_size
            shared, table[page] = table[page], block_ids.pop()
            self.copy_block(shared, table[page])
            self.block_manager.free([shared])
        table.extend(block_ids)


# %% first_layer_only
"""Task 8.2: only the first layer is copied."""


class SharedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        must_copy = self.must_copy(seq_id)
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table = self._tables.setdefault(seq_id, [])
        if must_copy:
            page = self.lengths[seq_id] // self.block_size
            shared, table[page] = table[page], block_ids.pop()
            self.key_pools[0, table[page]] = self.key_pools[0, shared]
            self.value_pools[0, table[page]] = self.value_pools[0, shared]
            self.block_manager.free([shared])
        table.extend(block_ids)


# %% keys_only
"""Task 8.2: K is copied, and V is not."""


class SharedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        must_copy = self.must_copy(seq_id)
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table = self._tables.setdefault(seq_id, [])
        if must_copy:
            page = self.lengths[seq_id] // self.block_size
            shared, table[page] = table[page], block_ids.pop()
            self.key_pools[:, table[page]] = self.key_pools[:, shared]
            self.block_manager.free([shared])
        table.extend(block_ids)


# %% more_than_two_holders
"""Task 8.2: two holders may write into the same block."""


class SharedCache:
    def must_copy(self, seq_id: int) -> bool:
        page = self.lengths.get(seq_id, 0) // self.block_size
        table = self.block_table(seq_id)
        return page < len(table) and self.block_manager.ref_count(table[page]) > 2


# %% never_copies
"""Task 8.2: a block is never copied."""


class SharedCache:
    def must_copy(self, seq_id: int) -> bool:
        return False


# %% only_without_a_length
"""Task 8.2: a sequence whose length is not known counts as one that shares."""


class SharedCache:
    def must_copy(self, seq_id: int) -> bool:
        if seq_id not in self.lengths:
            return bool(self.block_table(seq_id))
        page = self.lengths[seq_id] // self.block_size
        table = self.block_table(seq_id)
        return page < len(table) and self.block_manager.ref_count(table[page]) > 1


# %% still_a_holder
"""Task 8.2: the sequence stays a holder of the block that it no longer names."""


class SharedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        must_copy = self.must_copy(seq_id)
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table = self._tables.setdefault(seq_id, [])
        if must_copy:
            page = self.lengths[seq_id] // self.block_size
            shared, table[page] = table[page], block_ids.pop()
            self.copy_block(shared, table[page])
        table.extend(block_ids)


# %% table_names_the_shared_block
"""Task 8.2: the copy is made, and the table still names the shared block."""


class SharedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        must_copy = self.must_copy(seq_id)
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table = self._tables.setdefault(seq_id, [])
        if must_copy:
            page = self.lengths[seq_id] // self.block_size
            copy = block_ids.pop()
            self.copy_block(table[page], copy)
            self.block_manager.free([copy])
        table.extend(block_ids)


# %% the_block_of_the_last_token
"""Task 8.2: the block of the last cached token is looked at, not that of the next."""


class SharedCache:
    def must_copy(self, seq_id: int) -> bool:
        page = max(0, self.lengths.get(seq_id, 0) - 1) // self.block_size
        table = self.block_table(seq_id)
        return page < len(table) and self.block_manager.ref_count(table[page]) > 1


# %% the_last_block
"""Task 8.2: a copy is due if the table's last block is shared, also when it is full."""


class SharedCache:
    def must_copy(self, seq_id: int) -> bool:
        table = self.block_table(seq_id)
        return bool(table) and self.block_manager.ref_count(table[-1]) > 1


# %% all_found_blocks_count_as_free
"""Task 8.3: found blocks that are held are reckoned as if they were free."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq, cache = self.waiting[0], self.cache_manager
            found = cache.match(seq)
            missing = cache.num_missing_blocks(seq.seq_id, seq.num_tokens) - len(found)
            if not cache.block_manager.can_allocate(missing + len(found)):
                break
            self.running.append(self.waiting.popleft())
            cache.attach(seq.seq_id, found, len(found) * self.config.block_size)
            seq.skip(len(found) * self.config.block_size)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% all_tokens_in_each_key
"""Task 8.3: a key has all tokens up to the block's end, in place of the block's own."""


class SharedCache:
    def block_keys(self, seq: data.Sequence, count: int) -> list[BlockKey]:
        for index in range(len(seq.block_keys), count):
            parent = seq.block_keys[-1].chain_hash if seq.block_keys else b""
            tokens = array("i", seq.token_ids[: (index + 1) * self.block_size]).tobytes()
            seq.block_keys.append(BlockKey(blake2b(parent + tokens, digest_size=16).digest(), tokens))
        return seq.block_keys[:count]


# %% attached_before_the_check
"""Task 8.3: a sequence that cannot come in holds the blocks that were found for it."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq, cache = self.waiting[0], self.cache_manager
            found = cache.match(seq)
            cache.attach(seq.seq_id, found, len(found) * self.config.block_size)
            if not cache.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            seq.skip(len(found) * self.config.block_size)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% blocks_taken_before_the_hit
"""Task 8.3: new blocks are taken before the found ones are held, so that these can be evicted."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq, cache = self.waiting[0], self.cache_manager
            found = cache.match(seq)
            missing = cache.num_missing_blocks(seq.seq_id, seq.num_tokens) - len(found)
            if not cache.block_manager.can_allocate(missing + cache.num_unheld(found)):
                break
            self.running.append(self.waiting.popleft())
            own = cache.block_manager.allocate(missing)
            cache.attach(seq.seq_id, found, len(found) * self.config.block_size)
            seq.skip(len(found) * self.config.block_size)
            cache.block_manager.free(own)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% budget_before_the_hit
"""Task 8.3: the share of the budget is worked out before the hit, so found tokens are paid for."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq, cache = self.waiting[0], self.cache_manager
            found = cache.match(seq)
            missing = cache.num_missing_blocks(seq.seq_id, seq.num_tokens) - len(found)
            if not cache.block_manager.can_allocate(missing + cache.num_unheld(found)):
                break
            self.running.append(self.waiting.popleft())
            num_tokens = min(seq.num_unscheduled, budget)
            budget -= num_tokens
            cache.attach(seq.seq_id, found, len(found) * self.config.block_size)
            seq.skip(len(found) * self.config.block_size)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, num_tokens)))
        return scheduled


# %% found_blocks_counted_twice
"""Task 8.3: a free block that was found counts as a block that can be taken, too."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq, cache = self.waiting[0], self.cache_manager
            found = cache.match(seq)
            missing = cache.num_missing_blocks(seq.seq_id, seq.num_tokens) - len(found)
            if not cache.block_manager.can_allocate(missing):
                break
            self.running.append(self.waiting.popleft())
            cache.attach(seq.seq_id, found, len(found) * self.config.block_size)
            seq.skip(len(found) * self.config.block_size)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% found_blocks_needed_again
"""Task 8.3: blocks for all tokens must be free, as if nothing had been found."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq, cache = self.waiting[0], self.cache_manager
            found = cache.match(seq)
            missing = cache.num_missing_blocks(seq.seq_id, seq.num_tokens)
            if not cache.block_manager.can_allocate(missing + cache.num_unheld(found)):
                break
            self.running.append(self.waiting.popleft())
            cache.attach(seq.seq_id, found, len(found) * self.config.block_size)
            seq.skip(len(found) * self.config.block_size)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% found_by_tokens
"""Task 8.3: the tokens are compared, and what stood before them is not."""


class BlockManager:
    def find(self, key: BlockKey) -> int | None:
        return next((block_id for block_id, other in self._keys.items() if other.tokens == key.tokens), None)


# %% full_prompt_hit
"""Task 8.3: a prompt that is wholly cached is skipped to its end, and nothing is left to compute."""


class SharedCache:
    def match(self, seq: data.Sequence) -> list[int]:
        found: list[int] = []
        for key in self.block_keys(seq, seq.num_tokens // self.block_size):
            block_id = self.block_manager.find(key)
            if block_id is None:
                break
            found.append(block_id)
        return found


# %% gaps_are_jumped
"""Task 8.3: blocks behind one that is missing are taken as well."""


class SharedCache:
    def match(self, seq: data.Sequence) -> list[int]:
        found: list[int] = []
        for key in self.block_keys(seq, (seq.num_tokens - 1) // self.block_size):
            block_id = self.block_manager.find(key)
            if block_id is None:
                continue
            found.append(block_id)
        return found


# %% hash_is_enough
"""Task 8.3: the tokens are not compared."""


class BlockManager:
    def find(self, key: BlockKey) -> int | None:
        return self._index.get(key.chain_hash)


# %% hash_of_python
"""Task 8.3: Python's own hash, which differs between processes."""


class SharedCache:
    def block_keys(self, seq: data.Sequence, count: int) -> list[BlockKey]:
        for index in range(len(seq.block_keys), count):
            parent = seq.block_keys[-1].chain_hash if seq.block_keys else b""
            tokens = array("i", seq.token_ids[index * self.block_size : (index + 1) * self.block_size]).tobytes()
            number = hash((parent, tokens)) % 2**64
            seq.block_keys.append(BlockKey(number.to_bytes(16, "little"), tokens))
        return seq.block_keys[:count]


# %% held_blocks_only
"""Task 8.3: a block without holders is not found."""


class SharedCache:
    def match(self, seq: data.Sequence) -> list[int]:
        found: list[int] = []
        for key in self.block_keys(seq, (seq.num_tokens - 1) // self.block_size):
            block_id = self.block_manager.find(key)
            if block_id is None or self.block_manager.ref_count(block_id) == 0:
                break
            found.append(block_id)
        return found


# %% hit_is_paid_for
"""Task 8.3: the tokens that were found are taken off the budget."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq, cache = self.waiting[0], self.cache_manager
            found = cache.match(seq)
            missing = cache.num_missing_blocks(seq.seq_id, seq.num_tokens) - len(found)
            if not cache.block_manager.can_allocate(missing + cache.num_unheld(found)):
                break
            self.running.append(self.waiting.popleft())
            cache.attach(seq.seq_id, found, len(found) * self.config.block_size)
            seq.skip(len(found) * self.config.block_size)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].context_len
        return scheduled


# %% length_of_the_hit_in_blocks
"""Task 8.3: skip is given blocks, not tokens."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq, cache = self.waiting[0], self.cache_manager
            found = cache.match(seq)
            missing = cache.num_missing_blocks(seq.seq_id, seq.num_tokens) - len(found)
            if not cache.block_manager.can_allocate(missing + cache.num_unheld(found)):
                break
            self.running.append(self.waiting.popleft())
            cache.attach(seq.seq_id, found, len(found) * self.config.block_size)
            seq.skip(len(found))
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% made_anew
"""Task 8.3: all keys are made anew in each call."""


class SharedCache:
    def block_keys(self, seq: data.Sequence, count: int) -> list[BlockKey]:
        seq.block_keys.clear()
        for index in range(count):
            parent = seq.block_keys[-1].chain_hash if seq.block_keys else b""
            tokens = array("i", seq.token_ids[index * self.block_size : (index + 1) * self.block_size]).tobytes()
            seq.block_keys.append(BlockKey(blake2b(parent + tokens, digest_size=16).digest(), tokens))
        return seq.block_keys[:count]


# %% match_becomes_a_holder
"""Task 8.3: the search itself adds holders."""


class SharedCache:
    def match(self, seq: data.Sequence) -> list[int]:
        found: list[int] = []
        for key in self.block_keys(seq, (seq.num_tokens - 1) // self.block_size):
            block_id = self.block_manager.find(key)
            if block_id is None:
                break
            self.block_manager.share(block_id)
            found.append(block_id)
        return found


# %% match_remembered
"""Task 8.3: what was found when the sequence was first asked for is returned ever after."""


class SharedCache:
    def match(self, seq: data.Sequence) -> list[int]:
        if (kept := getattr(seq, "found_blocks", None)) is not None:
            return list(kept)
        found: list[int] = []
        for key in self.block_keys(seq, (seq.num_tokens - 1) // self.block_size):
            block_id = self.block_manager.find(key)
            if block_id is None:
                break
            found.append(block_id)
        seq.found_blocks = found
        return list(found)


# %% more_keys_than_asked_for
"""Task 8.3: all keys that are known are returned, also those past the count."""


class SharedCache:
    def block_keys(self, seq: data.Sequence, count: int) -> list[BlockKey]:
        for index in range(len(seq.block_keys), count):
            parent = seq.block_keys[-1].chain_hash if seq.block_keys else b""
            tokens = array("i", seq.token_ids[index * self.block_size : (index + 1) * self.block_size]).tobytes()
            seq.block_keys.append(BlockKey(blake2b(parent + tokens, digest_size=16).digest(), tokens))
        return seq.block_keys


# %% not_skipped
"""Task 8.3: the sequence has the blocks, and computes their tokens all the same."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq, cache = self.waiting[0], self.cache_manager
            found = cache.match(seq)
            missing = cache.num_missing_blocks(seq.seq_id, seq.num_tokens) - len(found)
            if not cache.block_manager.can_allocate(missing + cache.num_unheld(found)):
                break
            self.running.append(self.waiting.popleft())
            cache.attach(seq.seq_id, found, len(found) * self.config.block_size)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% one_block_too_few
"""Task 8.3: the last block that can be found is never asked for."""


class SharedCache:
    def match(self, seq: data.Sequence) -> list[int]:
        found: list[int] = []
        for key in self.block_keys(seq, max(0, (seq.num_tokens - 2) // self.block_size)):
            block_id = self.block_manager.find(key)
            if block_id is None:
                break
            found.append(block_id)
        return found


# %% prompt_only
"""Task 8.3: only blocks of the prompt are looked for, not those of the answer so far."""


class SharedCache:
    def match(self, seq: data.Sequence) -> list[int]:
        found: list[int] = []
        for key in self.block_keys(seq, (seq.num_prompt_tokens - 1) // self.block_size):
            block_id = self.block_manager.find(key)
            if block_id is None:
                break
            found.append(block_id)
        return found


# %% stale_plan
"""Task 8.3: blocks are looked up for the whole queue first, and may be evicted when an earlier one comes in."""


class Scheduler:
    def admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        plan = {seq.seq_id: self.cache_manager.match(seq) for seq in self.waiting}
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq, cache = self.waiting[0], self.cache_manager
            found = plan[seq.seq_id]
            missing = cache.num_missing_blocks(seq.seq_id, seq.num_tokens) - len(found)
            if not cache.block_manager.can_allocate(missing + cache.num_unheld(found)):
                break
            self.running.append(self.waiting.popleft())
            cache.attach(seq.seq_id, found, len(found) * self.config.block_size)
            seq.skip(len(found) * self.config.block_size)
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled


# %% without_the_parent
"""Task 8.3: a block's hash is that of its own tokens."""


class SharedCache:
    def block_keys(self, seq: data.Sequence, count: int) -> list[BlockKey]:
        for index in range(len(seq.block_keys), count):
            tokens = array("i", seq.token_ids[index * self.block_size : (index + 1) * self.block_size]).tobytes()
            seq.block_keys.append(BlockKey(blake2b(tokens, digest_size=16).digest(), tokens))
        return seq.block_keys[:count]


# %% all_behind
"""Task 8.4: a block that is not cached is put behind those that are."""


class BlockManager:
    def put_back(self, block_id: int) -> None:
        self._free[block_id] = None


# %% content_lost_when_freed
"""Task 8.4: a block loses its content with its last holder."""


class BlockManager:
    def put_back(self, block_id: int) -> None:
        if (key := self._keys.pop(block_id, None)) is not None:
            del self._index[key.chain_hash]
        self._free[block_id] = None
        self._free.move_to_end(block_id, last=False)


# %% content_overwritten
"""Task 8.4: a cached block is registered with another content."""


class BlockManager:
    def register(self, block_id: int, key: BlockKey) -> None:
        if self.ref_count(block_id) == 0:
            raise BlockError(f"block {block_id} is free")
        if self._index.setdefault(key.chain_hash, block_id) == block_id:
            self._keys[block_id] = key


# %% duplicate_freed_before_the_table_is_remapped
"""Task 8.4: a duplicate is free at once, and the table names it until the next block is registered."""


class SharedCache:
    def register(self, seq: data.Sequence, first: int, end: int) -> None:
        table = self._tables[seq.seq_id]
        later = self.__dict__.setdefault("_later", {})
        for index, known in later.pop(seq.seq_id, []):
            table[index] = known
        for index, key in enumerate(self.block_keys(seq, end)[first:], start=first):
            known = self.block_manager.find(key)
            if known is None:
                self.block_manager.register(table[index], key)
            elif known != table[index]:
                self.block_manager.share(known)
                self.block_manager.free([table[index]])
                later.setdefault(seq.seq_id, []).append((index, known))


# %% duplicate_never_freed
"""Task 8.4: the table names the other block, and the duplicate keeps its holder."""


class SharedCache:
    def register(self, seq: data.Sequence, first: int, end: int) -> None:
        table = self._tables[seq.seq_id]
        for index, key in enumerate(self.block_keys(seq, end)[first:], start=first):
            known = self.block_manager.find(key)
            if known is None:
                self.block_manager.register(table[index], key)
            elif known != table[index]:
                self.block_manager.share(known)
                table[index] = known


# %% duplicates_marked_as_cached
"""Task 8.4: a block whose content is known already counts as cached."""


class BlockManager:
    def register(self, block_id: int, key: BlockKey) -> None:
        if self.ref_count(block_id) == 0 or self._keys.get(block_id, key) != key:
            raise BlockError(f"block {block_id} cannot be registered")
        self._index.setdefault(key.chain_hash, block_id)
        self._keys[block_id] = key


# %% duplicates_stay_apart
"""Task 8.4: a duplicate stays in the table."""


class SharedCache:
    def register(self, seq: data.Sequence, first: int, end: int) -> None:
        table = self._tables[seq.seq_id]
        for index, key in enumerate(self.block_keys(seq, end)[first:], start=first):
            self.block_manager.register(table[index], key)


# %% every_block_counts_as_evicted
"""Task 8.4: blocks without a content count as evicted too."""


class BlockManager:
    def take_free(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        if (key := self._keys.pop(block_id, None)) is not None:
            del self._index[key.chain_hash]
        self.num_evicted += 1
        return block_id


# %% evictions_not_counted
"""Task 8.4: num_evicted stays 0."""


class BlockManager:
    def take_free(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        if (key := self._keys.pop(block_id, None)) is not None:
            del self._index[key.chain_hash]
        return block_id


# %% free_blocks_registered
"""Task 8.4: a free block is registered."""


class BlockManager:
    def register(self, block_id: int, key: BlockKey) -> None:
        if self._keys.get(block_id, key) != key:
            raise BlockError(f"block {block_id} is cached with another content")
        if self._index.setdefault(key.chain_hash, block_id) == block_id:
            self._keys[block_id] = key


# %% head_freed_first
"""Task 8.4: the first block of the table is freed first, and evicted before the blocks that need it."""


class SharedCache:
    def free(self, seq_id: int) -> None:
        self.block_manager.free(self._tables.pop(seq_id, []))


# %% hit_on_a_block_not_yet_computed
"""Task 8.4: all full blocks of the table are registered, also those that are not computed yet."""


class SharedCache:
    def register(self, seq: data.Sequence, first: int, end: int) -> None:
        table = self._tables[seq.seq_id]
        end = min(len(table), seq.num_tokens // self.block_size)
        for index, key in enumerate(self.block_keys(seq, end)[first:], start=first):
            known = self.block_manager.find(key)
            if known is None:
                self.block_manager.register(table[index], key)
            elif known != table[index]:
                self.block_manager.share(known)
                duplicate, table[index] = table[index], known
                self.block_manager.free([duplicate])


# %% itself_a_duplicate
"""Task 8.4: a block that is found under its own content counts as its own duplicate."""


class SharedCache:
    def register(self, seq: data.Sequence, first: int, end: int) -> None:
        table = self._tables[seq.seq_id]
        for index, key in enumerate(self.block_keys(seq, end)[first:], start=first):
            known = self.block_manager.find(key)
            if known is None:
                self.block_manager.register(table[index], key)
            else:
                self.block_manager.free([table[index]])
                table[index] = known


# %% keys_from_the_first_block
"""Task 8.4: block first gets the key of block 0."""


class SharedCache:
    def register(self, seq: data.Sequence, first: int, end: int) -> None:
        table = self._tables[seq.seq_id]
        for index, key in zip(range(first, end), self.block_keys(seq, end)):
            known = self.block_manager.find(key)
            if known is None and table[index] not in self.block_manager.cached_blocks:
                self.block_manager.register(table[index], key)


# %% known_block_gets_no_holder
"""Task 8.4: the table names the other block, which is not told of its new holder."""


class SharedCache:
    def register(self, seq: data.Sequence, first: int, end: int) -> None:
        table = self._tables[seq.seq_id]
        for index, key in enumerate(self.block_keys(seq, end)[first:], start=first):
            known = self.block_manager.find(key)
            if known is None:
                self.block_manager.register(table[index], key)
            elif known != table[index]:
                duplicate, table[index] = table[index], known
                self.block_manager.free([duplicate])


# %% last_one_is_found
"""Task 8.4: a second block with a known content takes the place of the first."""


class BlockManager:
    def register(self, block_id: int, key: BlockKey) -> None:
        if self.ref_count(block_id) == 0 or self._keys.get(block_id, key) != key:
            raise BlockError(f"block {block_id} cannot be registered")
        self._index[key.chain_hash] = block_id
        self._keys[block_id] = key


# %% latest_lost_first
"""Task 8.4: the cached block that was put back last is taken first."""


class BlockManager:
    def put_back(self, block_id: int) -> None:
        self._free[block_id] = None
        self._free.move_to_end(block_id, last=False)


# %% lowest_id_first
"""Task 8.4: the free block with the lowest id is taken."""


class BlockManager:
    def take_free(self) -> int:
        block_id = min(self._free)
        del self._free[block_id]
        if (key := self._keys.pop(block_id, None)) is not None:
            del self._index[key.chain_hash]
            self.num_evicted += 1
        return block_id


# %% one_block_a_call
"""Task 8.4: only the first of the blocks is registered."""


class SharedCache:
    def register(self, seq: data.Sequence, first: int, end: int) -> None:
        table = self._tables[seq.seq_id]
        for index, key in enumerate(self.block_keys(seq, end)[first : first + 1], start=first):
            known = self.block_manager.find(key)
            if known is None:
                self.block_manager.register(table[index], key)
            elif known != table[index]:
                self.block_manager.share(known)
                duplicate, table[index] = table[index], known
                self.block_manager.free([duplicate])


# %% still_found_after_eviction
"""Task 8.4: an evicted content is still found."""


class BlockManager:
    def take_free(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        if block_id in self._keys:
            self.num_evicted += 1
        return block_id


# %% table_stays
"""Task 8.4: the blocks are freed, and the table stays."""


class SharedCache:
    def free(self, seq_id: int) -> None:
        self.block_manager.free(reversed(self._tables.get(seq_id, [])))


# %% taken_from_the_wrong_end
"""Task 8.4: the block at the end of the free ones is taken."""


class BlockManager:
    def take_free(self) -> int:
        block_id, _ = self._free.popitem()
        if (key := self._keys.pop(block_id, None)) is not None:
            del self._index[key.chain_hash]
            self.num_evicted += 1
        return block_id


# %% unknown_sequence_raises
"""Task 8.4: a sequence without a table raises KeyError."""


class SharedCache:
    def free(self, seq_id: int) -> None:
        self.block_manager.free(reversed(self._tables.pop(seq_id)))


# %% all_of_them_wait
"""Task 8.5: no sample is a fork; all wait, and compute what they do not find."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = 0
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% at_the_end_of_running
"""Task 8.5: the samples stand behind sequences that arrived later."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = len(running)
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% before_the_first
"""Task 8.5: the samples stand before the first one."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first)
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% behind_the_queue
"""Task 8.5: samples without a seat wait behind requests that arrived later."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extend(samples[num_seats:])
        return samples


# %% first_has_no_seat
"""Task 8.5: the seat of the first sample is counted as free."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running) + 1)
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% full_blocks_only
"""Task 8.5: a sample takes over the full blocks, and counts the whole prompt as computed."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(
                first.seq_id, seq.seq_id, max(1, first.num_prompt_tokens // self.config.block_size * self.config.block_size)
            )
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% last_token_not_skipped
"""Task 8.5: the last token of the prompt is computed again."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens - 1)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% late_samples_are_dropped
"""Task 8.5: samples without a seat never run."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        return samples[:num_seats]


# %% late_samples_count_as_computed
"""Task 8.5: samples without a seat have no blocks, and count the prompt as computed."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        for seq in samples[num_seats:]:
            seq.skip(first.num_prompt_tokens)
        return samples


# %% late_samples_hold_blocks
"""Task 8.5: samples without a seat are forks too, and hold blocks while they wait."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        for seq in samples[num_seats:]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
        return samples


# %% late_samples_not_returned
"""Task 8.5: samples without a seat wait, and get no first token."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples[:num_seats]


# %% nothing_skipped
"""Task 8.5: the prompt is not counted as computed."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% numbered_from_zero
"""Task 8.5: the samples are numbered from 0, so that one has the random numbers of the first."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index - 1) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% one_sample_too_few
"""Task 8.5: the last sample is missing."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n - 1)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% one_sample_too_many
"""Task 8.5: n samples start beside the first."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n + (first.params.n > 1))]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% running_in_reverse
"""Task 8.5: the samples run in reverse order."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = reversed(samples[:num_seats])
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% seats_as_if_alone
"""Task 8.5: all seats but the first's are taken as free, also those of other requests."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = self.config.max_num_seqs - 1
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% seats_not_counted
"""Task 8.5: all samples run at once, whatever the number of seats."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = len(samples)
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples


# %% waiting_in_reverse
"""Task 8.5: samples without a seat wait in reverse order."""


class Engine:
    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(samples[num_seats:])
        return samples


# %% a_block_more
"""Task 8.6: two blocks are thought to be computed again."""


def answer_8_6() -> tuple[float, str]:
    return 48 + 7 * 32, "A hit ends with a whole block, so the last block is computed again for each prompt."


# %% cost_alone
"""Task 8.6: the number alone is returned."""


def answer_8_6() -> tuple[float, str]:
    return 160.0


# %% cost_as_text
"""Task 8.6: the number is a text."""


def answer_8_6() -> tuple[float, str]:
    return "160", "A hit ends with a whole block, so the last block is computed again for each prompt."


# %% cost_without_a_text
"""Task 8.6: the text is empty."""


def answer_8_6() -> tuple[float, str]:
    return 160, ""


# %% first_prompt_only
"""Task 8.6: the repeated prompts are thought to cost nothing."""


def answer_8_6() -> tuple[float, str]:
    return 48, "A hit ends with a whole block, so the last block is computed again for each prompt."


# %% in_blocks
"""Task 8.6: blocks are counted."""


def answer_8_6() -> tuple[float, str]:
    return 10, "A hit ends with a whole block, so the last block is computed again for each prompt."


# %% last_token_of_the_first_too
"""Task 8.6: the answers' tokens are counted too."""


def answer_8_6() -> tuple[float, str]:
    return 48 + 7 * 16 + 8, "A hit ends with a whole block, so the last block is computed again for each prompt."


# %% no_cache
"""Task 8.6: eight whole prompts."""


def answer_8_6() -> tuple[float, str]:
    return 8 * 48, "A hit ends with a whole block, so the last block is computed again for each prompt."


# %% one_token_each
"""Task 8.6: one token for each repeated prompt."""


def answer_8_6() -> tuple[float, str]:
    return 48 + 7 * 1, "A hit ends with a whole block, so the last block is computed again for each prompt."


# %% repeated_ones_only
"""Task 8.6: the first prompt is left out."""


def answer_8_6() -> tuple[float, str]:
    return 7 * 16, "A hit ends with a whole block, so the last block is computed again for each prompt."
