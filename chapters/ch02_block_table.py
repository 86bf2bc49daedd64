"""Chapter 02: physical blocks, a free list, and a block table for each sequence.

Chapter 01 reserves contiguous memory for the longest text that a request might become, and most of it is never written.
Operating systems solved the same problem with paging. Memory is cut into *blocks* of a few token slots. A sequence gets a
block when it needs one, and the block may be anywhere in memory. A *block table* lists a sequence's physical blocks in the
order of its text. At most ``block_size - 1`` slots of a sequence are empty at any time (Kwon et al., SOSP 2023).

What changes from chapter 01: the cache. A sequence's K and V grow block by block, and the blocks are given back when the
sequence ends. The batch needs no padding, since each of its rows has a slot. Attention is that of chapter 01: before it
runs, a sequence's pages are copied into one piece. Chapter 03 needs no such copy.

Tasks (33 points, about 2.5 hours with reading):

- 2.1 (10 points) ``BlockManager.allocate`` and ``free``: which blocks are in use.
- 2.2 (8 points) ``PagedCache.slots``: from a token's position to its slot.
- 2.3 (6 points) ``PagedCache.grow`` and ``free``: block tables with as many blocks as their tokens need.
- 2.4 (6 points) ``PagedCache.gather``: a sequence's K and V in order, wherever its blocks are.
- 2.5 (3 points) ``answer_2_5``: measure and explain how many requests the same memory serves.

Know first: chapter 01; integer division and remainder.
In the engine: :class:`pagebrain.block.BlockManager` and :class:`pagebrain.cache.CacheManager`. In vLLM: ``BlockPool`` in
``vllm/v1/core/block_pool.py`` and the block tables of ``vllm/v1/worker/block_table.py``.
From pagebrain: ``PageBrainConfig``, the errors of ``pagebrain.errors``, ``model_config.attention_scale`` and the records of
``pagebrain.engine.trace``.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from chapters.ch00_baseline import OnLogits, check_prompts, greedy_token
from chapters.ch01_naive_kv_cache import Attend, forward, masked_attention
from pagebrain import PageBrainConfig
from pagebrain.engine.trace import Observer, StepTrace, TraceRow, trace_cache
from pagebrain.errors import BlockError, BlockTableError, OutOfBlocksError
from pagebrain.model_config import attention_scale


class BlockManager:
    """Allocates and frees the physical blocks ``0 .. num_blocks - 1``. It handles block ids only, no tensors."""

    supports = frozenset({"async_scheduling"})

    def __init__(self, config: PageBrainConfig) -> None:
        assert config.num_blocks is not None
        self.num_blocks = config.num_blocks
        self._free = list(range(self.num_blocks))
        self._in_use: set[int] = set()

    @property
    def num_free_blocks(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Ids of the free blocks."""
        return tuple(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether ``count`` blocks are free."""
        return count <= len(self._free)

    def ref_count(self, block_id: int) -> int:
        """1 for a block in use, 0 for a free block. (In the engine, several sequences may hold one block.)"""
        if not 0 <= block_id < self.num_blocks:
            raise BlockError(f"block ids run from 0 to {self.num_blocks - 1}, got {block_id}")
        return int(block_id in self._in_use)

    def allocate(self, count: int = 1) -> list[int]:
        """Task 2.1: take ``count`` free blocks, in any order; from now on they are in use.

        Returns a list of ``count`` different block ids, which belongs to the caller; it is empty for a count of 0. After an
        error nothing has changed. Errors take a message, as in ``raise BlockError("...")``.

        - ``BlockError``: the call is a mistake of the caller. Here, the count is below 0.
        - ``OutOfBlocksError``: the call is correct, but fewer than ``count`` blocks are free.
        """
        # BEGIN SOLUTION 2.1
        if count < 0:
            raise BlockError(f"count must be at least 0, got {count}")
        if not self.can_allocate(count):
            raise OutOfBlocksError(
                f"{count} blocks were asked for, but only {len(self._free)} of {self.num_blocks} are free"
            )
        block_ids = [self._free.pop() for _ in range(count)]
        self._in_use.update(block_ids)
        return block_ids
        # END SOLUTION

    def free(self, block_ids: Iterable[int]) -> None:
        """Task 2.1: take blocks back; from now on they are free.

        ``block_ids`` is any iterable of ints, such as a list, a set or a generator (which can be read only once). ``free``
        does not change it. Raises ``BlockError``, with a message, if it contains a block that does not exist or is free
        already, or contains a block twice. After an error nothing has changed: none of the blocks has become free.
        """
        # BEGIN SOLUTION 2.1
        block_ids = list(block_ids)
        for block_id, count in Counter(block_ids).items():
            if count > self.ref_count(block_id):
                raise BlockError(f"block {block_id} cannot be freed: it is free already, or it is listed twice")
        self._in_use.difference_update(block_ids)
        self._free.extend(block_ids)
        # END SOLUTION


class PagedCache:
    """Pools of K and V cut into blocks, and a block table per sequence id.

    ``key_pools[layer]`` and ``value_pools[layer]`` are ``[num_blocks, block_size, num_heads, head_dim]``.
    """

    def __init__(self, block_manager: BlockManager, config: PageBrainConfig) -> None:
        num_layers, num_heads, head_dim = config.require_shape()
        self.block_manager = block_manager
        self.block_size = config.block_size
        shape = (num_layers, block_manager.num_blocks, config.block_size, num_heads, head_dim)
        self.key_pools = torch.zeros(shape, dtype=config.torch_dtype, device=config.device)
        self.value_pools = torch.zeros_like(self.key_pools)
        self._tables: dict[int, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that are in no block table."""
        return self.block_manager.num_free_blocks

    @property
    def seq_ids(self) -> tuple[int, ...]:
        """The sequences that have a table."""
        return tuple(self._tables)

    def block_table(self, seq_id: int) -> tuple[int, ...]:
        """Physical block ids of a sequence in logical order."""
        return tuple(self._tables.get(seq_id, ()))

    def num_missing_blocks(self, seq_id: int, num_tokens: int) -> int:
        """Number of blocks that must be added to the sequence's table before it covers ``num_tokens`` tokens."""
        # -(-a // b) is a / b rounded up (ceiling division): // rounds down, and the two signs turn this around.
        return max(0, -(-num_tokens // self.block_size) - len(self._tables.get(seq_id, ())))

    def can_grow(self, seq_id: int, num_tokens: int) -> bool:
        """Whether :meth:`grow` would succeed."""
        return self.block_manager.can_allocate(self.num_missing_blocks(seq_id, num_tokens))

    def grow(self, seq_id: int, num_tokens: int) -> None:
        """Task 2.3: make the sequence's table cover ``num_tokens`` tokens, with as few blocks as possible.

        New blocks go behind those that the table has. A table that covers ``num_tokens`` already stays as it is. If a
        sequence without a table grows to 0 tokens, it needs no block; afterwards it may have an empty table or none. Raises
        ``OutOfBlocksError``, with a message, if too few blocks are free. Then nothing has changed, and a sequence without a
        table still has none. The contents of the pools do not change.
        """
        # BEGIN SOLUTION 2.3
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        self._tables.setdefault(seq_id, []).extend(block_ids)
        # END SOLUTION

    def free(self, seq_id: int) -> None:
        """Task 2.3: free all blocks of a sequence in the block manager, and remove its table.

        For a sequence without a table nothing happens. The contents of the pools do not change.
        """
        # BEGIN SOLUTION 2.3
        self.block_manager.free(self._tables.pop(seq_id, []))
        # END SOLUTION

    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        """Task 2.2: the physical slots of tokens ``start .. start + count - 1``; slot = block_id * block_size + offset.

        Returns a list of ``count`` ints, read from the sequence's table as it is now. A table covers ``block_size`` tokens a
        block. A sequence without a table covers 0 tokens, so ``slots(seq_id, 0, 0)`` returns ``[]``. Raises
        ``BlockTableError``, with a message, if ``start`` or ``count`` is negative, or if ``start + count`` is more than the
        number of tokens that the table covers, also if ``count`` is 0. Nothing changes.
        """
        # BEGIN SOLUTION 2.2
        table = self._tables.get(seq_id, [])
        if start < 0 or count < 0 or start + count > len(table) * self.block_size:
            raise BlockTableError(
                f"{count} tokens from {start} on: sequence {seq_id} has a table for {len(table) * self.block_size} tokens"
            )
        return [
            table[position // self.block_size] * self.block_size + position % self.block_size
            for position in range(start, start + count)
        ]
        # END SOLUTION

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Write K and V ``[num_tokens, num_heads, head_dim]`` of new tokens to their slots ``[num_tokens]``."""
        self.key_pools[layer].flatten(0, 1)[slots] = key
        self.value_pools[layer].flatten(0, 1)[slots] = value

    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Task 2.4: K and V of a sequence's first ``num_tokens`` tokens, in order.

        ``num_tokens`` is at least 1, and the table covers them; it may cover more. Returns two tensors ``[num_tokens,
        num_heads, head_dim]`` in the dtype of the pools, with what the pools contain now. The tensors may be copies or views
        of the pools: the caller reads them before the pools change again, and does not write to them. ``gather`` copies at
        most the sequence's own pages of this layer. The pools do not change.
        """
        # BEGIN SOLUTION 2.4
        table = torch.tensor(self.block_table(seq_id), dtype=torch.int64, device=self.key_pools.device)
        keys = self.key_pools[layer][table].flatten(0, 1)  # [num_pages * block_size, num_heads, head_dim]
        values = self.value_pools[layer][table].flatten(0, 1)
        return keys[:num_tokens], values[:num_tokens]
        # END SOLUTION


class Rows:
    """The flat rows of one step. An entry is ``(seq_id, start, new_token_ids)``: new tokens after ``start`` cached ones."""

    def __init__(self, cache: PagedCache, entries: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        self.seq_ids = [seq_id for seq_id, _, _ in entries]
        self.counts = [len(new) for _, _, new in entries]
        self.context_lens = [start + len(new) for _, start, new in entries]
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for seq_id, start, new in entries:
            token_ids += new
            positions += range(start, start + len(new))
            slots += cache.slots(seq_id, start, len(new))
        device = cache.key_pools.device
        self.token_ids = torch.tensor(token_ids, device=device)  # [num_tokens]
        self.positions = torch.tensor(positions, device=device)
        self.slots = torch.tensor(slots, device=device)
        self.query_starts = torch.tensor([0, *self.counts], device=device).cumsum(0)  # [num_seqs + 1]
        self.last_rows = self.query_starts[1:] - 1  # [num_seqs]

    def trace(self, step: int, cache: PagedCache) -> StepTrace:
        """The record of this step."""
        shares = zip(self.seq_ids, self.context_lens, self.counts)
        rows = [
            TraceRow(seq_id, str(seq_id), 0, length - count, count, True, "decode" if length > count else "prefill")
            for seq_id, length, count in shares
        ]
        return trace_cache(step, rows, cache)


def attend_gathered(model: GPT2LMHeadModel, cache: PagedCache, rows: Rows) -> Attend:
    """Attention that first copies each sequence's pages into one piece."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.write(layer, rows.slots, key, value)
        out = []
        for index, (seq_id, context_len) in enumerate(zip(rows.seq_ids, rows.context_lens, strict=True)):
            own = slice(rows.query_starts[index], rows.query_starts[index + 1])  # the sequence's rows
            keys, values = cache.gather(layer, seq_id, context_len)
            scale = attention_scale(model.config, layer)
            out.append(masked_attention(query[None, own], keys[None], values[None], rows.positions[None, own], scale)[0])
        return torch.cat(out)

    return attend


MakeAttend = Callable[[GPT2LMHeadModel, PagedCache, Rows], Attend]


def generate(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_logits: OnLogits | None = None,
    *,
    block_size: int = 16,
    make_attend: MakeAttend = attend_gathered,
    on_step: Observer | None = None,
) -> list[list[int]]:
    """The greedy continuation of all prompts as one batch. A sequence's blocks are freed in the step in which it ends.

    ``on_step`` is called with the record of every step.
    """
    check_prompts(model, prompts, max_new_tokens)
    num_blocks = sum(-(-(len(prompt) + max_new_tokens) // block_size) for prompt in prompts)
    config = PageBrainConfig.for_model(model, block_size=block_size, num_blocks=max(2, num_blocks))
    cache = PagedCache(BlockManager(config), config)
    texts = {index: list(prompt) for index, prompt in enumerate(prompts)}
    num_cached = dict.fromkeys(texts, 0)
    running = dict(texts)
    for step in itertools.count():
        if not running:
            break
        for seq_id, text in running.items():
            cache.grow(seq_id, len(text))
        rows = Rows(cache, [(seq_id, num_cached[seq_id], text[num_cached[seq_id] :]) for seq_id, text in running.items()])
        trace = rows.trace(step, cache)
        logits = forward(model, rows.token_ids, rows.positions, make_attend(model, cache, rows), rows.last_rows)
        for seq_id, scores in zip(rows.seq_ids, logits, strict=True):
            if on_logits is not None:
                on_logits(seq_id, scores)
            text = running[seq_id]
            num_cached[seq_id] = len(text)
            text.append(greedy_token(scores))
            if text[-1] == model.config.eos_token_id or len(text) == len(prompts[seq_id]) + max_new_tokens:
                cache.free(seq_id)
                del running[seq_id]
        if on_step is not None:
            on_step(trace.read(seq_id for seq_id in rows.seq_ids if seq_id not in running))
    return [texts[index][len(prompt) :] for index, prompt in enumerate(prompts)]


def answer_2_5() -> tuple[float, str]:
    """Task 2.5: measure and explain: how many stories can run together in the memory that chapter 01 reserves for six?

    The lengths are those of the notebook's six stories, A to F: prompts of 2, 6, 3, 6, 2 and 9 tokens, answers of 211, 266,
    191, 71, 178 and 162 tokens. Chapter 01 reserves 409 slots for each of the six. The same memory, 2454 slots, has room for
    153 whole blocks of 16. (The notebook's run had 156: ``generate`` rounds each request up to whole blocks.)

    Take ``n`` requests: A to F, then A to F again, and so on. All of them start together. A request with an answer of ``a``
    tokens takes part in steps 0 to ``a - 1``. In step ``s`` it has ``prompt + s`` tokens in the cache. After step ``a - 1``
    its blocks are freed. Find the largest ``n`` for which every ``grow`` of the run succeeds. How to measure: play the
    lengths on a real :class:`PagedCache` without a model, as the notebook's ``replay`` does, for one ``n`` after the other.
    If you measure in your file, copy the notebook's ``one_number_a_slot`` into it: it makes the cache's configuration.

    Returns ``n`` and a text. ``n`` is a whole number; return the number you found as a literal. (The type says ``float``, as
    in all tasks of this kind.) The text is one to four sentences for your instructor, at least 8 different words: why is
    ``n`` not larger, given that all blocks are free at the start and at the end? And what would have to change for the same
    memory to serve more?
    """
    # BEGIN SOLUTION 2.5
    return 16, (
        "All requests start together, so they grow together, and the peak counts: with 17 requests 154 blocks are needed "
        "in the same step, and 153 exist. Before and after this step blocks are free and unused. If requests started at "
        "different times, long texts and short ones would take turns, and more of them could be served by the same blocks."
    )
    # END SOLUTION
