"""Chapter 08: each function alone, in pools built by hand, and then whole runs of the engine against Hugging Face.

A block that is taken or free without a content is poisoned in the runs, so a table that names it is found out.
"""

import random
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pagebrain import PageBrainConfig, SamplingParams
from pagebrain.block import BlockKey
from pagebrain.engine.sequence import Request, Sequence, SequenceStatus
from pagebrain.engine.trace import StepTrace
from pagebrain.errors import BlockError, OutOfBlocksError
from tests.support.answers import assert_answer
from tests.support.departures import assert_same, assert_same_tokens
from tests.support.hashing import hash_engine, run_all
from tests.support.hints import hint
from tests.support.models import POISON, hf_greedy, hf_logits, poison, random_gpt2

CHAPTER = "08"


def make_config(**settings: Any) -> PageBrainConfig:
    shape: dict[str, Any] = {"num_layers": 2, "num_heads": 1, "head_dim": 1, "dtype": "float64", "device": "cpu"}
    return PageBrainConfig(**(shape | {"block_size": 4, "num_blocks": 8} | settings))


def make_manager(chapter: Any, num_blocks: int = 8) -> Any:
    return chapter.BlockManager(make_config(num_blocks=num_blocks))


def make_cache(chapter: Any, **settings: Any) -> Any:
    """A cache in whose pools no two slots hold the same."""
    config = make_config(**settings)
    cache = chapter.SharedCache(chapter.BlockManager(config), config)
    for pools, first in ((cache.key_pools, 0), (cache.value_pools, 10_000)):
        pools.copy_(torch.arange(first, first + pools.numel()).view(pools.shape))
    return cache


def make_seq(number: int, token_ids: list[int], num_prompt: int | None = None) -> Sequence:
    prompt = tuple(token_ids[:num_prompt])
    request = Request(str(number), None, prompt, SamplingParams(temperature=0), number, number, 0.0)
    return Sequence(number, request, 0, len(token_ids) + 20, list(token_ids))


def key(*token_ids: int, parent: bytes = b"") -> BlockKey:
    return BlockKey.after(parent, array("i", token_ids).tobytes())


def expect(what: str, got: Any, expected: Any) -> None:
    assert got == expected, f"{what} should be {expected} but is {got}"


def state(manager: Any) -> tuple[Any, ...]:
    counts = [manager.ref_count(block_id) for block_id in range(manager.num_blocks)]
    return counts, manager.free_blocks, manager.cached_blocks


def fill(cache: Any, seq: Sequence, num_tokens: int | None = None) -> tuple[int, ...]:
    """Compute a sequence's tokens, as a step would, and say so to the cache. Returns its table."""
    num_tokens = len(seq.token_ids) if num_tokens is None else num_tokens
    cache.grow(seq.seq_id, num_tokens)
    seq.num_scheduled = seq.num_computed = num_tokens
    cache.computed(seq)
    found: tuple[int, ...] = cache.block_table(seq.seq_id)
    return found


# 8.1 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.task(
    "8.1", hint="share adds one to the number of holders. free removes one, and the last one leaves a free block."
)
def test_a_block_is_free_when_its_last_holder_has_gone(chapter: Any) -> None:
    manager = make_manager(chapter)
    first, second = manager.allocate(2)
    for holders in (2, 3, 4):
        manager.share(first)
        expect("the number of holders", manager.ref_count(first), holders)
    for holders in (3, 2, 1):
        manager.free([first])
        expect("the number of holders", manager.ref_count(first), holders)
        assert first not in manager.free_blocks, f"block {first} has {holders} holders and is among the free blocks"
    manager.free([first])
    expect("the number of holders", (manager.ref_count(first), manager.ref_count(second)), (0, 1))
    expect("the number of free blocks", manager.num_free_blocks, 7)


@pytest.mark.task("8.1", hint="A free block that is cached leaves the free blocks, and keeps its content.")
def test_a_free_cached_block_is_shared_again(chapter: Any) -> None:
    manager = make_manager(chapter)
    [block] = manager.allocate()
    manager.register(block, key(1, 2, 3, 4))
    manager.free([block])
    manager.share(block)
    expect("the number of holders", manager.ref_count(block), 1)
    assert block not in manager.free_blocks, "a block that has a holder is among the free blocks"
    expect("the block that is found for the content", manager.find(key(1, 2, 3, 4)), block)
    manager.share(block)
    manager.free([block, block])
    expect("the number of free blocks", manager.num_free_blocks, 8)


@pytest.mark.task("8.1", hint="A free block without a content holds nothing to share: raise BlockError, before any change.")
def test_sharing_nothing_is_refused(chapter: Any) -> None:
    manager = make_manager(chapter)
    for wrong in (manager.free_blocks[0], -1, 8):
        before = state(manager)
        with pytest.raises(BlockError):
            manager.share(wrong)
        assert state(manager) == before, f"share({wrong}) raised, and changed the blocks"


@pytest.mark.task("8.1", hint="Check all names first, each as often as it is named. Then free.")
def test_freeing_too_often_changes_nothing(chapter: Any) -> None:
    manager = make_manager(chapter)
    one, two = manager.allocate(2)
    manager.share(two)
    for wrong in ([one, one], [one, two, two, two], [two, one, -1], [one, manager.free_blocks[0]]):
        before = state(manager)
        with pytest.raises(BlockError):
            manager.free(wrong)
        assert state(manager) == before, f"free({wrong}) raised, and changed the blocks"


@pytest.mark.task("8.1", hint="A block may be named several times, and an iterable can often be read only once.")
def test_any_iterable_is_freed_and_each_name_counts(chapter: Any) -> None:
    manager = make_manager(chapter)
    one, two = manager.allocate(2)
    manager.share(two)
    manager.free(block for block in (two, one, two))
    expect("the numbers of holders", (manager.ref_count(one), manager.ref_count(two)), (0, 0))


@pytest.mark.task("8.1", hint="put_back is called for each block that lost its last holder, in the order named.")
def test_blocks_are_put_back_in_the_order_named(chapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make_manager(chapter)
    blocks = manager.allocate(4)
    manager.share(blocks[2])
    seen: list[int] = []
    put_back = chapter.BlockManager.put_back

    def watched(self: Any, block_id: int) -> None:
        seen.append(block_id)
        put_back(self, block_id)

    monkeypatch.setattr(chapter.BlockManager, "put_back", watched)
    manager.free([blocks[3], blocks[0], blocks[2], blocks[1]])
    expect("the blocks that were put back", seen, [blocks[3], blocks[0], blocks[1]])


@pytest.mark.task("8.1", hint="Play it on paper: each share is one holder more, each name in free one less.")
def test_random_sharing_and_freeing(chapter: Any, seed: int) -> None:
    choose, manager, model = random.Random(seed), make_manager(chapter), Counter[int]()
    for _ in range(200):
        held = [block for block in model.elements()]
        if choose.random() < 0.3 and manager.num_free_blocks:
            model.update(manager.allocate())
        elif choose.random() < 0.5 and held:
            manager.share(block := choose.choice(held))
            model[block] += 1
        elif held:
            manager.free(gone := choose.sample(held, choose.randint(1, len(held))))
            model.subtract(gone)
        expect("the numbers of holders", [manager.ref_count(b) for b in range(8)], [model[b] for b in range(8)])
        expect("the free blocks", set(manager.free_blocks), {b for b in range(8) if not model[b]})


@pytest.mark.task("8.1", hint="The child names as many blocks as num_tokens tokens need, rounded up: the parent's own.")
@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_fork_names_the_blocks_of_its_tokens(chapter: Any, num_tokens: int, num_blocks: int) -> None:
    cache = make_cache(chapter)
    table = fill(cache, make_seq(0, list(range(11))))
    before = cache.key_pools.clone(), cache.value_pools.clone()
    cache.fork(0, 7, num_tokens)
    expect("the child's table", cache.block_table(7), table[:num_blocks])
    expect("the parent's table", cache.block_table(0), table)
    holders = [cache.block_manager.ref_count(block) for block in table]
    expect("the holders of the parent's blocks", holders, [2] * num_blocks + [1] * (3 - num_blocks))
    expect("the child's entry in lengths", cache.lengths.get(7), num_tokens)
    expect("the number of free blocks", cache.num_free_blocks, 5)
    with hint("A fork copies nothing: copy-on-write does that later, if it must be."):
        assert torch.equal(cache.key_pools, before[0]) and torch.equal(cache.value_pools, before[1]), "the pools changed"
    with hint("Each sequence needs a table of its own, not another name for the same list."):
        cache.grow(0, 16)
        expect("the child's table, after the parent grew,", cache.block_table(7), table[:num_blocks])


# 8.2 ------------------------------------------------------------------------------------------------------------------


def forked(chapter: Any, num_tokens: int, cached: int = 11, children: int = 1, **settings: Any) -> Any:
    """A cache with sequence 0, of which ``cached`` tokens are computed, and children 1, 2, ... behind ``num_tokens``."""
    cache = make_cache(chapter, **settings)
    fill(cache, make_seq(0, list(range(cached))))
    for child in range(1, children + 1):
        cache.fork(0, child, num_tokens)
    return cache


@pytest.mark.task(
    "8.2", hint="Only the block at index lengths // block_size of the table counts: the next token goes there."
)
@pytest.mark.parametrize(
    ("num_tokens", "cached", "parent", "child"),
    [
        (6, 6, True, True),
        (8, 8, False, False),
        (6, 11, False, True),
        (8, 11, False, False),
        (9, 9, True, True),
        (4, 6, False, False),
    ],
)
def test_a_copy_is_due_only_where_the_next_token_goes(
    chapter: Any, num_tokens: int, cached: int, parent: bool, child: bool
) -> None:
    cache = forked(chapter, num_tokens, cached)
    for seq_id, expected in ((0, parent), (1, child), (5, False)):
        length, table = cache.lengths.get(seq_id, 0), cache.block_table(seq_id)
        what = f"must_copy({seq_id}), with {length} tokens in the cache and the table {table},"
        expect(what, bool(cache.must_copy(seq_id)), expected)


@pytest.mark.task("8.2", hint="The only holder of a block writes into it: there is no other to protect.")
def test_the_last_holder_does_not_copy(chapter: Any) -> None:
    cache = forked(chapter, 6, cached=6, children=2)
    expect("must_copy of three holders", [bool(cache.must_copy(seq_id)) for seq_id in range(3)], [True] * 3)
    cache.grow(0, 7)
    expect("must_copy of two holders", [bool(cache.must_copy(seq_id)) for seq_id in (1, 2)], [True] * 2)
    cache.grow(1, 7)
    expect("must_copy of the last one", bool(cache.must_copy(2)), False)
    before = cache.block_table(2)
    cache.grow(2, 7)
    expect("the table of the last one", cache.block_table(2), before)
    cache.grow(5, 3)
    expect("must_copy of a sequence that holds a block and has computed nothing", bool(cache.must_copy(5)), False)


@pytest.mark.task(
    "8.2", hint="Take all blocks first. Then put the copy where the shared block stood, and free that one once."
)
@pytest.mark.parametrize("num_tokens", [7, 8, 9, 14])
def test_the_writer_gets_a_copy_and_the_other_holder_keeps_its_block(chapter: Any, num_tokens: int) -> None:
    cache = forked(chapter, 6, cached=6)
    table = cache.block_table(0)
    keys, values = cache.key_pools.clone(), cache.value_pools.clone()
    cache.grow(1, num_tokens)
    own = cache.block_table(1)
    expect("the number of the child's blocks", len(own), -(-num_tokens // 4))
    expect("the child's first block", own[0], table[0])
    expect("the parent's table", cache.block_table(0), table)
    assert own[1] not in table, f"the child still names block {own[1]}, which it is about to write into"
    expect("the number of different blocks of the child", len(set(own)), len(own))
    holders = [cache.block_manager.ref_count(block) for block in (*table, *own[1:])]
    expect("the holders of the parent's blocks and the child's new ones", holders, [2, 1] + [1] * (len(own) - 1))
    with hint("copy_block(source, target) copies K and V of all layers: the shared block is the source."):
        for name, pools, before in (("K", cache.key_pools, keys), ("V", cache.value_pools, values)):
            for what, block in (("the copy", own[1]), ("the shared block", table[1])):
                for layer in range(2):
                    same = torch.equal(pools[layer, block], before[layer, table[1]])
                    assert same, f"{name} of layer {layer} in {what} is not what the shared block held"


@pytest.mark.task("8.2", hint="allocate before any change: it raises if there are too few, the copy included.")
def test_without_blocks_enough_nothing_changes(chapter: Any) -> None:
    for num_blocks, seq_id, wanted in ((2, 1, 7), (3, 1, 9), (4, 1, 13), (2, 5, 1), (3, 5, 5)):
        cache = forked(chapter, 6, cached=6, num_blocks=num_blocks)
        before = (
            state(cache.block_manager),
            {name: cache.block_table(name) for name in cache.seq_ids},
            cache.key_pools.clone(),
        )
        with pytest.raises(OutOfBlocksError):
            cache.grow(seq_id, wanted)
        tables = {name: cache.block_table(name) for name in cache.seq_ids}
        expect(f"the tables after grow({seq_id}, {wanted}) failed", tables, before[1])
        assert state(cache.block_manager) == before[0], "grow raised, and the blocks changed"
        assert torch.equal(cache.key_pools, before[2]), "grow raised, and the pools changed"


@pytest.mark.task("8.2", hint="Play it on paper. Which block does the next token go to, and who else holds it?")
def test_random_forks_never_write_into_a_block_of_others(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    num_copies = 0
    for _ in range(12):
        block_size = choose.choice([1, 2, 3, 5])
        cache = make_cache(chapter, num_blocks=250, block_size=block_size, prefix_caching=False)
        texts: dict[int, list[int]] = {}
        for number in range(8):
            if texts and choose.random() < 0.7:
                parent = choose.choice(list(texts))
                length = choose.randint(1, len(texts[parent]))
                cache.fork(parent, number, length)
                texts[number] = texts[parent][:length]
            else:
                texts[number] = []
            for seq_id in choose.sample(list(texts), choose.randint(1, len(texts))) + [number]:
                new = [choose.randrange(10**6) for _ in range(choose.randint(1, 4))]
                num_copies += bool(cache.must_copy(seq_id))
                start = len(texts[seq_id])
                cache.grow(seq_id, start + len(new))
                texts[seq_id] += new
                cache.lengths[seq_id] = len(texts[seq_id])
                for slot, token in zip(cache.slots(seq_id, start, len(new)), new, strict=True):
                    cache.key_pools[:, slot // block_size, slot % block_size] = token
            for seq_id, text in texts.items():
                slots = cache.slots(seq_id, 0, len(text))
                held = [int(cache.key_pools[1, slot // block_size, slot % block_size]) for slot in slots]
                wrong = [place for place, (got, wanted) in enumerate(zip(held, text, strict=True)) if got != wanted]
                assert not wrong, f"the slot of token {wrong[0]} of sequence {seq_id} holds what another sequence wrote"
    assert num_copies > 0, "no block was copied in these runs"


# 8.3 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.task("8.3", hint="Each key has its block's own tokens; its hash is that of the parent's hash and these tokens.")
def test_the_keys_are_a_chain(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    cache = make_cache(chapter)
    tokens = [choose.randrange(50_000) for _ in range(11)]
    first = key(*tokens[:4])
    second = key(*tokens[4:8], parent=first.chain_hash)
    seq = make_seq(0, tokens)
    for count, expected in ((0, []), (1, [first]), (2, [first, second]), (1, [first]), (0, [])):
        expect(f"block_keys(seq, {count})", cache.block_keys(seq, count), expected)
    with hint("seq.block_keys keeps what was made: begin behind it."):
        expect("seq.block_keys", seq.block_keys, [first, second])
        kept = seq.block_keys[0]
        seq.token_ids += [7] * 5
        cache.block_keys(seq, 3)
        assert seq.block_keys[0] is kept, "the key of block 0 was made a second time"
        expect("the number of keys in seq.block_keys", len(seq.block_keys), 3)


@pytest.mark.task("8.3", hint="Look the chain hash up in _index, and compare the tokens of what is found.")
def test_a_block_is_found_by_its_whole_content(chapter: Any) -> None:
    manager = make_manager(chapter)
    one, two = manager.allocate(2)
    mine = key(1, 2, 3, 4)
    manager.register(one, mine)
    after = key(1, 2, 3, 4, parent=mine.chain_hash)
    expect("the block found for a key that is registered", manager.find(mine), one)
    expect("the block found for the same tokens behind others", manager.find(after), None)
    manager.register(two, after)
    expect("the block found for the same tokens behind others", manager.find(after), two)
    same_hash = mine._replace(tokens=after.tokens[::-1])
    expect("the block found for other tokens with the same hash", manager.find(same_hash), None)
    before = state(manager)
    manager.free([one])
    expect("the block found when it is free", manager.find(mine), one)
    manager.share(one)
    assert state(manager)[0] == before[0], "find changed the blocks"


@pytest.mark.task("8.3", hint="One token must be left to compute: (num_tokens - 1) // block_size blocks at most.")
@pytest.mark.parametrize(("length", "found"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (15, 3)])
def test_a_hit_leaves_a_token_to_compute(chapter: Any, length: int, found: int) -> None:
    cache = make_cache(chapter)
    table = fill(cache, make_seq(0, list(range(12))))
    for holders in ("held", "free"):
        seq = make_seq(3, list(range(length)))
        before = state(cache.block_manager)
        expect(f"the blocks that match for {length} tokens, {holders},", list(cache.match(seq)), list(table[:found]))
        assert state(cache.block_manager) == before, "match changed the blocks: it only looks"
        if holders == "held":
            cache.free(0)


@pytest.mark.task("8.3", hint="Stop at the first block that is not found: those behind it are of no use without it.")
def test_a_match_ends_at_the_first_gap(chapter: Any) -> None:
    cache = make_cache(chapter)
    table = fill(cache, make_seq(0, list(range(12))))
    expect(
        "the match of another second block", cache.match(make_seq(1, [0, 1, 2, 3, 9, 9, 9, 9, 8, 9, 10, 11, 12])), [table[0]]
    )
    expect("the match of another first block", cache.match(make_seq(2, [9, 1, 2, 3, *range(4, 13)])), [])
    other = make_cache(chapter)
    keys = other.block_keys(make_seq(3, list(range(12))), 3)
    blocks = other.block_manager.allocate(3)
    for index in (0, 2):
        other.block_manager.register(blocks[index], keys[index])
    expect("the match when the second block is missing", other.match(make_seq(4, list(range(13)))), [blocks[0]])
    with hint("Look now, each time: blocks come and go between two calls."):
        seq = make_seq(5, list(range(13)))
        other.match(seq)
        other.block_manager.register(blocks[1], keys[1])
        expect("the match when the second block has come", other.match(seq), blocks)


@pytest.mark.task("8.3", hint="All tokens that the sequence has can be found, also those of its answer, after a preemption.")
def test_an_answer_is_found_too(chapter: Any) -> None:
    cache = make_cache(chapter)
    table = fill(cache, make_seq(0, list(range(12))))
    expect(
        "the match of 3 prompt tokens and 10 of the answer",
        cache.match(make_seq(1, list(range(13)), num_prompt=3)),
        list(table),
    )


class Queue:
    """A scheduler over a cache in which sequence 0 has computed tokens 0, 1, 2, ..., with others in the queue."""

    def __init__(
        self,
        chapter: Any,
        waiting: list[list[int]],
        *,
        cached: int = 12,
        keep: bool = False,
        num_later: int = 0,
        **settings: Any,
    ) -> None:
        self.cache = make_cache(chapter, **settings)
        self.table = fill(self.cache, make_seq(0, list(range(cached))))
        if not keep:
            self.cache.free(0)
            self.cache.lengths.pop(0)
        if num_later:  # cached blocks that are evicted after those of sequence 0
            fill(self.cache, make_seq(99, [77] * 4 * num_later))
            self.cache.free(99)
            self.cache.lengths.pop(99)
        self.scheduler = chapter.Scheduler(make_config(max_num_seqs=4, **settings), self.cache)
        self.seqs = [make_seq(number, tokens) for number, tokens in enumerate(waiting, start=1)]
        self.scheduler.waiting.extend(self.seqs)

    def admit(self, budget: int, expected: dict[int, tuple[int, int]]) -> None:
        """``expected``: sequence -> first token that it computes, and how many."""
        before = state(self.cache.block_manager)
        parts = self.scheduler.admit(budget)
        got = {part.seq.seq_id: (part.start, part.num_tokens) for part in parts}
        expect(f"admit({budget}), as {{sequence: (start, tokens)}},", got, expected)
        expect("running", [seq.seq_id for seq in self.scheduler.running], list(expected))
        waiting = [seq.seq_id for seq in self.seqs if seq.seq_id not in expected]
        expect("waiting", [seq.seq_id for seq in self.scheduler.waiting], waiting)
        for part in parts:
            seq, (start, count) = part.seq, expected[part.seq.seq_id]
            expect(f"num_scheduled of sequence {seq.seq_id}", seq.num_scheduled, start)
            expect(
                f"the number of blocks of sequence {seq.seq_id}",
                len(self.cache.block_table(seq.seq_id)),
                -(-(start + count) // 4),
            )
            expect(
                f"the first blocks of sequence {seq.seq_id}",
                self.cache.block_table(seq.seq_id)[: start // 4],
                self.table[: start // 4],
            )
        if not expected:
            assert state(self.cache.block_manager) == before, "no sequence came in, and the blocks changed"
            expect(
                "the tables of those that wait",
                [self.cache.block_table(seq.seq_id) for seq in self.seqs],
                [()] * len(self.seqs),
            )
        holders = Counter(block for seq_id in self.cache.seq_ids for block in self.cache.block_table(seq_id))
        counts = [self.cache.block_manager.ref_count(block) for block in range(self.cache.block_manager.num_blocks)]
        expect("the holders of the blocks", counts, [holders[block] for block in range(len(counts))])


@pytest.mark.task("8.3", hint="Match, then attach and skip. What is left to compute, and no more, is taken off the budget.")
def test_a_hit_costs_nothing_of_the_budget(chapter: Any) -> None:
    Queue(chapter, [list(range(10)), list(range(14)), [9]], num_blocks=20).admit(5, {1: (8, 2), 2: (12, 2), 3: (0, 1)})
    Queue(chapter, [list(range(16)), list(range(30))], num_blocks=20).admit(7, {1: (12, 4), 2: (12, 3)})
    Queue(chapter, [list(range(12))], num_blocks=20).admit(4, {1: (8, 4)})
    Queue(chapter, [list(range(16))], num_blocks=20, keep=True).admit(2, {1: (12, 2)})
    Queue(chapter, [[7] * 9, list(range(13))], num_blocks=20).admit(10, {1: (0, 9), 2: (12, 1)})
    Queue(chapter, [list(range(13))], num_blocks=20).admit(0, {})


@pytest.mark.task(
    "8.3", hint="Found blocks need not be taken; but those of them that are free cannot be taken by others either."
)
def test_blocks_that_were_found_are_neither_needed_nor_free(chapter: Any) -> None:
    tokens = list(range(20))  # five blocks, of which three are found
    Queue(chapter, [tokens], num_blocks=5).admit(99, {1: (12, 8)})
    Queue(chapter, [tokens], num_blocks=4).admit(99, {})
    Queue(chapter, [tokens], num_blocks=5, keep=True).admit(99, {1: (12, 8)})
    Queue(chapter, [tokens], num_blocks=4, keep=True).admit(99, {})
    Queue(chapter, [tokens], num_blocks=4).admit(1, {})


@pytest.mark.task(
    "8.3", hint="Hold what was found before new blocks are taken, and look for it when the sequence's turn has come."
)
def test_what_was_found_is_not_evicted_on_the_way(chapter: Any) -> None:
    Queue(chapter, [[*range(8), *[70] * 8]], num_blocks=4).admit(99, {1: (8, 8)})
    Queue(chapter, [[80] * 13, list(range(13))], num_blocks=8).admit(99, {1: (0, 13), 2: (12, 1)})
    # Sequence 1 takes a block without a content, and evicts the last of the three that sequence 2 would have found before.
    Queue(chapter, [[80] * 8, list(range(13))], num_blocks=8, num_later=4).admit(99, {1: (0, 8), 2: (8, 5)})


@pytest.mark.task("8.3", hint="Seats, budget and order of arrival are as in chapter 04: the first in the queue, or none.")
def test_the_order_and_the_seats_are_those_of_chapter_04(chapter: Any) -> None:
    Queue(chapter, [[7] * 40, list(range(13))], num_blocks=8).admit(99, {})
    Queue(chapter, [[number] for number in range(20, 26)], num_blocks=20).admit(99, {n: (0, 1) for n in range(1, 5)})


class Poisoned:
    """An engine whose blocks are poisoned when they are taken, and when they are free without a content."""

    def __init__(self, chapter: Any, model: Any, **settings: Any) -> None:
        self.model = model
        self.logits: dict[int, list[Any]] = {}
        config = PageBrainConfig.for_model(model, **settings)
        self.engine = chapter.Engine(
            model, config, lambda index, scores: self.logits.setdefault(index, []).append(scores.clone())
        )
        self.manager = self.engine.cache.block_manager
        poison(self.engine.cache)
        allocate = self.manager.allocate

        def allocate_poisoned(count: int = 1) -> list[int]:
            block_ids: list[int] = allocate(count)
            self.poison(block_ids)
            return block_ids

        self.manager.allocate = allocate_poisoned

    def poison(self, block_ids: list[int]) -> None:
        self.engine.cache.key_pools[:, block_ids] = POISON
        self.engine.cache.value_pools[:, block_ids] = POISON

    def step(self) -> bool:
        group = self.engine.step()
        cache = self.engine.cache
        holders = Counter(block for seq_id in cache.seq_ids for block in cache.block_table(seq_id))
        counts = {block: self.manager.ref_count(block) for block in range(self.manager.num_blocks)}
        expect("the holders of the blocks, by the tables,", counts, {block: holders[block] for block in counts})
        self.poison([block for block in self.manager.free_blocks if block not in self.manager.cached_blocks])
        return group is not None

    def run(self, limit: int = 500) -> list[StepTrace]:
        for _ in range(limit):
            if not self.step():
                break
        history: list[StepTrace] = self.engine.history
        return history

    def check(self, seq: Sequence, prompt: list[int], what: str) -> None:
        """Logits are those of Hugging Face, and the tokens follow from them."""
        theirs = hf_logits(self.model, prompt + seq.output_token_ids)[len(prompt) - 1 : -1]
        assert_same(torch.stack(self.logits[seq.seq_id]), theirs, what=what, axes=("output token", "score"))


@pytest.mark.task(
    "8.3", hint="The functions may be right one by one: follow the first sequence that is wrong in engine.history."
)
def test_the_engine_gives_what_hugging_face_gives(chapter: Any, seed: int) -> None:
    choose, model = random.Random(seed), random_gpt2(seed=seed)
    model.config.eos_token_id = None
    system = [choose.randrange(90) for _ in range(9)]
    prompts = [[*system, *[choose.randrange(90) for _ in range(choose.randint(1, 9))]] for _ in range(6)] + [system[:8]]
    run = Poisoned(chapter, model, block_size=4, num_blocks=11, max_num_seqs=3, max_num_batched_tokens=10)
    seqs = []
    for prompt in prompts:
        seqs.append(run.engine.add_request(prompt, 9))
        for _ in range(choose.randint(0, 4)):
            run.step()
    history = run.run()
    for number, (seq, prompt) in enumerate(zip(seqs, prompts, strict=True)):
        assert_same_tokens(seq.output_token_ids, hf_greedy(model, prompt, 9), what=f"the answer to prompt {number}")
        run.check(seq, prompt, f"the logits of prompt {number}")
    first: dict[int, int] = {}
    for trace in history:
        for row in trace.rows:
            first.setdefault(row.seq_id, row.start)
    assert sum(first.values()) > 0, "no prompt began behind blocks that were found"
    assert run.manager.num_evicted > 0, "no content was evicted"
    assert any(trace.preempted for trace in history), "no sequence was preempted"
    expect("the number of free blocks at the end", run.manager.num_free_blocks, 11)


# 8.4 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.task("8.4", hint="The first block with a content keeps it. Others with the same content are not cached.")
def test_a_content_is_registered_once(chapter: Any) -> None:
    manager = make_manager(chapter)
    one, two = manager.allocate(2)
    manager.register(one, key(1, 2, 3, 4))
    manager.register(one, key(1, 2, 3, 4))
    manager.register(two, key(1, 2, 3, 4))
    expect("the cached blocks", manager.cached_blocks, {one: key(1, 2, 3, 4)})
    expect("the block that is found", manager.find(key(1, 2, 3, 4)), one)


@pytest.mark.task("8.4", hint="Raise BlockError for a free block, and for one that is cached with another content.")
def test_wrong_registrations_are_refused(chapter: Any) -> None:
    manager = make_manager(chapter)
    one, two = manager.allocate(2)
    manager.register(one, key(1, 2, 3, 4))
    manager.register(two, key(5, 2, 3, 4))
    manager.free([two])
    for block, content in (
        (one, key(9, 9, 9, 9)),
        (manager.free_blocks[0], key(9, 9, 9, 9)),
        (two, key(5, 2, 3, 4)),
        (one, key(5, 2, 3, 4)),
    ):
        before = state(manager)
        with pytest.raises(BlockError):
            manager.register(block, content)
        assert state(manager) == before, f"register({block}, ...) raised, and changed the blocks"


@pytest.mark.task("8.4", hint="Blocks without a content go first, then the cached one that was put back first.")
def test_the_content_that_was_free_for_longest_is_lost_first(chapter: Any) -> None:
    manager = make_manager(chapter)
    blocks = manager.allocate(8)
    contents = [key(number, 0, 0, 0) for number in range(8)]
    for block in (5, 1, 3, 6):
        manager.register(blocks[block], contents[block])
    for block in (3, 0, 6, 5, 2, 1):
        manager.free([blocks[block]])
    expect("the first two blocks that are taken", set(manager.allocate(2)), {blocks[0], blocks[2]})
    expect("num_evicted", manager.num_evicted, 0)
    manager.share(blocks[3])
    manager.free([blocks[3]])  # it was used again, so it is the last now
    for number, block in enumerate((6, 5, 1, 3), start=1):
        expect("the block that is taken next", manager.allocate(), [blocks[block]])
        expect(f"the block that is found for the content of block {blocks[block]}", manager.find(contents[block]), None)
        assert blocks[block] not in manager.cached_blocks, "a block that was taken is still cached"
        expect("num_evicted", manager.num_evicted, number)


@pytest.mark.task("8.4", hint="A block that is free keeps its content until it is taken.")
def test_a_free_block_stays_findable(chapter: Any) -> None:
    manager = make_manager(chapter)
    [block] = manager.allocate()
    manager.register(block, key(1, 2, 3, 4))
    manager.free([block])
    expect("the block that is found", manager.find(key(1, 2, 3, 4)), block)
    assert block in manager.free_blocks, "the block has no holder, and is not free"


@pytest.mark.task("8.4", hint="Play it on paper: a queue of free blocks with a content, and a set of those without.")
def test_random_blocks_are_evicted_in_order(chapter: Any, seed: int) -> None:
    choose, manager = random.Random(seed), make_manager(chapter)
    held: list[int] = []
    queue: list[int] = []
    contents: dict[int, BlockKey] = {}
    number = evicted = 0
    for _ in range(300):
        if choose.random() < 0.5 and manager.num_free_blocks:
            plain = set(range(8)) - set(held) - set(queue)
            [block] = manager.allocate()
            if plain:
                assert block in plain, (
                    f"block {block} was taken, which is cached, while {sorted(plain)} are free and are not"
                )
            else:
                expect("the block that is taken", block, queue.pop(0))
                del contents[block]
                evicted += 1
            held.append(block)
            if choose.random() < 0.6:
                number += 1
                contents[block] = key(number, 0, 0, 0)
                manager.register(block, contents[block])
        elif held:
            block = held.pop(choose.randrange(len(held)))
            manager.free([block])
            queue += [block] if block in contents else []
        expect("the cached blocks", manager.cached_blocks, contents)
        expect("num_evicted", manager.num_evicted, evicted)


@pytest.mark.task("8.4", hint="Blocks first .. end - 1 of the table, and no others, get the keys with the same numbers.")
def test_the_blocks_that_are_full_are_registered(chapter: Any) -> None:
    cache = make_cache(chapter)
    seq = make_seq(0, list(range(16)))
    cache.grow(0, 16)
    table = cache.block_table(0)
    keys = make_cache(chapter).block_keys(make_seq(1, list(range(16))), 4)
    cache.register(seq, 0, 0)
    expect("the cached blocks", cache.block_manager.cached_blocks, {})
    for first, end in ((0, 1), (1, 3)):
        cache.register(seq, first, end)
        with hint("A block that is not computed yet must not be found: only blocks before `end` are."):
            expect(
                f"the cached blocks after register(seq, {first}, {end})",
                cache.block_manager.cached_blocks,
                dict(zip(table[:end], keys)),
            )
    expect("the table", cache.block_table(0), table)
    holders = [cache.block_manager.ref_count(block) for block in table]
    expect("the holders of the blocks", holders, [1, 1, 1, 1])
    cache.register(seq, 0, 3)
    expect(
        "the holders of the blocks after a second call", [cache.block_manager.ref_count(block) for block in table], [1] * 4
    )


@pytest.mark.task("8.4", hint="First the other block gets a holder and the place in the table; then the duplicate is freed.")
@pytest.mark.parametrize("first_is_held", [True, False])
def test_a_duplicate_gives_way_to_the_block_that_is_found(chapter: Any, first_is_held: bool) -> None:
    cache = make_cache(chapter)
    twins = [make_seq(number, list(range(10))) for number in range(2)]
    for twin in twins:
        cache.grow(twin.seq_id, 10)
    before = [cache.block_table(number) for number in range(2)]
    cache.register(twins[0], 0, 2)
    if not first_is_held:
        cache.free(0)
    cache.register(twins[1], 0, 2)
    expect("the table of the second sequence", cache.block_table(1), (*before[0][:2], before[1][2]))
    holders = [cache.block_manager.ref_count(block) for block in (*before[0][:2], *before[1])]
    expect(
        "the holders: of two blocks that are found, two duplicates, one that is not full,",
        holders,
        [1 + first_is_held] * 2 + [0, 0, 1],
    )
    expect("the cached blocks", set(cache.block_manager.cached_blocks), set(before[0][:2]))
    expect("the table of the first sequence", cache.block_table(0), before[0] if first_is_held else ())


@pytest.mark.task("8.4", hint="Free the table's blocks from its end, so that the end of a chain is evicted before its head.")
def test_the_tail_of_a_chain_is_evicted_before_its_head(chapter: Any) -> None:
    cache = make_cache(chapter, num_blocks=4)
    table = fill(cache, make_seq(0, list(range(16))))
    cache.free(0)
    expect("the table after free", (cache.block_table(0), cache.seq_ids), ((), ()))
    expect("the number of free blocks", cache.num_free_blocks, 4)
    for left in (3, 2, 1, 0):
        expect("the block that is evicted next", cache.block_manager.allocate(), [table[left]])
        expect("the blocks that match", list(cache.match(make_seq(1, list(range(17))))), list(table[:left]))
    cache.free(99)  # has no table


# 8.5 ------------------------------------------------------------------------------------------------------------------


class Samples:
    """An engine in which the first sample of a request has just computed its prompt, and has no token of an answer."""

    def __init__(self, chapter: Any, n: int, seats: int, running: int = 1, earlier: int = 0, prompt: int = 6) -> None:
        model = random_gpt2(n_layer=1, n_embd=3, n_positions=64)
        settings = {"block_size": 4, "num_blocks": 40, "max_num_seqs": seats, "max_num_batched_tokens": 64}
        self.engine = chapter.Engine(model, PageBrainConfig.for_model(model, **settings))
        others = [self.engine.add_request([number] * 3, 5) for number in range(running - 1)]
        self.first = self.engine.add_request(list(range(prompt)), 5, n=n, temperature=1.0)
        self.before, self.after = others[:earlier], others[earlier:]
        scheduler, cache = self.engine.scheduler, self.engine.cache
        scheduler.waiting.clear()
        scheduler.running[:] = [*self.before, self.first, *self.after]
        for seq in scheduler.running:
            seq.status = SequenceStatus.RUNNING
            fill(cache, seq)
        self.queue = [self.engine.add_request([9] * 3, 5) for _ in range(2)]
        self.free_blocks = cache.num_free_blocks
        self.made = self.engine.fork_samples(self.first)

    def check(self, num_forks: int) -> None:
        engine, n = self.engine, self.first.params.n
        expect("the numbers of the samples", [seq.sample_index for seq in self.made], list(range(1, n)))
        forks, late = self.made[:num_forks], self.made[num_forks:]
        label = {seq.seq_id: f"sample {seq.sample_index}" for seq in self.made} | {self.first.seq_id: "sample 0"}

        def names(seqs: Any) -> list[str]:
            return [label.get(seq.seq_id, f"request {seq.request.request_id}") for seq in seqs]

        expect("running", names(engine.scheduler.running), names([*self.before, self.first, *forks, *self.after]))
        expect("waiting", names(engine.scheduler.waiting), names([*late, *self.queue]))
        prompt, table = self.first.num_prompt_tokens, engine.cache.block_table(self.first.seq_id)
        for seq in self.made:
            has = (prompt, prompt, table) if seq in forks else (0, 0, ())
            got = seq.num_scheduled, seq.num_computed, engine.cache.block_table(seq.seq_id)
            expect(f"num_scheduled, num_computed and the table of sample {seq.sample_index}", got, has)
            expect(f"the tokens of sample {seq.sample_index}", seq.token_ids, self.first.token_ids)
        expect("the number of free blocks", engine.cache.num_free_blocks, self.free_blocks)
        expect(
            "the holders of the prompt's blocks",
            [engine.cache.block_manager.ref_count(b) for b in table],
            [1 + num_forks] * len(table),
        )


@pytest.mark.task("8.5", hint="With n = 1 there is no other sample: return an empty list, and change nothing.")
def test_a_request_for_one_sample_starts_no_other(chapter: Any) -> None:
    model = random_gpt2(n_layer=1, n_embd=3, n_positions=64)
    engine = chapter.Engine(model, PageBrainConfig.for_model(model, block_size=4, num_blocks=8, max_num_seqs=4))
    first = engine.add_request([1, 2, 3], 5)
    engine.scheduler.waiting.clear()
    engine.scheduler.running[:] = [first]
    expect("the other samples of a request with n = 1", list(engine.fork_samples(first)), [])
    expect("the number of running sequences", len(engine.scheduler.running), 1)
    expect("the number of waiting sequences", len(engine.scheduler.waiting), 0)


@pytest.mark.task("8.5", hint="Samples 1 .. n - 1 are forks behind the whole prompt, and run behind the first.")
@pytest.mark.parametrize(("n", "prompt"), [(1, 6), (2, 6), (4, 6), (3, 8), (3, 1)])
def test_samples_with_a_seat_are_forks(chapter: Any, n: int, prompt: int) -> None:
    Samples(chapter, n, seats=8, prompt=prompt).check(n - 1)


@pytest.mark.task(
    "8.5", hint="running is in order of arrival: the samples stand right behind the first, before later arrivals."
)
def test_samples_run_behind_the_first_and_before_later_requests(chapter: Any) -> None:
    Samples(chapter, 3, seats=8, running=4, earlier=1).check(2)
    Samples(chapter, 3, seats=8, running=3, earlier=2).check(2)


@pytest.mark.task("8.5", hint="A seat for each in running. The samples without one wait first in the queue, in order.")
@pytest.mark.parametrize(("seats", "running", "forks"), [(3, 1, 2), (4, 3, 1), (3, 3, 0), (1, 1, 0), (8, 4, 4)])
def test_samples_without_a_seat_wait(chapter: Any, seats: int, running: int, forks: int) -> None:
    Samples(chapter, 5, seats=seats, running=running).check(forks)


@pytest.mark.task("8.5", hint="Play the run: which sample computes what? The prompt is computed once, by the first one.")
def test_n_samples_cost_one_prefill_and_give_what_one_by_one_gives(chapter: Any, seed: int) -> None:
    model = random_gpt2(seed=seed)
    model.config.eos_token_id = None
    prompt = [random.Random(seed).randrange(90) for _ in range(14)]
    run = Poisoned(chapter, model, block_size=4, num_blocks=40, max_num_seqs=8, max_num_batched_tokens=16)
    run.engine.add_request(prompt, 6, n=4, temperature=1.0, seed=seed)
    history = run.run()
    expect("the tokens that were computed", sum(trace.num_tokens for trace in history), 14 + 4 * 5)
    samples = run.engine.samples["0"]
    for seq in samples:
        run.check(seq, prompt, f"the logits of sample {seq.sample_index}")
    texts = [seq.output_token_ids for seq in samples]
    assert len({tuple(text) for text in texts}) > 1, "all samples have the same tokens"
    assert any(trace.shared_blocks for trace in history), "no block had two holders"
    few = Poisoned(chapter, model, block_size=4, num_blocks=9, max_num_seqs=2, max_num_batched_tokens=16)
    few.engine.add_request(prompt, 6, n=4, temperature=1.0, seed=seed)
    few.run()
    what = "the samples' tokens with two seats and few blocks"
    assert [seq.output_token_ids for seq in few.engine.samples["0"]] == texts, f"{what} are others than with eight seats"


# 8.6 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.task("8.6", hint="Sum num_tokens over engine.history, for eight requests that come one after the other.")
def test_the_cost_of_a_cached_prompt_was_measured(chapter: Any, record_property: Callable[[str, object], None]) -> None:
    engine = hash_engine(block_size=16, num_blocks=16, max_model_len=64, max_num_batched_tokens=64)
    measured = 0
    for number in range(8):
        steps: list[StepTrace] = []
        engine.observers[:] = [steps.append]
        engine.add_request(list(range(48)), SamplingParams(temperature=0, max_tokens=1), str(number))
        run_all(engine)
        measured += sum(trace.num_tokens for trace in steps)
    hints = {
        "high": "Fewer are computed. A repeated prompt finds blocks, unless the engine is a new one.",
        "low": "More are computed. Look at the first row of a repeated prompt: where does it start?",
    }
    looks_like = {
        "A hit ends with a whole block. Look where a repeated prompt starts.": [48 + 7, 48 + 1],
        "This looks like eight prompts without a cache. Take one engine for all eight.": [8 * 48],
        "Count the tokens of the first request too.": [measured - 48],
    }
    assert_answer(chapter.answer_8_6, measured, 0.5, record_property, hints, looks_like)
