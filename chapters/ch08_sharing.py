"""Chapter 08: blocks that several sequences hold.

Until now a block belongs to one sequence. But K and V of a token depend on the tokens up to it and on nothing else, so two
texts with the same beginning have the same K and V there. A block that counts its holders can be in many block tables. Then

- a *fork* continues a text in another way and copies nothing. A block is copied only when one of its holders is about to
  write into it (copy-on-write; Kwon et al., SOSP 2023);
- a block whose content is known stays findable when its last holder has gone, until its memory is needed. A prompt that
  begins like an earlier one finds these blocks and computes only the rest (prefix caching; as a tree: Zheng et al.,
  "SGLang", 2024);
- the ``n`` samples of a request share one prefill.

What changes from chapter 04: the cache, and the decision which sequences may start. Attention is that of chapter 03: a
block table may name any block, also one that another table names.

Tasks (38 points, about 4 hours):

- 8.1 (7 points) ``BlockManager.share``, ``BlockManager.free`` and ``SharedCache.fork``: blocks with several holders.
- 8.2 (6 points) ``SharedCache.must_copy`` and ``SharedCache.grow``: copy-on-write.
- 8.3 (9 points) ``SharedCache.block_keys``, ``BlockManager.find``, ``SharedCache.match`` and ``Scheduler.admit``: the hash
  chain, and what a hit skips.
- 8.4 (8 points) ``BlockManager.register``, ``put_back`` and ``take_free``, ``SharedCache.register`` and
  ``SharedCache.free``: which blocks can be found, and which content is lost first.
- 8.5 (5 points) ``Engine.fork_samples``: ``n`` samples for one prefill.
- 8.6 (3 points) ``answer_8_6``: measure and explain: what does a prompt cost that is wholly cached?

Know first: chapter 04; dictionaries that keep an order; what a hash is.
In the engine: :class:`pagebrain.block.BlockManager`, :class:`pagebrain.cache.CacheManager` and
:class:`pagebrain.engine.scheduler.Scheduler`. In vLLM: ``vllm/v1/core/block_pool.py`` and
``vllm/v1/core/kv_cache_manager.py``.
From pagebrain: ``PageBrainConfig``, ``SamplingParams``, the sampler, ``BlockKey``, the errors, the data classes of
``pagebrain.engine.sequence`` and the ``Observer`` of ``pagebrain.engine.trace``.
"""

import dataclasses
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from chapters import ch04_scheduler
from chapters.ch00_baseline import OnLogits, check_prompts
from chapters.ch04_scheduler import FreeAtOnce, half_the_room
from pagebrain import PageBrainConfig, SamplingParams
from pagebrain.block import BlockKey
from pagebrain.engine import sequence as data
from pagebrain.engine.sequence import ScheduledSequence, SequenceGroup
from pagebrain.engine.trace import Observer
from pagebrain.errors import BlockError, OutOfBlocksError
from pagebrain.sampling import Sampler, SampleRow


class BlockManager:
    """Counts the holders of each physical block, and knows the content of *cached* blocks. It handles ids, no tensors.

    A block without holders is free. A cached block can be free: then it keeps its content until it is taken.

    Attributes:
        num_evicted: how many contents were lost since the start.
        _holders: the number of holders of each block.
        _free: the free blocks, in the order in which they are taken. (A dictionary whose values are ``None`` is a set that
            keeps an order. ``move_to_end`` and ``popitem`` work at either end, ``del`` anywhere, in constant time.)
        _keys: cached block -> its content.
        _index: the same the other way round: chain hash -> cached block.
    """

    supports = frozenset({"async_scheduling", "prefix_caching"})

    def __init__(self, config: PageBrainConfig) -> None:
        assert config.num_blocks is not None
        self.num_blocks = config.num_blocks
        self.num_evicted = 0
        self._holders = [0] * self.num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        self._keys: dict[int, BlockKey] = {}
        self._index: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Number of free blocks, cached ones included."""
        return len(self._free)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Ids of the free blocks, in the order in which they are taken."""
        return tuple(self._free)

    @property
    def cached_blocks(self) -> dict[int, BlockKey]:
        """The contents of the cached blocks, free or held."""
        return dict(self._keys)

    @property
    def num_cached_blocks(self) -> int:
        """Number of cached blocks, free or held."""
        return len(self._keys)

    def can_allocate(self, count: int) -> bool:
        """Whether ``count`` blocks are free."""
        return count <= self.num_free_blocks

    def ref_count(self, block_id: int) -> int:
        """Number of holders of a block; 0 means free. Raises ``BlockError`` for an id that does not exist."""
        if not 0 <= block_id < self.num_blocks:
            raise BlockError(f"block ids run from 0 to {self.num_blocks - 1}, got {block_id}")
        return self._holders[block_id]

    def allocate(self, count: int = 1) -> list[int]:
        """Take ``count`` free blocks, each with one holder. Raises ``OutOfBlocksError``, and changes nothing, if too few."""
        if count < 0:
            raise BlockError(f"count must be at least 0, got {count}")
        if not self.can_allocate(count):
            raise OutOfBlocksError(
                f"{count} blocks were asked for, but only {self.num_free_blocks} of {self.num_blocks} are free"
            )
        block_ids = [self.take_free() for _ in range(count)]
        for block_id in block_ids:
            self._holders[block_id] = 1
        return block_ids

    def share(self, block_id: int) -> None:
        """Task 8.1: add a holder to a block that is held, or that is free and cached.

        A free block is free no longer, and its content stays. Raises ``BlockError`` for a free block that is not cached, and
        for an id that does not exist. After an error nothing has changed.
        """
        # BEGIN SOLUTION 8.1
        if self.ref_count(block_id) == 0:
            if block_id not in self._keys:
                raise BlockError(f"block {block_id} is free and holds nothing that could be shared")
            del self._free[block_id]
        self._holders[block_id] += 1
        # END SOLUTION

    def free(self, block_ids: Iterable[int]) -> None:
        """Task 8.1: remove one holder of each block. A block without holders goes to :meth:`put_back`, in the order named.

        ``block_ids`` can be any iterable, also one that can be read only once. A block may be named several times; each time
        removes a holder. Raises ``BlockError`` if a block has fewer holders than that, or does not exist. After an error
        nothing has changed.
        """
        # BEGIN SOLUTION 8.1
        block_ids = list(block_ids)
        for block_id, count in Counter(block_ids).items():
            if count > self.ref_count(block_id):
                raise BlockError(f"block {block_id} is freed {count} times, but has {self.ref_count(block_id)} holders")
        for block_id in block_ids:
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self.put_back(block_id)
        # END SOLUTION

    def find(self, key: BlockKey) -> int | None:
        """Task 8.3: the cached block with this content, held or free; ``None`` if there is none. Nothing changes.

        Two contents can have the same hash, so the key's ``tokens`` are compared too.
        """
        # BEGIN SOLUTION 8.3
        block_id = self._index.get(key.chain_hash)
        return block_id if block_id is not None and self._keys[block_id].tokens == key.tokens else None
        # END SOLUTION

    def register(self, block_id: int, key: BlockKey) -> None:
        """Task 8.4: make the content of a held block findable. From now on the block is cached.

        No effect if a block with this chain hash is cached already. Raises ``BlockError``, before anything has changed, for
        a free block, and for a block that is cached with another content.
        """
        # BEGIN SOLUTION 8.4
        if self.ref_count(block_id) == 0:
            raise BlockError(f"block {block_id} is free, and has no content to register")
        if self._keys.get(block_id, key) != key:
            raise BlockError(f"block {block_id} is cached with another content")
        if self._index.setdefault(key.chain_hash, block_id) == block_id:
            self._keys[block_id] = key
        # END SOLUTION

    def put_back(self, block_id: int) -> None:
        """Task 8.4: a block that lost its last holder is free again. Where does it stand among the free blocks?

        Blocks that are not cached are taken before all cached ones, in any order. Cached ones are taken in the order in
        which they were put back: the one that has been free for the longest time first.
        """
        # BEGIN SOLUTION 8.4
        self._free[block_id] = None
        if block_id not in self._keys:
            self._free.move_to_end(block_id, last=False)
        # END SOLUTION

    def take_free(self) -> int:
        """Task 8.4: take the next block from ``_free``, which is not empty. Returns its id.

        The block will be written anew. If it is cached, its content is lost (*evicted*): nothing finds it from now on, and
        ``num_evicted`` counts it.
        """
        # BEGIN SOLUTION 8.4
        block_id, _ = self._free.popitem(last=False)
        if (key := self._keys.pop(block_id, None)) is not None:
            del self._index[key.chain_hash]
            self.num_evicted += 1
        return block_id
        # END SOLUTION


class SharedCache(FreeAtOnce):
    """Chapter 04's cache, whose block tables may name the same block.

    Attributes:
        lengths: sequence id -> how many of its tokens are in the cache, for sequences that have any.
    """

    block_manager: BlockManager  # type: ignore[assignment]  # it has all that chapter 02's has

    def __init__(self, block_manager: BlockManager, config: PageBrainConfig) -> None:
        super().__init__(block_manager, config)  # type: ignore[arg-type]
        self.prefix_caching = config.prefix_caching
        self.lengths: dict[int, int] = {}

    def attach(self, seq_id: int, block_ids: Sequence[int], num_tokens: int) -> None:
        """Let a sequence without blocks begin with these, which hold ``num_tokens`` tokens. Each gets one holder more."""
        for block_id in block_ids:
            self.block_manager.share(block_id)
        self._tables[seq_id] = list(block_ids)
        self.lengths[seq_id] = num_tokens

    def computed(self, seq: data.Sequence) -> None:
        """A step of the sequence is over, and the cache holds ``seq.num_computed`` of its tokens."""
        if self.prefix_caching:
            start = self.lengths.get(seq.seq_id, 0) // self.block_size
            self.register(seq, start, seq.num_computed // self.block_size)
        self.lengths[seq.seq_id] = seq.num_computed

    def retire(self, seq: data.Sequence) -> None:
        """Give the sequence's blocks back. None of its tokens is in the cache on its account."""
        super().retire(seq)
        self.lengths.pop(seq.seq_id, None)

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free."""
        return sum(1 for block_id in block_ids if self.block_manager.ref_count(block_id) == 0)

    def num_missing_blocks(self, seq_id: int, num_tokens: int) -> int:
        """Blocks that :meth:`grow` takes: those that the table lacks, and one if a block must be copied."""
        return super().num_missing_blocks(seq_id, num_tokens) + self.must_copy(seq_id)

    def copy_block(self, source: int, target: int) -> None:
        """Copy K and V of all layers from one block to another."""
        self.key_pools[:, target] = self.key_pools[:, source]
        self.value_pools[:, target] = self.value_pools[:, source]

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Task 8.1: let sequence ``child_id``, which has no blocks, continue the first ``num_tokens`` tokens of another.

        These tokens are in the cache, and there is at least one. The child's table names the parent's blocks of these
        tokens, the last one also if it is not full, and no others: the parent may have more. Nothing is copied, no block is
        taken, and the parent's table stays as it is. :meth:`attach` does the rest.
        """
        # BEGIN SOLUTION 8.1
        num_blocks = -(-num_tokens // self.block_size)
        self.attach(child_id, self.block_table(parent_id)[:num_blocks], num_tokens)
        # END SOLUTION

    def must_copy(self, seq_id: int) -> bool:
        """Task 8.2: whether the block that the sequence's next token is written to has other holders.

        ``self.lengths`` says how many tokens of the sequence are in the cache; none, if it does not name the sequence. The
        next token goes behind them. If the table has no block for it yet, there is nothing to copy.
        """
        # BEGIN SOLUTION 8.2
        page = self.lengths.get(seq_id, 0) // self.block_size
        table = self.block_table(seq_id)
        return page < len(table) and self.block_manager.ref_count(table[page]) > 1
        # END SOLUTION

    def grow(self, seq_id: int, num_tokens: int) -> None:
        """Task 8.2: prepare the sequence's table for writing its tokens up to ``num_tokens`` in all, cached ones included.

        If the sequence :meth:`must_copy`, its table names a new block in place of the shared one, with the same K and V
        (:meth:`copy_block`), and the shared one has one holder less. Behind the blocks of the table come as many new ones
        as ``num_tokens`` tokens need. Blocks of other tokens, and other tables, stay as they are. Raises
        ``OutOfBlocksError`` if fewer than :meth:`num_missing_blocks` are free. Then nothing has changed, and a sequence
        without a table has none.
        """
        # BEGIN SOLUTION 8.2
        must_copy = self.must_copy(seq_id)
        block_ids = self.block_manager.allocate(self.num_missing_blocks(seq_id, num_tokens))
        table = self._tables.setdefault(seq_id, [])
        if must_copy:
            page = self.lengths[seq_id] // self.block_size
            shared, table[page] = table[page], block_ids.pop()
            self.copy_block(shared, table[page])
            self.block_manager.free([shared])
        table.extend(block_ids)
        # END SOLUTION

    def block_keys(self, seq: data.Sequence, count: int) -> list[BlockKey]:
        """Task 8.3: the keys of the first ``count`` blocks of a sequence, which has tokens for all of them.

        The ``tokens`` of a key are the block's token ids as 32-bit integers, ``array("i", token_ids).tobytes()``. Its
        ``chain_hash`` is ``blake2b(parent + tokens, digest_size=16).digest()``, where ``parent`` is the chain hash of the
        block before, and ``b""`` for the first. So it stands for *all* tokens up to the block's end.

        ``seq.block_keys`` keeps the keys that were made, from the first on; each is made once, however often it is asked
        for. (Tokens of a sequence never change; new ones come at its end.)
        """
        # BEGIN SOLUTION 8.3
        for index in range(len(seq.block_keys), count):
            parent = seq.block_keys[-1].chain_hash if seq.block_keys else b""
            tokens = array("i", seq.token_ids[index * self.block_size : (index + 1) * self.block_size]).tobytes()
            seq.block_keys.append(BlockKey(blake2b(parent + tokens, digest_size=16).digest(), tokens))
        return seq.block_keys[:count]
        # END SOLUTION

    def match(self, seq: data.Sequence) -> list[int]:
        """Task 8.3: the cached blocks that a sequence without blocks can begin with, in order. Nothing changes.

        They are found now, by the keys of the sequence's full blocks. A block is of use only together with all blocks before
        it. At least one of the sequence's tokens must be left to compute, because without it there are no logits.
        """
        # BEGIN SOLUTION 8.3
        found: list[int] = []
        for key in self.block_keys(seq, (seq.num_tokens - 1) // self.block_size):
            block_id = self.block_manager.find(key)
            if block_id is None:
                break
            found.append(block_id)
        return found
        # END SOLUTION

    def register(self, seq: data.Sequence, first: int, end: int) -> None:
        """Task 8.4: blocks ``first .. end - 1`` of the sequence's table are full and computed: make them findable.

        If another block with the same content can be found already, the sequence's own is a *duplicate*. Then the table
        names the other block from now on, which has one holder more, and the duplicate one less.
        """
        # BEGIN SOLUTION 8.4
        table = self._tables[seq.seq_id]
        for index, key in enumerate(self.block_keys(seq, end)[first:], start=first):
            known = self.block_manager.find(key)
            if known is None:
                self.block_manager.register(table[index], key)
            elif known != table[index]:
                self.block_manager.share(known)
                duplicate, table[index] = table[index], known
                self.block_manager.free([duplicate])
        # END SOLUTION

    def free(self, seq_id: int) -> None:
        """Task 8.4: remove the sequence's table, and itself as a holder of its blocks.

        The last block of the table is freed first, so that its content is lost before that of the blocks before it. For a
        sequence without a table nothing happens.
        """
        # BEGIN SOLUTION 8.4
        self.block_manager.free(reversed(self._tables.pop(seq_id, [])))
        # END SOLUTION


class Scheduler(ch04_scheduler.Scheduler):
    """Chapter 04's scheduler, for sequences that find their beginning in the cache."""

    cache_manager: SharedCache

    def admit(self, budget: int) -> list[ScheduledSequence]:
        """Task 8.3: as in chapter 04, but a sequence begins behind the blocks that :meth:`SharedCache.match` finds for it.

        :meth:`SharedCache.attach` gives it these blocks, and ``seq.skip(num_tokens)`` counts their tokens as computed. They
        cost nothing of the budget. The first part is what is left to compute, or as much of it as the budget allows.

        As in chapter 04, the first in the queue comes in only if there are blocks for all of its tokens. Those that were
        found need not be taken. But a block that was found may be free. Then it counts as a free block now, and no longer
        when the sequence holds it (:meth:`SharedCache.num_unheld`). Without blocks enough, nothing changes.
        """
        # BEGIN SOLUTION 8.3
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
            budget -= scheduled[-1].num_tokens
        return scheduled
        # END SOLUTION


class Engine(ch04_scheduler.Engine):
    """Chapter 04's engine with a cache that shares blocks, and with requests for several samples.

    ``samples`` has the sequences of each request, by request id: the first sample, and the others once they have started.
    """

    cache: SharedCache

    def __init__(
        self,
        model: GPT2LMHeadModel,
        config: PageBrainConfig,
        on_logits: OnLogits | None = None,
        *,
        on_step: Observer | None = None,
        keep_history: bool = True,
    ) -> None:
        super().__init__(model, config, on_logits, on_step=on_step, keep_history=keep_history)
        self.scheduler: Scheduler = Scheduler(config, self.cache)
        self.sampler = Sampler(config)
        self.samples: dict[str, list[data.Sequence]] = {}

    def make_cache(self) -> SharedCache:
        """A cache whose blocks can have several holders."""
        return SharedCache(BlockManager(self.config), self.config)

    def add_request(
        self, prompt: Sequence[int], max_new_tokens: int, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> data.Sequence:
        """Queue a request for ``n`` continuations of a prompt. Returns its first sample; the others start later."""
        seq = super().add_request(prompt, max_new_tokens)
        params = SamplingParams(n=n, temperature=temperature, max_tokens=max_new_tokens)
        seq.request = dataclasses.replace(seq.request, params=params, seed=seed)
        self.samples[seq.request.request_id] = [seq]
        return seq

    def new_sample(self, first: data.Sequence, sample_index: int) -> data.Sequence:
        """A new sequence for sample number ``sample_index`` of the request of ``first``, with the prompt and no blocks."""
        number, self._num_requests = self._num_requests, self._num_requests + 1
        return data.Sequence(number, first.request, sample_index, first.max_num_tokens)

    def fork_samples(self, first: data.Sequence) -> list[data.Sequence]:
        """Task 8.5: start samples ``1 .. n - 1`` of a request (``n`` is ``first.params.n``). Returns them, in this order.

        ``first`` is sample 0. It runs, its whole prompt has just been computed, and it has no token of an answer yet. The
        engine gives all samples their first token when this function is done, so no sample computes the prompt again. Make
        each with :meth:`new_sample`.

        A sample gets a seat if there is one (``config.max_num_seqs``). Then it is a fork of ``first`` in the cache, ``skip``
        counts the prompt as computed, and it stands in ``scheduler.running`` behind ``first`` and the samples before it, and
        before all that arrived later. The other samples wait, with no blocks and nothing computed, in order and before all
        others in ``scheduler.waiting``: the request runs, so it arrived before them. (:meth:`Scheduler.admit` will find the
        prompt's full blocks for them.)
        """
        # BEGIN SOLUTION 8.5
        running = self.scheduler.running
        samples = [self.new_sample(first, index) for index in range(1, first.params.n)]
        num_seats = max(0, self.config.max_num_seqs - len(running))
        place = running.index(first) + 1
        for seq in samples[:num_seats]:
            self.cache.fork(first.seq_id, seq.seq_id, first.num_prompt_tokens)
            seq.skip(first.num_prompt_tokens)
        running[place:place] = samples[:num_seats]
        self.scheduler.waiting.extendleft(reversed(samples[num_seats:]))
        return samples
        # END SOLUTION

    def step(self) -> SequenceGroup | None:
        """One step of chapter 04. Then the blocks that it filled can be found."""
        group = super().step()
        for entry in group or ():
            if not entry.seq.is_finished:
                self.cache.computed(entry.seq)
        return group

    def append(self, seq: data.Sequence, scores: Tensor) -> None:
        """Append the next token. With the first token of a request, its other samples get theirs from the same scores."""
        samples = [seq]
        if seq.sample_index == 0 and not seq.output_token_ids:
            samples += self.fork_samples(seq)
            self.samples[seq.request.request_id] += samples[1:]
        for sample in samples:
            super().append(sample, scores)

    def choose(self, seq: data.Sequence, scores: Tensor) -> int:
        """The next token, drawn with the request's temperature; the random number depends on seed, sample and place."""
        history = torch.empty(0, dtype=torch.int64, device=scores.device)
        place = len(seq.output_token_ids)
        row = SampleRow(seq.params, seq.request.seed, seq.sample_index, place, history, seq.num_prompt_tokens)
        return int(self.sampler.sample(scores[None], [row]).token_ids[0])

    def finish(self, seq: data.Sequence) -> None:
        """End a sequence. The blocks that it filled can be found until they are evicted."""
        if seq.num_computed > 0:
            self.cache.computed(seq)
        super().finish(seq)


def answer_8_6() -> tuple[float, str]:
    """Task 8.6: what does a prompt cost that is wholly cached?

    Eight requests come one after the other, each when the one before has its answer. All have the same prompt of 48 tokens,
    and each asks for one new token. Blocks have 16 slots, and the pool holds everything. Measure: how many tokens does the
    engine compute for the eight requests together? ``StepTrace.num_tokens`` is what a step computes.

    Returns the number, and one to four sentences, at least 8 different words in all: why is it more than one token for
    each repeated prompt, and what could an engine do, or how could it be set up, to compute fewer? The text goes to the
    instructor.
    """
    # BEGIN SOLUTION 8.6
    text = (
        "All three blocks are found, but the last token must be computed for its logits, and a hit ends with a whole block, "
        "so the third block is computed again: 16 tokens for each repeated prompt. With smaller blocks less is repeated. "
        "An engine could also share the last block and compute only its last token, into a copy of the block."
    )
    return 160.0, text
    # END SOLUTION


def generate(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_logits: OnLogits | None = None,
    *,
    config: PageBrainConfig | None = None,
    on_step: Observer | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt; without a ``config``, with chapter 04's :func:`half_the_room`.

    ``on_step`` is called with the record of every step.
    """
    check_prompts(model, prompts, max_new_tokens)
    engine = Engine(model, config or half_the_room(model, prompts, max_new_tokens), on_logits, on_step=on_step)
    sequences = [engine.add_request(prompt, max_new_tokens) for prompt in prompts]
    while engine.step() is not None:
        pass
    return [seq.output_token_ids for seq in sequences]
