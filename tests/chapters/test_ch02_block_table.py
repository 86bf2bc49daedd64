"""Chapter 02: blocks in use and free, tables and slots, and the paged cache compared with Hugging Face's own."""

import random
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from chapters import TodoError
from chapters.aids.new_tensors import NewTensors
from pagebrain import PageBrainConfig
from pagebrain.block import BlockManager
from pagebrain.errors import BlockError, BlockTableError, OutOfBlocksError
from tests.support.answers import assert_answer
from tests.support.departures import assert_same, assert_same_tokens
from tests.support.hints import hint
from tests.support.models import POISON, hf_cache, hf_greedy, hf_logits, poison, random_gpt2

CHAPTER = "02"
TABLES = {0: 3, 7: 2, 1000: 1}
"""Sequence id -> blocks of the sequences that the tests of slots and pages look at."""
SCATTERED = [5, 2, 0, 9, 4, 7, 8, 1, 6, 3]
"""The order in which those tests' blocks are handed out: neither consecutive nor sorted."""


@pytest.fixture(autouse=True)
def another_situation(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another seed, blocks lie elsewhere and other sequences have the long tables."""
    dice = random.Random(seed)
    if seed:
        monkeypatch.setitem(globals(), "SCATTERED", dice.sample(SCATTERED, k=len(SCATTERED)))
        monkeypatch.setitem(globals(), "TABLES", dict(zip(TABLES, dice.sample([3, 2, 1], k=3))))


@pytest.fixture
def block_size(request: pytest.FixtureRequest, seed: int) -> int:
    """The sizes that a test names; with another seed, larger ones."""
    return int(request.param) + seed % 7


def place_in(error: Exception, call: Callable[..., Any]) -> traceback.FrameSummary | None:
    """The learner's line that raised, if it is to be found."""
    chapter_file = getattr(sys.modules.get(getattr(call, "__module__", "")), "__file__", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == chapter_file]
    return frames[-1] if frames else None


def said(error: Exception, call: Callable[..., Any]) -> str:
    """What was raised and, where it can be told, by which line of the learner's file."""
    words = f"{type(error).__name__}: {error}".removesuffix(": ")
    place = place_in(error, call)
    return words if place is None else f"{words} (line {place.lineno}: {place.line})"


def called(what: str, expected: str, call: Callable[..., Any], *args: Any) -> Any:
    """What ``call(*args)`` returns; an exception that it raises is told with the situation that it was raised in."""
    try:
        return call(*args)
    except TodoError:
        raise
    except Exception as error:
        # Not "from error": of a chain the course tool tells the learner's own exception, without this situation.
        raise AssertionError(f"{what} raised {said(error, call)}; expected {expected}") from None


WHEN: dict[type[Exception], str] = {
    OutOfBlocksError: "Raise OutOfBlocksError if the call is correct, but more blocks are asked for than are free.",
    BlockError: "Raise BlockError if the call is a mistake of the caller: a count below 0, or a block that cannot be freed.",
    BlockTableError: "Raise BlockTableError if the table does not cover the tokens, or start or count is negative.",
}
"""Hints for a learner who raises another error on purpose."""


def refuses(error: type[Exception], what: str, call: Callable[..., Any], *args: Any) -> None:
    """``call(*args)`` raises ``error``; anything else is said in words."""
    try:
        got = call(*args)
    except error:
        return
    except TodoError:
        raise
    except Exception as other:
        place = place_in(other, call)
        on_purpose = place is not None and (place.line or "").startswith("raise ")
        with hint(WHEN[error]) if on_purpose else nullcontext():
            raise AssertionError(f"{what} must raise {error.__name__}, but raised {said(other, call)}") from None
    raise AssertionError(f"{what} must raise {error.__name__}, but returned {got!r}")


class Blocks:
    """The chapter's block manager, and beside it the set of blocks that it must know to be in use."""

    def __init__(self, chapter: Any, num_blocks: int) -> None:
        self.manager = chapter.BlockManager(PageBrainConfig(num_blocks=num_blocks, device="cpu"))
        self.ids = range(num_blocks)
        self.held: set[int] = set()

    def allocate(self, *count: int) -> list[int]:
        call, number = f"allocate({', '.join(map(str, count))})", count[0] if count else 1
        situation = f"{call} with {len(self.ids) - len(self.held)} of {len(self.ids)} blocks free"
        got = called(situation, f"a list of {number} blocks", self.manager.allocate, *count)
        assert isinstance(got, list), f"{call} returned a {type(got).__name__}, expected a list of block ids"
        assert len(got) == number, f"{call} returned {len(got)} blocks: {got}"
        assert len(set(got)) == number and set(got) <= set(self.ids), f"{call} returned {got}, of blocks 0 to {self.ids[-1]}"
        in_use = sorted(self.held & set(got))
        assert not in_use, f"{call} returned {got}, but blocks {in_use} are in use"
        self.held |= set(got)
        self.check(f"after {call} returned {got}")
        return list(got)

    def free(self, block_ids: Any, names: Sequence[int]) -> None:
        """Frees ``block_ids``, an iterable of ``names``."""
        call = f"free({list(names)}), given as a {type(block_ids).__name__}"
        called(f"{call}, with {sorted(self.held)} in use,", "no error", self.manager.free, block_ids)
        self.held -= set(names)
        self.check(f"after {call}")

    def refuses(self, error: type[Exception], what: str, call: Callable[..., Any], *args: Any) -> None:
        refuses(error, what, call, *args)
        self.check(f"after {what}, which was refused")

    def refuses_to_free(self, wrong: list[int], in_use: str, kind: Callable[[list[int]], Any]) -> None:
        what = f"free({wrong}) with {in_use} in use"
        with hint(self.reason_to_refuse(wrong)):
            refuses(BlockError, what, self.manager.free, kind(wrong))
        self.check(f"after {what}, which was refused")

    def reason_to_refuse(self, wrong: list[int]) -> str:
        """A hint for a call of ``free`` that was not refused as it must be."""
        if set(wrong) - set(self.ids):
            return "Block ids run from 0 to num_blocks - 1. Check for ids below 0 too."
        if set(wrong) - self.held:
            return "A block that is free already cannot be freed. Look the block up among those in use."
        return "A block may be listed once only in a call of free."

    def check(self, when: str) -> None:
        manager, free = self.manager, sorted(set(self.ids) - self.held)
        assert sorted(manager.free_blocks) == free, f"{when}: free_blocks are {sorted(manager.free_blocks)}, expected {free}"
        assert manager.num_free_blocks == len(free), f"{when}: num_free_blocks is {manager.num_free_blocks} of {len(free)}"
        for block_id in self.ids:
            count, expected = manager.ref_count(block_id), int(block_id in self.held)
            assert count == expected, f"{when}: ref_count({block_id}) is {count}, expected {expected}"


@pytest.mark.task(
    "2.1", hint="allocate changes two records: a block leaves the free blocks, and is in use. count may be 0 or all blocks."
)
def test_every_block_is_handed_out_once(chapter: Any) -> None:
    for counts in ([(3,), (), (0,), (3,)], [(7,), (0,)], [(0,), (6,), ()]):
        blocks = Blocks(chapter, 7)
        for count in counts:
            blocks.allocate(*count)
        assert len(blocks.held) == 7


@pytest.mark.task("2.1", hint="free changes two records: a block is free again, and is no longer in use.")
def test_blocks_that_are_freed_are_free_again(chapter: Any) -> None:
    blocks = Blocks(chapter, 6)
    first = blocks.allocate(1)
    blocks.free(list(first), first)
    taken = blocks.allocate(6)  # the one that was given back is among them
    blocks.free(taken[1:4], taken[1:4])
    blocks.allocate(3)


@pytest.mark.task("2.1", hint="Check the count before you take the first block.")
def test_a_refused_allocation_changes_nothing(chapter: Any) -> None:
    blocks = Blocks(chapter, 5)
    blocks.refuses(OutOfBlocksError, "allocate(6) with 5 blocks free", blocks.manager.allocate, 6)
    blocks.allocate(2)
    for count in (4, 5, 10**6):
        blocks.refuses(OutOfBlocksError, f"allocate({count}) with 3 blocks free", blocks.manager.allocate, count)
    blocks.allocate(3)
    blocks.refuses(OutOfBlocksError, "allocate() with no block free", blocks.manager.allocate)
    blocks.allocate(0)


@pytest.mark.task("2.1", hint="A count below 0 is a mistake of the caller: raise BlockError before anything changes.")
def test_a_negative_count_is_refused(chapter: Any) -> None:
    blocks = Blocks(chapter, 5)
    for taken in (0, 3, 2):
        blocks.allocate(taken)
        for count in (-1, -2, -5):
            what = f"allocate({count}) with {5 - len(blocks.held)} blocks free"
            blocks.refuses(BlockError, what, blocks.manager.allocate, count)


@pytest.mark.task("2.1", hint="free takes any iterable, and a generator can be read only once: make a list of it first.")
@pytest.mark.parametrize("kind", [list, tuple, set, iter, lambda ids: (block_id for block_id in ids)])
def test_any_iterable_of_blocks_can_be_freed(chapter: Any, kind: Callable[[list[int]], Any]) -> None:
    blocks = Blocks(chapter, 6)
    taken = blocks.allocate(5)
    blocks.free(kind(taken[1:4]), taken[1:4])
    blocks.free(kind([]), [])
    blocks.free(kind(taken[:1]), taken[:1])
    blocks.allocate(5)


@pytest.mark.task("2.1", hint="Check all the blocks of the call before you free the first one.")
@pytest.mark.parametrize("kind", [list, iter])
def test_a_refused_free_changes_nothing(chapter: Any, kind: Callable[[list[int]], Any]) -> None:
    blocks = Blocks(chapter, 6)
    taken = blocks.allocate(6)
    for wrong in ([-1], [6], [-6], [7], [taken[0], 6], [taken[0], taken[1], -1], [taken[2], taken[2]], taken + taken[:1]):
        blocks.refuses_to_free(wrong, "all 6 blocks", kind)
    blocks.free(taken[:2], taken[:2])
    gone, held = taken[0], taken[3]
    for wrong in ([gone], [held, gone], [gone, held], [held, taken[4], held], [gone, gone]):
        blocks.refuses_to_free(wrong, f"{sorted(taken[2:])}", kind)
    blocks.free(taken[2:], taken[2:])


@pytest.mark.task("2.1", hint="The list that allocate returns, and the one that free is given, belong to the caller.")
def test_lists_are_the_callers(chapter: Any) -> None:
    blocks = Blocks(chapter, 3)
    for count in (2, 1):
        returned = blocks.manager.allocate(count)
        blocks.held |= set(returned)
        returned += [2, 2]
        blocks.check("after the caller changed the list that allocate returned")
        returned.clear()
        blocks.check("after the caller emptied the list that allocate returned")
    blocks.free([*blocks.held], tuple(blocks.held))
    first = blocks.manager.allocate(2)
    kept, second = list(first), blocks.manager.allocate()
    assert first == kept, f"the list {kept} that allocate returned had changed to {first} after the next call of allocate"
    blocks.held |= {*first, *second}
    given = [2, 0, 1]
    blocks.free(given, tuple(given))
    assert given == [2, 0, 1], f"free changed the list that it was given from [2, 0, 1] to {given}"
    given.clear()
    blocks.check("after the caller emptied the list that free was given")


@pytest.mark.task("2.1", hint="Follow one block through several calls. At any time it is either free or in use.")
def test_no_block_is_lost_or_given_twice_in_a_long_life(chapter: Any, seed: int) -> None:
    dice = random.Random(seed)
    blocks, other = Blocks(chapter, 9), Blocks(chapter, 9)  # two managers must share nothing
    for _ in range(200):
        if dice.random() < 0.5:
            blocks.allocate(dice.randint(0, 9 - len(blocks.held)))
        else:
            gone = dice.sample(sorted(blocks.held), dice.randint(0, len(blocks.held)))
            blocks.free(gone, gone)
    other.check("although only another manager was used")


def make_cache(chapter: Any, block_size: int, num_blocks: int = 10, kind: Any = None, **settings: Any) -> Any:
    """A cache over the engine's block manager, which hands out first what was freed first: here, ``SCATTERED``."""
    base = random_gpt2(n_layer=3, n_embd=12, **settings)
    config = PageBrainConfig.for_model(base, block_size=block_size, num_blocks=num_blocks)
    manager = BlockManager(config)
    manager.allocate(num_blocks)
    manager.free([block_id for block_id in SCATTERED if block_id < num_blocks])
    return (kind or chapter.PagedCache)(manager, config)


def cache_with_tables(chapter: Any, block_size: int, kind: Any = None, **settings: Any) -> Any:
    """A cache with the tables of ``TABLES``. If ``grow``, which is task 2.3, is wrong, the tables are set without it."""
    cache = make_cache(chapter, block_size, kind=kind, **settings)
    try:
        for seq_id, num_blocks in TABLES.items():
            cache.grow(seq_id, num_blocks * block_size)
        tables = [cache.block_table(seq_id) for seq_id in TABLES]
        held = [block_id for table in tables for block_id in table]
        if [len(table) for table in tables] == list(TABLES.values()) and len(set(held)) == len(held):
            return cache
    except Exception:  # a stub, or a mistake in it: its own tests say so
        pass
    cache = make_cache(chapter, block_size, kind=kind, **settings)
    for seq_id, num_blocks in TABLES.items():
        cache._tables[seq_id] = cache.block_manager.allocate(num_blocks)
    return cache


def give_other_blocks(cache: Any, seq_id: int, num_blocks: int) -> None:
    """Free a sequence and give it other blocks. If ``free`` or ``grow``, which are task 2.3, is wrong, without them."""
    try:
        cache.free(seq_id)
        cache.grow(seq_id, num_blocks * cache.block_size)
        if len(set(cache.block_table(seq_id))) == num_blocks == len(cache.block_table(seq_id)):
            return
    except Exception:  # a stub, or a mistake in it: its own tests say so
        pass
    cache._tables[seq_id] = cache.block_manager.allocate(num_blocks)


def assert_slots(cache: Any, seq_id: int, start: int, count: int) -> None:
    """One call of ``slots`` for tokens that the table covers."""
    table, block_size = cache.block_table(seq_id), cache.block_size
    covered = len(table) * block_size
    expected = [table[token // block_size] * block_size + token % block_size for token in range(start, start + count)]
    call = f"slots(seq {seq_id}, start {start}, count {count}) with block table {table} and block size {block_size}"
    situation = f"{call}, which covers {covered} tokens,"
    got = called(situation, str(expected), cache.slots, seq_id, start, count)
    assert isinstance(got, list), f"{call} is of type {type(got).__name__}, expected a list"
    assert len(got) == count, f"{call} gives {len(got)} slots, expected {count}"
    for token, (slot, wanted) in enumerate(zip(got, expected, strict=True), start):
        block = f"block {wanted // block_size} at offset {wanted % block_size}"
        assert slot == wanted, f"{call}: token {token} lies in {block}, which is slot {wanted}, got slot {slot}"
        assert type(slot) is int, f"{call}: slots are Python ints, got {slot!r} of type {type(slot).__name__}"


@pytest.mark.task(
    "2.2", hint="A quotient says which entry of the table has the token's block; a remainder is the offset in this block."
)
@pytest.mark.parametrize("block_size", [4, 1, 5, 12, 24], indirect=True)
def test_a_slot_is_found_through_the_table_of_its_sequence(chapter: Any, block_size: int) -> None:
    cache = cache_with_tables(chapter, block_size)
    for seq_id, num_blocks in TABLES.items():
        covered = num_blocks * block_size
        for start in range(0, covered, max(1, block_size // 4)):
            for count in range(0, covered - start, max(1, block_size // 5)):  # the last slot of the table is the next test's
                assert_slots(cache, seq_id, start, count)


@pytest.mark.task("2.2", hint="A table of n blocks covers n * block_size tokens. The last of them has a slot too.")
@pytest.mark.parametrize("block_size", [4, 1, 3, 5, 12, 16, 24], indirect=True)
def test_all_slots_of_a_table_can_be_asked_for(chapter: Any, block_size: int) -> None:
    cache = cache_with_tables(chapter, block_size)
    for seq_id, num_blocks in TABLES.items():
        covered = num_blocks * block_size
        for start in range(covered + 1):
            assert_slots(cache, seq_id, start, covered - start)


def assert_slots_refused(cache: Any, seq_id: int, asked: Sequence[tuple[int, int]]) -> None:
    """``slots`` refuses each ``(start, count)``, and changes nothing."""
    before = cache.num_free_blocks, [cache.block_table(known) for known in TABLES]
    table, block_size = cache.block_table(seq_id), cache.block_size
    whose = f"block table {table}" if seq_id in TABLES else "no block table (the sequence is unknown)"
    for start, count in asked:
        what = f"slots(seq {seq_id}, start {start}, count {count}) with {whose} and block size {block_size}, "
        what += f"which covers {len(table) * block_size} tokens,"
        refuses(BlockTableError, what, cache.slots, seq_id, start, count)
    after = cache.num_free_blocks, [cache.block_table(known) for known in TABLES]
    assert after == before, (
        f"slots must only read: free blocks and tables were {before}, and are {after} after refused calls"
    )


@pytest.mark.task(
    "2.2", hint="Compare the last token of the call, start + count - 1, with the last of the table, n * block_size - 1."
)
@pytest.mark.parametrize("block_size", [4, 1], indirect=True)
def test_slots_past_the_table_are_refused(chapter: Any, block_size: int) -> None:
    cache = cache_with_tables(chapter, block_size)
    for seq_id, num_blocks in TABLES.items():
        end = num_blocks * block_size
        asked = [(0, end + 1), (end - 1, 2), (end, 1), (end + 1, 1), (end, 50), (500, 1)]
        assert_slots_refused(cache, seq_id, asked)
        with hint("A count of 0 is refused too if start is past the end of the table: start + count decides."):
            assert_slots_refused(cache, seq_id, [(end + 1, 0), (end + block_size, 0), (500, 0)])


@pytest.mark.task(
    "2.2", hint="A sequence that is not in the cache has no table. Treat it as one whose table covers no tokens."
)
def test_slots_of_an_unknown_sequence_are_refused(chapter: Any) -> None:
    cache = cache_with_tables(chapter, 4)
    known = cache.seq_ids
    for seq_id in (1, -1, 2):
        assert_slots_refused(cache, seq_id, [(0, 1), (3, 2), (1, 0)])
        with hint("A sequence without a table covers 0 tokens, so slots(seq, 0, 0) returns []."):
            assert_slots(cache, seq_id, 0, 0)
    with hint("A call that is refused changes nothing: it leaves no empty table behind."):
        assert cache.seq_ids == known, f"seq_ids was {known}; after calls that were refused it is {cache.seq_ids}"


@pytest.mark.task(
    "2.2", hint="Check for a negative start or count. Python takes a negative index from the end of the table."
)
@pytest.mark.parametrize("block_size", [4, 1], indirect=True)
def test_a_negative_start_or_count_is_refused(chapter: Any, block_size: int) -> None:
    cache = cache_with_tables(chapter, block_size)
    for seq_id in TABLES:
        assert_slots_refused(cache, seq_id, [(-1, 1), (-1, 2), (-block_size, 1), (-500, 3), (1, -1), (0, -1), (-2, -1)])


@pytest.mark.task("2.2", hint="Read the table in each call: a sequence may have grown, or have other blocks than before.")
def test_slots_follow_the_table_as_it_is_now(chapter: Any) -> None:
    cache = make_cache(chapter, 4)
    before: set[int] = set()
    for num_blocks in (1, 2, 2):
        for seq_id in (0, 7):
            give_other_blocks(cache, seq_id, num_blocks)
            assert_slots(cache, seq_id, 0, 4 * num_blocks)
            before.update(cache.block_table(seq_id))
    assert len(before) > 4


def state(cache: Any, *seq_ids: int) -> dict[str, Any]:
    """What may change, or must not: the tables, the block manager's two records, and the known sequences."""
    manager = cache.block_manager
    return {
        "block tables": {seq_id: cache.block_table(seq_id) for seq_id in seq_ids},
        "free blocks": sorted(manager.free_blocks),
        "blocks in use": [block_id for block_id in range(manager.num_blocks) if manager.ref_count(block_id)],
        "seq_ids": sorted(cache.seq_ids),
    }


def assert_grows(cache: Any, seq_id: int, num_tokens: int) -> None:
    """One ``grow``: the table begins as it was and has the blocks that it needs; no other table changes."""
    others = [other for other in cache.seq_ids if other != seq_id]
    before, theirs, free = cache.block_table(seq_id), state(cache, *others)["block tables"], cache.num_free_blocks
    needed = max(len(before), -(-num_tokens // cache.block_size))
    call = f"grow(seq {seq_id}, {num_tokens} tokens) with block size {cache.block_size}"
    whose = f"for a sequence whose table is {before}" if before else "for a sequence without a table"
    situation = f"{call}, {whose}, with {free} blocks free,"
    called(situation, f"a table of {needed} blocks", cache.grow, seq_id, num_tokens)
    after = cache.block_table(seq_id)
    assert len(after) == needed, (
        f"{call}: the table has {len(after)} blocks, expected {needed}; it was {before}, and is {after}"
    )
    assert after[: len(before)] == before, f"{call}: the table must begin as it was, {before}, but is {after}"
    now = state(cache, *others)["block tables"]
    assert now == theirs, f"{call}: the tables of other sequences changed from {theirs} to {now}"
    shared = sorted(set(after) & {block_id for table in now.values() for block_id in table})
    assert not shared, f"{call}: blocks {shared} are in another sequence's table too"
    taken = free - cache.num_free_blocks
    assert taken == needed - len(before), (
        f"{call}: took {taken} blocks from the block manager, expected {needed - len(before)}"
    )
    manager = cache.block_manager
    unknown = [block_id for block_id in after if not manager.ref_count(block_id)]
    with hint("Take blocks with block_manager.allocate: the manager keeps a record of the blocks in use too."):
        assert not unknown, f"after {call}: blocks {unknown} are in the table, but the block manager says that they are free"


@pytest.mark.task("2.3", hint="A new sequence has no table yet. It gets one with the blocks that num_missing_blocks counts.")
@pytest.mark.parametrize("num_tokens", [1, 4, 5])
def test_a_sequence_without_a_table_gets_one(chapter: Any, num_tokens: int) -> None:
    cache = make_cache(chapter, 4)
    for seq_id in (0, 7):
        assert_grows(cache, seq_id, num_tokens)


@pytest.mark.task("2.3", hint="Allocate the blocks that are missing, not all that are needed, and append them to the table.")
@pytest.mark.parametrize("block_size", [1, 3, 4], indirect=True)
def test_a_table_has_the_blocks_that_its_tokens_need(chapter: Any, block_size: int) -> None:
    for num_tokens in range(1, 3 * block_size + 2):
        assert_grows(make_cache(chapter, block_size), 0, num_tokens)
    cache = make_cache(chapter, block_size)
    for num_tokens in range(1, 3 * block_size + 1):  # token by token, the sequences taking turns
        for seq_id in (0, 5, 1000):
            assert_grows(cache, seq_id, num_tokens)
    for num_tokens in (3 * block_size, block_size, 1, 0):  # covered already
        assert_grows(cache, 5, num_tokens)
    assert_grows(cache, 7, 0)  # a sequence without a table: no block, and then an empty table or none
    assert_grows(cache, 0, 4 * block_size)  # the last block that there is


@pytest.mark.task(
    "2.3", hint="grow gets all the blocks that it needs, or it changes nothing: no block taken, no table made."
)
def test_a_refused_growth_changes_nothing(chapter: Any) -> None:
    cache = make_cache(chapter, 4, num_blocks=4)
    assert_grows(cache, 0, 5)
    for seq_id, num_tokens in ((0, 17), (3, 9), (3, 1000)):  # two blocks are free
        before = state(cache, 0, 3)
        what = f"grow({seq_id}, {num_tokens}) with {cache.num_free_blocks} free blocks of 4 slots"
        refuses(OutOfBlocksError, what, cache.grow, seq_id, num_tokens)
        for name, now in state(cache, 0, 3).items():
            assert now == before[name], f"{what} was refused, but {name} changed from {before[name]} to {now}"
    assert_grows(cache, 3, 8)
    refuses(OutOfBlocksError, "grow(0, 9) with no block free", cache.grow, 0, 9)
    assert_grows(cache, 0, 8)  # covered already: it needs no block


@pytest.mark.task(
    "2.3", hint="free gives every block of this sequence to the block manager's free, and removes this table only."
)
def test_free_gives_all_blocks_back_and_forgets_the_table(chapter: Any) -> None:
    cache = make_cache(chapter, 4)
    for _ in range(5):  # takes more blocks in all than there are: it fails if freed blocks are lost
        for seq_id, num_tokens in ((0, 9), (7, 8), (2, 1)):
            assert_grows(cache, seq_id, num_tokens)
        for seq_id, num_held in ((7, 4), (0, 1), (2, 0)):
            others = {other: cache.block_table(other) for other in (0, 7, 2) if other != seq_id}
            situation = f"free(seq {seq_id}), whose table is {cache.block_table(seq_id)},"
            called(situation, "no error", cache.free, seq_id)
            now = state(cache, *others)
            free, table = len(now["free blocks"]), cache.block_table(seq_id)
            assert free == 10 - num_held, f"after free({seq_id}) {free} of 10 blocks are free, expected {10 - num_held}"
            assert table == () and seq_id not in now["seq_ids"], f"after free({seq_id}) its table is still there: {table}"
            in_use = sorted(block_id for other in others.values() for block_id in other)
            with hint("Call the block manager's free: it keeps its own record of the blocks in use."):
                assert now["blocks in use"] == in_use, (
                    f"after free({seq_id}) the tables have blocks {in_use}, but ref_count says {now['blocks in use']}"
                )
            assert now["block tables"] == others, f"free({seq_id}) changed other tables: {others} to {now['block tables']}"
    assert_grows(cache, 0, 40)


@pytest.mark.task(
    "2.3", hint="Only block ids move. Old keys and values need no clearing: a slot is written before it is read."
)
def test_growing_and_freeing_leave_the_pools_as_they_are(chapter: Any) -> None:
    cache = make_cache(chapter, 4)
    poison(cache)
    for num_tokens in (3, 9):
        cache.grow(0, num_tokens)
        cache.grow(7, num_tokens)
    cache.free(0)
    for name, pools in (("key_pools", cache.key_pools), ("value_pools", cache.value_pools)):
        changed = sum(int((pool != POISON).sum()) for pool in pools)
        assert not changed, f"{changed} numbers of {name} changed, but grow and free must not write to the pools"


@pytest.mark.task(
    "2.3", hint="A sequence may end without a table: it never grew, or it was freed before. Then nothing happens."
)
def test_free_of_a_sequence_without_a_table_changes_nothing(chapter: Any) -> None:
    cache = make_cache(chapter, 4)
    called("free(seq 99), a sequence without a table, in an empty cache,", "no error", cache.free, 99)
    for _ in range(2):
        for seq_id, num_tokens in ((0, 9), (7, 8), (2, 1)):
            assert_grows(cache, seq_id, num_tokens)
        called("free(seq 7), which has a table,", "no error", cache.free, 7)
        for seq_id in (7, 99, 1):  # the first was freed just now
            before = state(cache, 0, 7, 2, seq_id)
            called(f"free(seq {seq_id}), a sequence without a table,", "no error", cache.free, seq_id)
            for name, now in state(cache, 0, 7, 2, seq_id).items():
                assert now == before[name], (
                    f"free(seq {seq_id}), a sequence without a table, must change nothing, "
                    f"but the {name} changed from {before[name]} to {now}"
                )


def filled_cache(chapter: Any, seed: int, block_size: int, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """A cache with the tables of ``TABLES`` and a different number in every place of its pools, and a copy of the pools."""

    class WithSlots(chapter.PagedCache):  # type: ignore[misc]
        """Has the reference's ``slots``, which is task 2.2."""

        def slots(self, seq_id: int, start: int, count: int) -> list[int]:
            table = self.block_table(seq_id)
            return [table[t // block_size] * block_size + t % block_size for t in range(start, start + count)]

    cache = cache_with_tables(chapter, block_size, WithSlots, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for pool in (cache.key_pools, cache.value_pools):
        for layer_pool in pool:
            layer_pool.copy_(torch.randn(layer_pool.shape, generator=generator, dtype=torch.float64))
    return cache, {"keys": torch.stack([*cache.key_pools]), "values": torch.stack([*cache.value_pools])}


def content_of(found: Tensor, pools: dict[str, Tensor]) -> str:
    """Where a token's K or V ``[num_heads, head_dim]`` comes from, in words; empty if it is nowhere in the pools."""
    for name, pool in pools.items():
        same = (pool == found).all(dim=-1).all(dim=-1).nonzero().tolist()
        if same:
            layer, block_id, offset = same[0]
            return f"the {name[:-1].upper()} in layer {layer}, block {block_id}, offset {offset}"
    return ""


def assert_gathers(cache: Any, pools: dict[str, Tensor], layer: int, seq_id: int, num_tokens: int) -> None:
    """One ``gather``; of a wrong row it is said what it is instead."""
    table, block_size = cache.block_table(seq_id), cache.block_size
    call = (
        f"gather(layer={layer}, seq_id={seq_id}, num_tokens={num_tokens}) with block table {table}, block size {block_size}"
    )
    got = called(call, f"keys and values of {num_tokens} tokens", cache.gather, layer, seq_id, num_tokens)
    assert isinstance(got, (tuple, list)) and len(got) == 2, (
        f"{call} returned {type(got).__name__}, expected keys and values"
    )
    for (name, pool), mine in zip(pools.items(), got, strict=True):
        expected = torch.stack([pool[layer, table[t // block_size], t % block_size] for t in range(num_tokens)])

        if isinstance(mine, Tensor) and mine.shape != expected.shape and mine.shape[1:] != expected.shape[1:]:
            with hint("In key_pools[layer], axis 0 is the block, axis 1 the offset in it. Join these two; the others stay."):
                assert_shape(mine, expected, f"{call}: the {name}")

        def instead(place: tuple[int, ...], mine: Tensor = mine, name: str = name) -> str:
            found = content_of(mine[place[0]], pools)
            wanted = f"the {name[:-1].upper()} in layer {layer}"
            return f"; wanted is {wanted} from there, got {found}" if found else ""

        assert_pages(mine, expected, f"{call}: the {name}", table, block_size, instead)
        assert mine.dtype == pool.dtype, f"{call}: the {name} have dtype {mine.dtype}, and the pool {pool.dtype}"


def assert_shape(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, f"{what} have shape {list(got.shape)}, expected {list(expected.shape)}"


@pytest.mark.task("2.4", hint="Keys come from key_pools[layer], values from value_pools[layer].")
def test_one_full_block_is_gathered_from_its_layer_of_both_pools(chapter: Any, seed: int) -> None:
    cache, pools = filled_cache(chapter, seed, 4, torch.float64)
    for layer in range(3):
        assert_gathers(cache, pools, layer, 1000, 4)  # one block, and all of it


@pytest.mark.task("2.4", hint="The pages come in the order of the table, wherever the blocks are in the pool.")
@pytest.mark.parametrize("block_size", [4, 1, 3, 12])
def test_full_blocks_are_gathered_in_the_order_of_the_table(chapter: Any, seed: int, block_size: int) -> None:
    cache, pools = filled_cache(chapter, seed, block_size, torch.float64)
    for seq_id, num_blocks in TABLES.items():
        assert_gathers(cache, pools, 1, seq_id, num_blocks * block_size)


@pytest.mark.task("2.4", hint="Return num_tokens tokens: the last page may be half empty, and the table may cover more.")
@pytest.mark.parametrize("block_size", [4, 1, 5])
def test_a_sequence_is_gathered_in_order_wherever_it_lies(chapter: Any, seed: int, block_size: int) -> None:
    for dtype in (torch.float64, torch.float32):
        cache, pools = filled_cache(chapter, seed, block_size, dtype)
        for seq_id, layer in ((seq_id, layer) for seq_id in TABLES for layer in range(3)):
            for num_tokens in range(1, len(cache.block_table(seq_id)) * block_size + 1):
                assert_gathers(cache, pools, layer, seq_id, num_tokens)
        for name, now in (("key_pools", cache.key_pools), ("value_pools", cache.value_pools)):
            was = pools[name.replace("_pools", "s")]
            assert torch.equal(torch.stack([*now]), was), f"gather changed the cache's {name}: it must only read"


@pytest.mark.task("2.4", hint="Copy the sequence's own pages of one layer, and no more of the pool.")
def test_gathering_copies_no_more_than_the_pages_of_one_layer(chapter: Any, seed: int) -> None:
    cache, pools = filled_cache(chapter, seed, 4, torch.float64)
    assert_gathers(cache, pools, 1, 1000, 3)
    page = 4 * pools["keys"][0, 0, 0].numel()
    table = cache.block_table(1000)
    with NewTensors() as made:
        cache.gather(1, 1000, 3)
    pool, own = pools["keys"][0].numel(), len(table) * page
    with hint("Choose the layer first, then the blocks." if made.largest < pool else "Choose the blocks before you copy."):
        assert made.largest <= own, (
            f"gather made a tensor of {made.largest} numbers. The sequence's own pages of one layer have {own} "
            f"(blocks: {len(table)}, {page} numbers each); a layer's whole pool has {pool}"
        )


@pytest.mark.task("2.4", hint="Read the table and the pools in each call. Keep nothing of an earlier call: both may change.")
def test_what_is_gathered_is_what_lies_there_now(chapter: Any, seed: int) -> None:
    cache, pools = filled_cache(chapter, seed, 4, torch.float64)
    assert_gathers(cache, pools, 1, 0, 4)
    for pool in (cache.key_pools, cache.value_pools):
        pool[1] += 100  # a write
    pools = {"keys": torch.stack([*cache.key_pools]), "values": torch.stack([*cache.value_pools])}
    assert_gathers(cache, pools, 1, 0, 4)
    before = cache.block_table(0)
    give_other_blocks(cache, 0, len(before))
    assert cache.block_table(0)[0] != before[0]
    assert_gathers(cache, pools, 1, 0, 4)


def assert_pages(
    got: Tensor,
    expected: Tensor,
    what: str,
    table: Sequence[int],
    block_size: int,
    instead: Callable[[tuple[int, ...]], str] | None = None,
) -> None:
    """Rows of tokens ``[num_tokens, ..., head_dim]``; the message names block and slot of the first wrong one."""

    def slot(place: tuple[int, ...]) -> str:
        page, offset = divmod(place[0], block_size)
        where = f"page {page}, offset {offset} is block {table[page]}, slot {table[page] * block_size + offset}"
        more = ", which was never written" if got[place] == POISON else ""
        return where + more + (instead(place) if instead is not None else "")

    axes = ("token", "head", "dim") if expected.ndim == 3 else ("token", "layer", "head", "dim")
    assert_same(got, expected, what=what, axes=axes, where=slot)


def pages_of(cache: Any, seq_id: int) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """A sequence's table, and what its pages hold, ``[num_slots, num_layers, num_heads, head_dim]``."""
    table = cache.block_table(seq_id)
    pools = {"keys": cache.key_pools, "values": cache.value_pools}
    pages = {name: torch.stack([pool[list(table)].flatten(0, 1) for pool in each], dim=1) for name, each in pools.items()}
    return table, pages


def assert_holds(
    kept: tuple[tuple[int, ...], dict[str, Tensor]], base: Any, text: list[int], name: str, block_size: int
) -> None:
    """The pages hold the K and V of ``text`` that Hugging Face has in its own cache."""
    table, pages = kept
    for kind, expected in hf_cache(base, text).items():
        assert_pages(pages[kind][: len(text)], expected, f"{name}: the cached {kind}", table, block_size)


@pytest.mark.task(
    "2.4", hint="A prompt may come in pieces. A piece sees all the tokens that were cached before it, in order."
)
@pytest.mark.parametrize("block_size", [1, 4, 5])
def test_prompts_computed_in_pieces_equal_hugging_face(chapter: Any, seed: int, block_size: int) -> None:
    base = random_gpt2(seed=seed, n_layer=3, scale_attn_by_inverse_layer_idx=True)
    texts = torch.randint(97, (3, 15), generator=torch.Generator().manual_seed(seed)).tolist()
    cuts = {0: [0, 4, 9, 15], 1: [0, 5, 6, 7], 2: [0, 8, 15, 15]}  # sequence -> tokens cached after each step
    config = PageBrainConfig.for_model(base, block_size=block_size, num_blocks=60 // block_size)
    cache = chapter.PagedCache(BlockManager(config), config)
    poison(cache)
    for step in range(3):
        steps = {seq_id: (cut[step], cut[step + 1]) for seq_id, cut in cuts.items() if cut[step + 1] > cut[step]}
        for seq_id, (_, stop) in steps.items():
            cache.grow(seq_id, stop)
        rows = chapter.Rows(cache, [(seq_id, start, texts[seq_id][start:stop]) for seq_id, (start, stop) in steps.items()])
        attend, every = chapter.attend_gathered(base, cache, rows), torch.arange(len(rows.token_ids))
        logits = chapter.forward(base, rows.token_ids, rows.positions, attend, every)
        for (seq_id, (start, stop)), own in zip(steps.items(), logits.split(rows.counts), strict=True):
            name = f"sequence {seq_id}, tokens {start} to {stop - 1} in step {step}"
            text = texts[seq_id][:stop]
            assert_holds(pages_of(cache, seq_id), base, text, name, block_size)
            expected = hf_logits(base, text)[start:]
            assert_same(own, expected, what=f"{name}: the logits", axes=("row", "vocabulary entry"))


@pytest.mark.task(
    "2.4", hint="All parts of the chapter are used here. Token, layer, block and slot in the message say where to look."
)
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_the_paged_batch_computes_what_hugging_face_computes(
    chapter: Any, seed: int, monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    ended: dict[int, Any] = {}
    caches: list[Any] = []

    class Watched(chapter.PagedCache):  # type: ignore[misc]
        """Slots that were never written hold poison, and so do those of freed blocks; a sequence's pages are kept."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            poison(self)
            caches.append(self)

        def free(self, seq_id: int) -> None:
            ended[seq_id] = pages_of(self, seq_id)
            super().free(seq_id)
            for pool in (*self.key_pools, *self.value_pools):
                pool[list(ended[seq_id][0])] = POISON

    monkeypatch.setattr(chapter, "PagedCache", Watched)
    prompts = [[1, 2, 3], [7, 8] * 8 + [9], [40, 41, 42, 43], list(range(15)), list(range(16)), [95]]
    base = random_gpt2(seed=seed, tie_word_embeddings=False)
    end = hf_greedy(base, prompts[1], 2)[-1]
    base.config.eos_token_id = end
    scores: list[list[Tensor]] = [[] for _ in prompts]
    answers = chapter.generate(
        base, prompts, 18, lambda index, logits: scores[index].append(logits.clone()), block_size=block_size
    )
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        # Hugging Face is given the text that was generated here, so that the first mistake is named.
        assert_holds(ended[index], base, prompt + answer[:-1], f"prompt {index}", block_size)
        what = f"prompt {index}: the logits"
        expected = hf_logits(base, prompt + answer)[len(prompt) - 1 : -1]
        assert_same(torch.stack(scores[index]), expected, what=what, axes=("output token", "vocabulary entry"))
        assert_same_tokens(answer, hf_greedy(base, prompt, 18, end), what=f"prompt {index}: the answer")
    cache, total = caches[0], caches[0].block_manager.num_blocks
    assert cache.seq_ids == (), f"all sequences have ended, but {cache.seq_ids} still have a table"
    assert cache.num_free_blocks == total, (
        f"all sequences have ended, but {cache.num_free_blocks} of {total} blocks are free"
    )


NUM_PROMPT = [2, 6, 3, 6, 2, 9]
NUM_ANSWER = [211, 266, 191, 71, 178, 162]
"""Tokens of the notebook's six stories."""


def blocks_at_most(num_requests: int) -> int:
    """The most blocks of 16 that so many requests hold in any step, started together."""
    steps = range(max(NUM_ANSWER))
    requests = [(NUM_PROMPT[index % 6], NUM_ANSWER[index % 6]) for index in range(num_requests)]
    return max(sum(-(-(prompt + step) // 16) for prompt, answer in requests if step < answer) for step in steps)


@pytest.mark.task("2.5", hint="Play the lengths on a PagedCache, as the task describes.")
def test_the_number_of_stories_that_fit_together(chapter: Any, seed: int, record_property: Any) -> None:
    expected = max(count for count in range(6, 40) if blocks_at_most(count) <= 153)
    assert_answer(
        chapter.answer_2_5,
        expected,
        0,  # a count: 17 requests need one block more than there are
        record_property,
        {
            "high": "Too high: all requests start together and grow in every step, and each holds whole blocks. Play all "
            "steps: the one that needs the most blocks decides.",
            "low": "Too low: a sequence holds the blocks of the tokens that it has, not of its longest text. They are free "
            "again after the step in which it ends.",
            "fraction": "n is a whole number. An average over the steps does not tell when the memory is full.",
        },
        {
            "Return the total n, not how many more than six.": (expected - 6,),
            "Return the last n that succeeds, not the first that fails.": (expected + 1,),
        },
    )
