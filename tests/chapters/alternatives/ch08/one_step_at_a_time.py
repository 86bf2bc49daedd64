"""Task 8.4: an order of ages in place of a queue; blocks change holders one by one; copies are made before the rest."""


class BlockManager:
    def put_back(self, block_id: int) -> None:
        self._free.pop(block_id, None)
        self._free[block_id] = None
        self.ages = getattr(self, "ages", {})
        self.ages[block_id] = 1 + max(self.ages.values(), default=0)

    def take_free(self) -> int:
        ages = getattr(self, "ages", {})
        block_id = min(self._free, key=lambda block_id: (block_id in self._keys, ages.get(block_id, 0), -block_id))
        del self._free[block_id]
        if block_id in self._keys:
            self.num_evicted += 1
            self._index.pop(self._keys.pop(block_id).chain_hash)
        return block_id

    def find(self, key: BlockKey) -> int | None:
        try:
            block_id = self._index[key.chain_hash]
        except KeyError:
            return None
        return block_id if self._keys[block_id] == key else None


class SharedCache:
    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        last = (num_tokens - 1) // self.block_size
        self.attach(child_id, [*self.block_table(parent_id)][: last + 1], num_tokens)

    def grow(self, seq_id: int, num_tokens: int) -> None:
        if not self.can_grow(seq_id, num_tokens):
            raise OutOfBlocksError(f"no room for {num_tokens} tokens of sequence {seq_id}")
        if self.must_copy(seq_id):
            [copy] = self.block_manager.allocate(1)
            table = self._tables[seq_id]
            page = self.lengths[seq_id] // self.block_size
            self.key_pools[:, copy] = self.key_pools[:, table[page]].clone()
            self.value_pools[:, copy] = self.value_pools[:, table[page]].clone()
            self.block_manager.free((table[page],))
            table[page] = copy
        while len(self.block_table(seq_id)) * self.block_size < num_tokens:
            self._tables.setdefault(seq_id, []).extend(self.block_manager.allocate())

    def free(self, seq_id: int) -> None:
        table = self._tables.pop(seq_id, [])
        while table:
            self.block_manager.free([table.pop()])
