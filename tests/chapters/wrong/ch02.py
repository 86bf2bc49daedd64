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
