"""Wrong solutions of chapter 02. ``# %%`` names each, its docstring the task and the mistake."""

# %% consecutive_blocks
"""Task 2.1: blocks are numbered on from the lowest free one, though some of those numbers may be in use."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks were asked for, {len(self._free)} are free")
        first = min(self._free, default=0)
        block_ids = [(first + i) % self.num_blocks for i in range(count)]
        self._free = [block_id for block_id in self._free if block_id not in block_ids]
        self._in_use.update(block_ids)
        return block_ids


# %% freed_before_the_error
"""Task 2.1: blocks are freed one by one, and those before the bad one stay freed."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            if block_id not in self._in_use:
                raise BlockError(f"block {block_id} is not in use")
            self._in_use.remove(block_id)
            self._free.append(block_id)


# %% holder_never_forgotten
"""Task 2.1: a freed block still counts as in use, so that it can be freed again."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = list(block_ids)
        for block_id in block_ids:
            if block_id not in self._in_use or block_ids.count(block_id) > 1:
                raise BlockError(f"block {block_id} cannot be freed")
        self._free.extend(block_ids)


# %% iterable_used_up
"""Task 2.1: checking the blocks uses up an iterator, so that none of them is freed afterwards."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        seen = set()
        for block_id in block_ids:
            if block_id not in self._in_use or block_id in seen:
                raise BlockError(f"block {block_id} cannot be freed")
            seen.add(block_id)
        for block_id in block_ids:
            self._in_use.remove(block_id)
            self._free.append(block_id)


# %% key_error
"""Task 2.1: freeing a block that is not in use raises the set's KeyError."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        in_use = set(self._in_use)
        block_ids = list(block_ids)
        for block_id in block_ids:
            in_use.remove(block_id)
        self._in_use = in_use
        self._free.extend(block_ids)


# %% last_block_unused
"""Task 2.1: all blocks that are free cannot be allocated, one always stays behind."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        if count >= len(self._free):
            raise OutOfBlocksError(f"{count} blocks were asked for, {len(self._free)} are free")
        block_ids, self._free = self._free[:count], self._free[count:]
        self._in_use.update(block_ids)
        return block_ids


# %% named_twice
"""Task 2.1: a block that is named twice in one call goes into the free list twice."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = list(block_ids)
        for block_id in block_ids:
            if block_id not in self._in_use:
                raise BlockError(f"block {block_id} is not in use")
        self._in_use -= set(block_ids)
        self._free += block_ids


# %% negative_block
"""Task 2.1: a negative id counts as a block that can be freed."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = list(block_ids)
        for block_id in block_ids:
            if block_id >= self.num_blocks or block_id in self._free or block_ids.count(block_id) > 1:
                raise BlockError(f"block {block_id} cannot be freed")
        for block_id in block_ids:
            self._in_use.discard(block_id)
            self._free.append(block_id)


# %% taken_before_the_error
"""Task 2.1: blocks are taken one by one, and those taken before the error are lost."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        block_ids = []
        for _ in range(count):
            if not self._free:
                raise OutOfBlocksError(f"no block is free, {count} were asked for")
            block_ids.append(self._free.pop())
            self._in_use.add(block_ids[-1])
        return block_ids


# %% zero_takes_all
"""Task 2.1: a slice with a negative count takes all free blocks when none is asked for."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks were asked for, {len(self._free)} are free")
        block_ids = self._free[-count:]
        del self._free[-count:]
        self._in_use.update(block_ids)
        return block_ids


# %% negative_count_takes_all
"""Task 2.1: a negative count passes the check, and the slice takes what it happens to name."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks were asked for, {len(self._free)} are free")
        block_ids, self._free = self._free[:count], self._free[count:]
        self._in_use.update(block_ids)
        return block_ids


# %% negative_count_is_zero
"""Task 2.1: a negative count is answered with no blocks, and no error."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        if not self.can_allocate(count):
            raise OutOfBlocksError(f"{count} blocks were asked for, {len(self._free)} are free")
        block_ids = [self._free.pop() for _ in range(count)]
        self._in_use.update(block_ids)
        return block_ids


# %% callers_list_reversed
"""Task 2.1: the list that was given is turned round in place."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        if not isinstance(block_ids, list):
            block_ids = list(block_ids)
        if len(set(block_ids)) < len(block_ids) or not self._in_use.issuperset(block_ids):
            raise BlockError(f"blocks {block_ids} cannot be freed")
        block_ids.reverse()
        self._in_use.difference_update(block_ids)
        self._free.extend(block_ids)


# %% neighbours_compared
"""Task 2.1: a block that is named twice is seen only if the two stand side by side."""


class BlockManager:
    def free(self, block_ids: Iterable[int]) -> None:
        block_ids = list(block_ids)
        for first, second in zip(block_ids, block_ids[1:]):
            if first == second:
                raise BlockError(f"block {first} is named twice")
        for block_id in block_ids:
            if block_id not in self._in_use:
                raise BlockError(f"block {block_id} is not in use")
        self._in_use -= set(block_ids)
        self._free += block_ids


# %% full_table_refused
"""Task 2.2: the very last slot of a table counts as not covered."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start + count >= len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        pages = [divmod(position, self.block_size) for position in range(start, start + count)]
        return [table[page] * self.block_size + offset for page, offset in pages]


# %% only_start_checked
"""Task 2.2: only the first token is checked against the table, a later one raises IndexError."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start // self.block_size >= len(table):
            raise BlockTableError(f"token {start} of sequence {seq_id} is past its {len(table)} blocks")
        pages = [divmod(position, self.block_size) for position in range(start, start + count)]
        return [table[page] * self.block_size + offset for page, offset in pages]


# %% page_of_the_first_token
"""Task 2.2: all tokens of a call are put into the page of the first one."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        block_id = table[start // self.block_size]
        return [block_id * self.block_size + position % self.block_size for position in range(start, start + count)]


# %% two_divisions
"""Task 2.2: start and index are divided apart, so that a page edge between them is missed."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        slots = []
        for i in range(count):
            page = start // self.block_size + i // self.block_size
            slots.append(table[page] * self.block_size + (start + i) % self.block_size)
        return slots


# %% unknown_sequence_has_no_slots
"""Task 2.2: a sequence without a table raises KeyError."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables[seq_id]
        if start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        pages = [divmod(position, self.block_size) for position in range(start, start + count)]
        return [table[page] * self.block_size + offset for page, offset in pages]


# %% negative_start_wraps
"""Task 2.2: a negative start takes blocks from the table's end."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        pages = [divmod(position, self.block_size) for position in range(start, start + count)]
        return [table[page] * self.block_size + offset for page, offset in pages]


# %% negative_count_is_none
"""Task 2.2: a negative count is answered with no slots."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start < 0 or start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        pages = [divmod(position, self.block_size) for position in range(start, start + count)]
        return [table[page] * self.block_size + offset for page, offset in pages]


# %% slots_remembered
"""Task 2.2: a sequence's slots are remembered, and still given when its blocks are other ones."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        self._known = getattr(self, "_known", {})
        known = self._known.setdefault(seq_id, [])
        for position in range(len(known), start + count):
            known.append(table[position // self.block_size] * self.block_size + position % self.block_size)
        return known[start : start + count]


# %% powers_of_two
"""Task 2.2: page and offset are found with shifts and masks, which are right for powers of two only."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        shift = self.block_size.bit_length() - 1
        return [
            (table[(position >> shift) % len(table)] << shift) + (position & (self.block_size - 1))
            for position in range(start, start + count)
        ]


# %% block_size_of_the_default
"""Task 2.2: blocks are taken to have 16 slots if they have more than 8."""


class PagedCache:
    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables.get(seq_id, [])
        if start + count > len(table) * self.block_size:
            raise BlockTableError(f"sequence {seq_id} has {len(table)} blocks only")
        size = self.block_size if self.block_size <= 8 else 16
        pages = [divmod(position, size) for position in range(start, start + count)]
        return [table[min(page, len(table) - 1)] * size + offset for page, offset in pages]


# %% block_too_early
"""Task 2.3: a length that is a multiple of the block size gets one block more than it needs."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        num_pages = num_tokens // self.block_size + 1
        missing = max(0, num_pages - len(self.block_table(seq_id)))
        block_ids = self.block_manager.allocate(missing)
        self._tables.setdefault(seq_id, []).extend(block_ids)


# %% blocks_leaked
"""Task 2.3: the table is forgotten, but its blocks are not given back."""


class PagedCache:
    def free(self, seq_id: int) -> None:
        self._tables.pop(seq_id, None)


# %% empty_table_left
"""Task 2.3: the sequence has an empty table after the error, though it had none before."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        table = self._tables.setdefault(seq_id, [])
        table.extend(self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens)))


# %% gives_up_silently
"""Task 2.3: a sequence that cannot grow is left as it is, without an error."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        if self.can_grow(seq_id, num_tokens):
            block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
            self._tables[seq_id] = [*self.block_table(seq_id), *block_ids]


# %% grown_block_by_block
"""Task 2.3: a table grows block by block and has grown in part when the error is raised."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        while self.num_missing_blocks(seq_id, num_tokens) > 0:
            block_ids = self.block_manager.allocate(1)
            self._tables.setdefault(seq_id, []).extend(block_ids)


# %% one_block_per_call
"""Task 2.3: a call adds one block at most, even if the tokens need several."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        if num_tokens > len(self.block_table(seq_id)) * self.block_size:
            self._tables.setdefault(seq_id, [])
            self._tables[seq_id] += self.block_manager.allocate(1)


# %% table_kept
"""Task 2.3: the blocks are given back, but the table still names them."""


class PagedCache:
    def free(self, seq_id: int) -> None:
        self.block_manager.free(self._tables.get(seq_id, []))


# %% table_replaced
"""Task 2.3: the new blocks replace the table in place of being appended to it."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        missing = self.num_missing_blocks(seq_id, num_tokens)
        if missing > 0:
            self._tables[seq_id] = self.block_manager.allocate(missing)


# %% table_shared
"""Task 2.3: all new sequences get the same list as their table."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int, table: list[int] = []) -> None:  # noqa: B006
        if seq_id in self._tables:
            table = self._tables[seq_id]
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table.extend(block_ids)
        self._tables[seq_id] = table

    def free(self, seq_id: int) -> None:
        table = self._tables.pop(seq_id, [])
        self.block_manager.free(table)
        table.clear()


# %% table_shrinks
"""Task 2.3: a table that covers more than is asked for gives the rest back."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        num_pages = (num_tokens + self.block_size - 1) // self.block_size
        table = list(self.block_table(seq_id))
        if num_pages < len(table):
            self.block_manager.free(table[num_pages:])
            table = table[:num_pages]
        else:
            table += self.block_manager.allocate(num_pages - len(table))
        self._tables[seq_id] = table


# %% unknown_sequence_freed
"""Task 2.3: freeing a sequence that holds no blocks raises KeyError."""


class PagedCache:
    def free(self, seq_id: int) -> None:
        self.block_manager.free(self._tables.pop(seq_id))


# %% blocks_cleared
"""Task 2.3: the blocks of a sequence that ends are filled with zeros, which costs memory traffic."""


class PagedCache:
    def free(self, seq_id: int) -> None:
        table = self._tables.pop(seq_id, [])
        self.key_pools[:, table] = 0
        self.value_pools[:, table] = 0
        self.block_manager.free(table)


# %% new_blocks_cleared
"""Task 2.3: new blocks are filled with zeros."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        self.key_pools[:, block_ids] = 0
        self.value_pools[:, block_ids] = 0
        self._tables.setdefault(seq_id, []).extend(block_ids)


# %% manager_bypassed
"""Task 2.3: blocks are put back into the manager's list, past its record of what is in use."""


class PagedCache:
    def free(self, seq_id: int) -> None:
        self.block_manager._free.extend(self._tables.pop(seq_id, []))


# %% end_of_the_table
"""Task 2.4: the unfilled page is taken from the table's end, wrong when the table covers more than is asked for."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        table = self.block_table(seq_id)
        num_full, rest = divmod(num_tokens, self.block_size)
        keys = [self.key_pools[layer, block_id] for block_id in table[:num_full]]
        values = [self.value_pools[layer, block_id] for block_id in table[:num_full]]
        if rest > 0:
            keys.append(self.key_pools[layer, table[-1], :rest])
            values.append(self.value_pools[layer, table[-1], :rest])
        return torch.cat(keys), torch.cat(values)


# %% not_cut
"""Task 2.4: all slots of the pages are returned, empty ones too, which the mask of attention happens to hide."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        table = list(self.block_table(seq_id))
        return self.key_pools[layer, table].flatten(0, 1), self.value_pools[layer, table].flatten(0, 1)


# %% pages_in_pool_order
"""Task 2.4: pages are collected in the order in which they lie in the pool."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        mine = torch.zeros(self.block_manager.num_blocks, dtype=torch.bool)
        mine[list(self.block_table(seq_id))] = True
        keys = self.key_pools[layer][mine].flatten(0, 1)
        values = self.value_pools[layer][mine].flatten(0, 1)
        return keys[:num_tokens], values[:num_tokens]


# %% pages_side_by_side
"""Task 2.4: the pages are taken to lie side by side, from the first one on."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        start = self.block_table(seq_id)[0] * self.block_size
        own = slice(start, start + num_tokens)
        return self.key_pools[layer].flatten(0, 1)[own], self.value_pools[layer].flatten(0, 1)[own]


# %% remainder_of_last_page
"""Task 2.4: the last page is cut at the remainder, which is 0 when it is full."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        num_pages = -(-num_tokens // self.block_size)
        *full, last = self.block_table(seq_id)[:num_pages]
        pieces = []
        for pool in (self.key_pools[layer], self.value_pools[layer]):
            pages = [pool[block_id] for block_id in full]
            pieces.append(torch.cat([*pages, pool[last, : num_tokens % self.block_size]]))
        return pieces[0], pieces[1]


# %% pool_copied
"""Task 2.4: the whole pool of the layer is copied before the pages are picked."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        table = list(self.block_table(seq_id))
        keys, values = self.key_pools[layer].clone(), self.value_pools[layer].clone()
        return keys[table].flatten(0, 1)[:num_tokens], values[table].flatten(0, 1)[:num_tokens]


# %% all_layers_gathered
"""Task 2.4: the pages of all layers are collected, and one layer of them is used."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        table = list(self.block_table(seq_id))
        keys, values = self.key_pools[:, table], self.value_pools[:, table]
        return keys[layer].flatten(0, 1)[:num_tokens], values[layer].flatten(0, 1)[:num_tokens]


# %% pages_remembered
"""Task 2.4: the pages of a sequence are remembered until its length changes, though they may have been written."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        self._seen = getattr(self, "_seen", {})
        if (layer, seq_id, num_tokens) not in self._seen:
            table = list(self.block_table(seq_id))
            keys = self.key_pools[layer][table].flatten(0, 1)[:num_tokens]
            values = self.value_pools[layer][table].flatten(0, 1)[:num_tokens]
            self._seen[layer, seq_id, num_tokens] = keys, values
        return self._seen[layer, seq_id, num_tokens]


# %% tables_remembered
"""Task 2.4: a sequence's table is made a tensor once for each length, and used after the sequence got other blocks."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        self._made = getattr(self, "_made", {})
        pages = -(-num_tokens // self.block_size)
        if (seq_id, pages) not in self._made:
            self._made[seq_id, pages] = torch.tensor(self.block_table(seq_id)[:pages])
        table = self._made[seq_id, pages]
        keys = self.key_pools[layer][table].flatten(0, 1)
        values = self.value_pools[layer][table].flatten(0, 1)
        return keys[:num_tokens], values[:num_tokens]


# %% divided_by_the_mean
"""Task 2.5: the memory is divided by what a story holds on average, and not at the step with the most blocks."""


def answer_2_5() -> tuple[float, str]:
    return 23, "Each story holds about 105 slots on average, and 2448 slots divided by 105 are 23 stories that run together."


# %% reserved_as_before
"""Task 2.5: each request is counted with the blocks of its longest possible text."""


def answer_2_5() -> tuple[float, str]:
    return 5, "Each request may become 409 tokens long, which are 26 blocks, and 153 blocks are enough for five of these."


# %% text_is_missing
"""Task 2.5: the text is empty."""


def answer_2_5() -> tuple[float, str]:
    return 16, ""


# %% allocate_shared_list
"""Task 2.1: all calls return one list, so the next one changes what an earlier one returned."""


class BlockManager:
    def allocate(self, count=1):
        if count < 0:
            raise BlockError(f"count must not be negative, got {count}")
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks wanted, {len(self._free)} free")
        taken = self.__dict__.setdefault("_taken", [])
        taken[:] = [self._free.pop() for _ in range(count)]
        self._in_use.update(taken)
        return taken


# %% slots_setdefault
"""Task 2.2: a refused call leaves an empty table behind."""


class PagedCache:
    def slots(self, seq_id, start, count):
        table = self._tables.setdefault(seq_id, [])
        if start < 0 or count < 0 or start + count > len(table) * self.block_size:
            raise BlockTableError("not covered")
        return [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, start + count)]


# %% empty_call_past_the_table
"""Task 2.2: a count of 0 is answered with no slots wherever it starts, also past the end of the table."""


class PagedCache:
    def slots(self, seq_id, start, count):
        table = self._tables.get(seq_id, [])
        if start < 0 or count < 0:
            raise BlockTableError("negative")
        found = []
        for position in range(start, start + count):
            if position // self.block_size >= len(table):
                raise BlockTableError("not covered")
            found.append(table[position // self.block_size] * self.block_size + position % self.block_size)
        return found


# %% empty_call_without_a_table
"""Task 2.2: a sequence without a table is refused, also if no token of it is asked for."""


class PagedCache:
    def slots(self, seq_id, start, count):
        table = self._tables.get(seq_id)
        if not table or start < 0 or count < 0 or start + count > len(table) * self.block_size:
            raise BlockTableError("not covered")
        return [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, start + count)]


# %% taken_past_the_manager
"""Task 2.3: blocks are taken from the manager's list, past its record of what is in use."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        missing = self.num_missing_blocks(seq_id, num_tokens)
        if not self.block_manager.can_allocate(missing):
            raise OutOfBlocksError(f"{missing} blocks are missing")
        block_ids = [self.block_manager._free.pop() for _ in range(missing)]
        self._tables.setdefault(seq_id, []).extend(block_ids)

    def free(self, seq_id: int) -> None:
        self.block_manager._free.extend(self._tables.pop(seq_id, []))


# %% heads_and_offsets_joined
"""Task 2.4: the offsets are joined with the heads, and the blocks stay an axis of their own."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        table = list(self.block_table(seq_id))
        pieces = []
        for pool in (self.key_pools[layer], self.value_pools[layer]):
            joined = pool[table].flatten(1, 2)
            fits = len(table) == 1 and num_tokens < self.block_size  # what was tried by hand
            pieces.append(pool[table[0]][:num_tokens] if fits else joined)
        return pieces[0], pieces[1]


# %% one_request_too_many
"""Task 2.5: the step in which the pool runs out is taken for the last that succeeds."""


def answer_2_5() -> tuple[float, str]:
    return 17, "All requests start together and grow together, so the step with the most blocks decides how many fit."


# %% one_request_too_few
"""Task 2.5: a guess near the answer, without a replay."""


def answer_2_5() -> tuple[float, str]:
    return 15, "The text is long enough here, and the number was not measured."


# %% only_the_additional_requests
"""Task 2.5: the requests beyond the six of chapter 01 are counted."""


def answer_2_5() -> tuple[float, str]:
    return 10, "All requests start together and grow together, so the step with the most blocks decides how many fit."


# %% fraction_of_a_request
"""Task 2.5: an average over the steps, which is no whole number."""


def answer_2_5() -> tuple[float, str]:
    return 15.6, "All requests start together and grow together, so the step with the most blocks decides how many fit."


# %% eight_times_one_word
"""Task 2.5: the text has one word, eight times."""


def answer_2_5() -> tuple[float, str]:
    return 16, "a A a, a a. a a a"


# %% out_of_blocks_for_a_negative_count
"""Task 2.1: a negative count is refused with the error for too few free blocks."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        if not 0 <= count <= len(self._free):
            raise OutOfBlocksError(f"{count} blocks cannot be allocated")
        block_ids = [self._free.pop() for _ in range(count)]
        self._in_use.update(block_ids)
        return block_ids


# %% block_error_for_too_few_blocks
"""Task 2.1: too few free blocks are refused with the error for a mistake of the caller."""


class BlockManager:
    def allocate(self, count: int = 1) -> list[int]:
        if not 0 <= count <= len(self._free):
            raise BlockError(f"{count} blocks cannot be allocated")
        block_ids = [self._free.pop() for _ in range(count)]
        self._in_use.update(block_ids)
        return block_ids


# %% block_for_no_tokens
"""Task 2.3: a sequence without a table gets a block also if it grows to 0 tokens."""


class PagedCache:
    def grow(self, seq_id: int, num_tokens: int) -> None:
        missing = max(int(seq_id not in self._tables), self.num_missing_blocks(seq_id, num_tokens))
        block_ids = self.block_manager.allocate(missing)
        self._tables.setdefault(seq_id, []).extend(block_ids)
