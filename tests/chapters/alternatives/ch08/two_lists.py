"""Task 8.1: free blocks in two lists, numbers of holders in a Counter, block tables as new lists each time."""

from itertools import takewhile
from typing import Any


class BlockManager:
    def __init__(self, config: PageBrainConfig) -> None:
        assert config.num_blocks is not None
        self.num_blocks, self.num_evicted = config.num_blocks, 0
        self._holders: Any = Counter()
        self.plain, self.known = list(range(config.num_blocks)), list[int]()
        self._keys: dict[int, BlockKey] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self.plain) + len(self.known)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        return (*self.plain, *self.known)

    def share(self, block_id: int) -> None:
        if self.ref_count(block_id) < 1:
            if block_id not in self.known:
                raise BlockError(f"{block_id} holds nothing")
            self.known.remove(block_id)
        self._holders[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        after = Counter(self._holders)
        names = [*block_ids]
        after.subtract(names)
        if any(not 0 <= block_id < self.num_blocks for block_id in names) or min(after.values(), default=0) < 0:
            raise BlockError(f"{names} cannot all be freed")
        for block_id in names:
            self._holders[block_id] -= 1
            if not self._holders[block_id]:
                self.put_back(block_id)

    def find(self, key: BlockKey) -> int | None:
        return next((block_id for block_id, other in self._keys.items() if other == key), None)

    def register(self, block_id: int, key: BlockKey) -> None:
        known = self._keys.get(block_id)
        if not self.ref_count(block_id) or known not in (None, key):
            raise BlockError(f"{block_id} cannot have this content")
        if all(other.chain_hash != key.chain_hash for other in self._keys.values()):
            self._keys[block_id] = key

    def put_back(self, block_id: int) -> None:
        (self.known if block_id in self._keys else self.plain).append(block_id)

    def take_free(self) -> int:
        if self.plain:
            return self.plain.pop()
        block_id = self.known.pop(0)
        del self._keys[block_id]
        self.num_evicted += 1
        return block_id


class SharedCache:
    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        starts = range(0, num_tokens, self.block_size)
        table = [block_id for block_id, _ in zip(self._tables[parent_id], starts)]
        for block_id in table:
            self.block_manager.share(block_id)
        self._tables[child_id], self.lengths[child_id] = table, num_tokens

    def must_copy(self, seq_id: int) -> bool:
        page, place = divmod(self.lengths.get(seq_id, 0), self.block_size)
        table = self._tables.get(seq_id, [])
        return place > 0 and len(table) > page and self.block_manager.ref_count(table[page]) >= 2

    def match(self, seq: data.Sequence) -> list[int]:
        keys = self.block_keys(seq, max(0, len(seq.token_ids) - 1) // self.block_size)
        found = map(self.block_manager.find, keys)
        return [*takewhile(lambda block_id: block_id is not None, found)]  # type: ignore[list-item]

    def free(self, seq_id: int) -> None:
        if seq_id in self._tables:
            self.block_manager.free(self._tables.pop(seq_id)[::-1])
