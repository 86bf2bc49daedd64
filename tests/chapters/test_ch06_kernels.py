"""Chapter 06: kernels that write K and V, attend to tokens, split a context and merge its parts; and the limits of a decode.

Without a GPU the kernels run in Triton's interpreter. It is slow, so the shapes are small. Their memory is watched: an
address outside a kernel's tensors is a failure, and places that a masked load leaves undefined hold nan. Each kernel is also
compiled for a GPU, which needs no GPU. Expected results are computed in float64, from all tokens at once. Slots that a query
must not see hold a large value. In one test they hold nan, which a weight of 0 does not hide.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.answers import assert_answer
from tests.support.departures import assert_same, assert_same_tokens
from tests.support.hints import hint
from tests.support.kernels import kernel_device, why_no_kernels
from tests.support.memory_guard import memory_guard as memory_guard
from tests.support.models import POISON, hf_greedy, hf_logits, random_gpt2

CHAPTER = "06"
DEVICE = kernel_device()
REASON = why_no_kernels(DEVICE)
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.usefixtures("memory_guard")]

TILE = 16
ATOL = 2e-5
UNWRITTEN = -98765.0
"""What outputs hold before a launch."""

FAR = 2**30
"""Numbers from block to block in a pool that is told to be large: block 2 begins where 32 bits end."""


TYPES: dict[str, Any] = {
    **dict.fromkeys(("key_ptr", "value_ptr", "key_pool_ptr", "value_pool_ptr", "query_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("acc_ptr", "maximum_ptr", "total_ptr"), "*fp32"),
    **dict.fromkeys(("slots_ptr", "table_ptr", "tables_ptr", "context_lens_ptr"), "*i64"),
    **dict.fromkeys(("first", "last", "table_stride", "num_splits"), "i32"),
    **{"scale": "fp32", "row_strides": ("i32",) * 2, "query_strides": ("i32",) * 2, "pool_strides": ("i32",) * 3},
}
"""The types of the kernels' arguments, as a launch on a GPU gives them."""


def check_compiles(kernel: Any, types_of: dict[str, Any] = TYPES, **constants: Any) -> None:
    """A GPU's compiler must take the kernel. Where kernels are compiled anyway, all other tests show that."""
    from chapters.aids.triton_anywhere import INTERPRETED

    if INTERPRETED:
        from tests.support.compile_learners import refusal

        refused = refusal(kernel, types_of, constants)
        assert refused is None, refused


COMPILER_HINT = (
    "The interpreter runs your kernel as Python, and a GPU's compiler is stricter: see 'What the interpreter forgives' in "
    "the notebook. The compiler's own words are in the message."
)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sizes(head_dim: int, block_size: int) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "PADDED_DIM": 16 if head_dim <= 16 else 64, "BLOCK_SIZE": block_size}


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def empty_pool(shape: tuple[int, ...], heads_first: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """A poisoned pool ``[num_blocks, block_size, num_heads, head_dim]``; a block's heads may come before its slots."""
    if heads_first:
        return torch.full((shape[0], shape[2], shape[1], shape[3]), POISON, dtype=dtype).to(DEVICE).transpose(1, 2)
    return torch.full(shape, POISON, dtype=dtype).to(DEVICE)


@contextmanager
def far_pool(pool: Tensor, guard: Any) -> Iterator[tuple[Tensor, int]]:
    """``pool`` with its blocks ``FAR`` numbers apart, and the stride that a kernel has to be told.

    The interpreter's guard pretends that they are. On a GPU they really are, if it has that much memory to spare.
    """
    if guard is not None:
        with guard.spread(pool, FAR):
            yield pool, FAR
    elif torch.cuda.mem_get_info()[0] > 16e9:
        space = torch.empty((len(pool) - 1) * FAR + pool[0].numel(), dtype=pool.dtype, device=pool.device)
        yield space.as_strided(pool.shape, (FAR, *pool.stride()[1:])).copy_(pool), FAR
    else:
        yield pool, pool.stride(0)


class Scene:
    """Sequences whose tokens lie in blocks handed out in random order; ``spare``, block 0 or any, belongs to no sequence.

    Everything but ``keys`` and ``values``, each sequence's own in float64, is on the device that runs the kernels.
    """

    scale = 0.3  # not 1 / sqrt(head_dim), which a layer need not use

    def __init__(
        self,
        seed: int,
        contexts: list[int],
        block_size: int = 4,
        num_heads: int = 2,
        head_dim: int = 16,
        *,
        heads_first: bool = False,
        dtype: torch.dtype = torch.float32,
        index_dtype: torch.dtype = torch.int64,
        spread: float = 2.0,
        spare_first: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.contexts, self.block_size, self.num_heads, self.head_dim = contexts, block_size, num_heads, head_dim
        num_pages = [-(-length // block_size) for length in contexts]
        order = torch.randperm(sum(num_pages) + 1, generator=generator).tolist()
        if spare_first:
            order.append(order.pop(order.index(0)))
        self.spare = order.pop()
        self.tables = [[order.pop() for _ in range(count)] for count in num_pages]
        shape = (sum(num_pages) + 1, block_size, num_heads, head_dim)
        self.key_pool, self.value_pool = (empty_pool(shape, heads_first, dtype) for _ in range(2))
        self.query = (torch.randn(len(contexts), num_heads, head_dim, generator=generator) * spread).to(dtype).to(DEVICE)
        self.keys, self.values = [], []
        for length, table in zip(contexts, self.tables, strict=True):
            shape_of_one = (length, num_heads, head_dim)
            key, value = (torch.randn(shape_of_one, generator=generator).to(dtype) for _ in range(2))
            blocks = torch.tensor(table).repeat_interleave(block_size)[:length]
            offsets = torch.arange(length) % block_size
            self.key_pool[blocks, offsets], self.value_pool[blocks, offsets] = key.to(DEVICE), value.to(DEVICE)
            self.keys.append(key.double())
            self.values.append(value.double())
        # Rows further apart than they are long; entries past a sequence's pages name the spare block.
        wide = torch.full((len(contexts), max(num_pages) + 3), self.spare, dtype=index_dtype)
        for index, table in enumerate(self.tables):
            wide[index, : len(table)] = torch.tensor(table)
        self.block_tables = wide.to(DEVICE)[:, : max(num_pages)]
        self.context_lens = torch.tensor(contexts, dtype=index_dtype, device=DEVICE)

    def fill_unused(self, value: float) -> None:
        """Fill the slots that hold no token with ``value``, in both pools."""
        is_used = torch.zeros(self.key_pool.shape[:2], dtype=torch.bool)
        for length, table in zip(self.contexts, self.tables, strict=True):
            positions = torch.arange(length)
            is_used[torch.tensor(table)[positions // self.block_size], positions % self.block_size] = True
        for pool in (self.key_pool, self.value_pool):
            pool[~is_used.to(DEVICE)] = value

    def scores(self, index: int, scale: float | None = None) -> Tensor:
        """``[num_heads, context_len]`` of a sequence's query, in float64."""
        query = self.query[index].cpu().double()
        return torch.einsum("hd,khd->hk", query, self.keys[index]) * (self.scale if scale is None else scale)

    def out(self, scale: float | None = None) -> Tensor:
        """``[num_seqs, num_heads, head_dim]``: attention of each query over its whole context."""
        weights = [self.scores(index, scale).softmax(-1) for index in range(len(self.contexts))]
        return torch.stack([torch.einsum("hk,khd->hd", w, v) for w, v in zip(weights, self.values, strict=True)])

    def explain(self, got: Tensor) -> Callable[[tuple[int, ...]], str]:
        """Which query a place is about, and what was computed there instead, if that can be told."""

        def where(place: tuple[int, ...]) -> str:
            index, head = place[:2]
            said = f"context of {self.contexts[index]} tokens, block size {self.block_size}, table {self.tables[index]}"
            found = got[index, head].cpu().double()
            if found.isnan().any():
                return f"{said}; nan comes of 0 / 0, of inf - inf and of inf * 0"
            for other in range(self.num_heads):
                if other != head and torch.allclose(found, self.out()[index, other], atol=1e-3):
                    return f"{said}; this is what head {other} should give"
            for other in range(len(self.contexts)):
                if other != index and torch.allclose(found, self.out()[other, head], atol=1e-3):
                    return f"{said}; this is what sequence {other} should give"
            mixed = torch.einsum("k,kd->d", self.scores(index)[head].softmax(-1), self.values[index][:, 0])
            if head and torch.allclose(found, mixed, atol=1e-3):
                return f"{said}; this is what K of head {head} and V of head 0 give"
            for name, scale in (("1", 1.0), ("scale twice", self.scale**2)):
                if torch.allclose(found, self.out(scale)[index, head], atol=1e-3):
                    return f"{said}; this is what {'a scale of 1' if name == '1' else name} gives"
            return said

        return where


# Task 6.1


def check_write(
    chapter: Any, seed: int, key: Tensor, value: Tensor, slots: list[int], shape: tuple[int, ...], **layout: Any
) -> None:
    """After the launch the slots hold what was written, and all others what they held."""
    heads_first, index_dtype = layout.get("heads_first", False), layout.get("index_dtype", torch.int64)
    pools = [empty_pool(shape, heads_first, key.dtype) for _ in range(2)]
    expected = [pool.cpu().clone() for pool in pools]
    for pool, rows in zip(expected, (key, value), strict=True):
        for token, slot in enumerate(slots):
            pool[slot // shape[1], slot % shape[1]] = rows[token].cpu()
    strides = key.stride()[:2], pools[0].stride()[:3]
    tensors = key, value, *pools, torch.tensor(slots, dtype=index_dtype, device=DEVICE)
    chapter.write_kernel[key.shape[:2]](*tensors, *strides, **sizes(shape[3], shape[1]), num_warps=1)

    def told_of(pool: Tensor, other: Tensor, others: str) -> Callable[[tuple[int, ...]], str]:
        def where(place: tuple[int, ...]) -> str:
            slot = place[0] * shape[1] + place[1]
            if slot not in slots:
                return f"slot {slot}, to which no token goes"
            token, found = slots.index(slot), pool[place]
            said = f"slot {slot}, that of token {token}"
            if found == other[token, place[2], place[3]].cpu():
                return f"{said}; this number is from {others}"
            return f"{said}; nothing was written here" if found == POISON else said

        return where

    for name, pool, wanted, other, others in (
        ("key_pool", pools[0].cpu(), expected[0], value, "V"),
        ("value_pool", pools[1].cpu(), expected[1], key, "K"),
    ):
        axes = ("block", "offset", "head", "dim")
        where = told_of(pool, other, others)
        assert_same(pool, wanted, what=f"the numbers of {name}", axes=axes, atol=0, where=where)


def rows(seed: int, num_tokens: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """K and V as the model has them: of each token query, key and value lie side by side."""
    qkv = random(seed, num_tokens, 3, num_heads, head_dim).to(DEVICE)
    return qkv[:, 1], qkv[:, 2]


@pytest.mark.task(
    "6.1",
    hint="program_id(0) is the token, program_id(1) the head; a pointer is an address, so its number i is tl.load(ptr + i); "
    "slot // BLOCK_SIZE is the block, slot % BLOCK_SIZE the place in it, and each has its own stride.",
)
@pytest.mark.parametrize(("block_size", "num_heads"), [(4, 1), (4, 2), (8, 3)])
def test_each_token_goes_to_its_slot(chapter: Any, seed: int, block_size: int, num_heads: int) -> None:
    slots = torch.randperm(4 * block_size, generator=torch.Generator().manual_seed(seed))[:5].tolist()
    key, value = (random(seed + turn, 5, num_heads, 16).to(DEVICE) for turn in range(2))
    check_write(chapter, seed, key, value, slots, (4, block_size, num_heads, 16))


@pytest.mark.task(
    "6.1",
    hint="Use row_strides for token and head. In the model, a token's key is followed by its value, so rows are "
    "further apart.",
)
def test_keys_and_values_may_be_views(chapter: Any, seed: int) -> None:
    check_write(chapter, seed, *rows(seed, 3, 2, 16), [9, 2, 4], (3, 4, 2, 16))
    key, value = (random(seed + turn, 2, 3, 16).to(DEVICE).transpose(0, 1) for turn in range(2))  # heads are far apart
    check_write(chapter, seed, key, value, [9, 2, 4], (3, 4, 2, 16))


@pytest.mark.task(
    "6.1", hint="Use pool_strides for block, slot and head. In the engine's pools the slots of a head lie side by side."
)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_a_pool_may_have_any_strides(chapter: Any, seed: int, index_dtype: torch.dtype) -> None:
    layout: dict[str, Any] = {"heads_first": True, "index_dtype": index_dtype}
    check_write(chapter, seed, *rows(seed, 3, 3, 16), [7, 0, 11], (3, 4, 3, 16), **layout)


@pytest.mark.task(
    "6.1", hint="A tile has PADDED_DIM places and a head HEAD_DIM numbers: mask both the loads and the stores."
)
def test_padding_is_neither_read_nor_written(chapter: Any, seed: int) -> None:
    check_write(chapter, seed, *rows(seed, 3, 2, 20), [5, 11, 0], (3, 4, 2, 20))
    check_write(chapter, seed, *rows(seed, 1, 1, 20), [11], (3, 4, 1, 20), heads_first=True)


@pytest.mark.task(
    "6.1", hint="Slots may come as 32-bit numbers. Make them 64 bits wide (.to(tl.int64)) before you multiply."
)
def test_a_slot_may_lie_more_than_32_bits_into_the_pool(chapter: Any, seed: int, memory_guard: Any) -> None:
    key, value = (random(seed + turn, 2, 1, 16).half().to(DEVICE) for turn in range(2))
    slots = torch.tensor([2 * 4 + 2, 1], dtype=torch.int32, device=DEVICE)
    near = [empty_pool((3, 4, 1, 16), False, torch.float16) for _ in range(2)]
    with far_pool(near[0], memory_guard) as (key_pool, stride), far_pool(near[1], memory_guard) as (value_pool, _):
        strides = key.stride()[:2], (stride, *near[0].stride()[1:3])
        chapter.write_kernel[2, 1](key, value, key_pool, value_pool, slots, *strides, **sizes(16, 4), num_warps=1)
        for name, pool, new in (("key_pool", key_pool, key), ("value_pool", value_pool, value)):
            written = torch.stack([pool[2, 2], pool[0, 1]])
            what = f"the written slots of {name}"
            assert_same(written.cpu(), new.cpu(), what=what, axes=("token", "head", "dim"), atol=0)


@pytest.mark.task("6.1", hint=COMPILER_HINT)
def test_the_write_kernel_compiles_for_a_gpu(chapter: Any) -> None:
    check_compiles(chapter.write_kernel, HEAD_DIM=64, PADDED_DIM=64, BLOCK_SIZE=16)


# Task 6.2


def run_attend(attend: Any, scene: Scene, head: int, first: int, last: int, *, pool_strides: Any = None) -> list[Tensor]:
    """``acc``, ``maximum`` and ``total`` that ``attend`` returns for sequence 0's query, on the CPU."""
    from tests.support.kernel_parts import one_program

    query = (scene.query[0, head].float() * scene.scale).contiguous()
    outs = [torch.full((size,), math.nan, device=DEVICE) for size in (scene.head_dim, 1, 1)]
    pools = scene.key_pool[:, :, head], scene.value_pool[:, :, head]
    table = scene.block_tables[0, : max(1, -(-last // scene.block_size))].clone()  # nothing follows the entries in use
    strides = pool_strides or scene.key_pool.stride()[:3]
    constants = sizes(scene.head_dim, scene.block_size) | {"ATTEND": attend}
    one_program[1,](*outs, query, *pools, table, first, last, strides, **constants, num_warps=1)
    return [out.cpu() for out in outs]


def with_keys_of(scene: Scene, head: int, slots: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """``maximum`` and ``total`` when the keys are taken from these ``(block, offset)``."""
    keys = torch.stack([scene.key_pool[block, offset, head] for block, offset in slots]).cpu().double()
    scores = keys @ scene.query[0, head].cpu().double() * scene.scale
    return scores.max(), (scores - scores.max()).exp().sum()


def why_attend(scene: Scene, head: int, first: int, last: int, got: list[Tensor], expected: list[Tensor]) -> str:
    """What the mistake is, as far as the three numbers tell; else what to look at."""
    (acc, maximum, total), size, table = got, scene.block_size, scene.tables[0]
    if acc.isnan().any() or maximum.isnan().any() or total.isnan().any():
        return (
            "Where does nan come from? A place that a masked load leaves out is undefined unless you say "
            "`other=`, and so it "
            "is nan here. A weight of 0 does not hide it: 0 * nan is nan. And -inf - -inf is nan too."
        )
    if last <= first:
        return "No tokens: the loop is not entered, and what you begin with is returned. Nothing is divided here."
    is_right = [torch.allclose(mine.double(), theirs, rtol=1e-3, atol=1e-3) for mine, theirs in zip(got, expected)]
    positions = list(range(first, last))
    starts = [first + (token - first) // TILE * TILE for token in positions]
    steps = [(token, start) for token, start in zip(positions, starts)]
    ideas = {
        "The whole tile was looked for in the block of its first token. Each token has its own block: token // "
        "BLOCK_SIZE.": [(start // size, token % size) for token, start in steps],
        "The place in a block was counted from the beginning of the tile. It is token % BLOCK_SIZE: blocks "
        "begin at token 0.": [(token // size, (token - start) % size) for token, start in steps],
        "The blocks were counted from the beginning of the tile. A tile may begin in the middle of a block: "
        "token // BLOCK_SIZE.": [(start // size + (token - start) // size, token % size) for token, start in steps],
        "A bit mask gives the place in a block only if BLOCK_SIZE is a power of 2. token % BLOCK_SIZE is right "
        "for every size.": [(token // size, token & (size - 1)) for token, _ in steps],
    }
    for told, places in ideas.items():
        wrong = with_keys_of(scene, head, [(table[page], offset) for page, offset in places])
        if not all(is_right[1:]) and all(
            torch.isclose(a, b[0].double(), atol=1e-3) for a, b in zip(wrong, (maximum, total))
        ):
            return told
    scores = scene.scores(0)[head]
    if not is_right[1] and float(maximum) == 0 > float(expected[1]):
        return (
            "All scores are negative here, and the maximum is 0. It has to begin at minus infinity; and a place without a "
            "token scores minus infinity, not the 0 that `other=0.0` makes of it."
        )
    if (
        not is_right[1]
        and last < len(scores)
        and torch.isclose(maximum[0].double(), scores[first : last + 1].max(), atol=1e-3)
    ):
        return "That is the result with token `last` in it: the range ends before it, so the mask is tokens < last."
    if not is_right[1] and torch.isclose(maximum[0].double(), scores[starts[-1] : last].max(), atol=1e-3):
        return "That is the largest score of the last tile alone. Carry the maximum on: tl.maximum(maximum, tl.max(...))."
    if not is_right[1]:
        return (
            "A score is the sum over the dims of query * key, one for each token: [TILE] of them. The maximum "
            "runs over these. "
            "The key of token t is at place t % BLOCK_SIZE of block table[t // BLOCK_SIZE]."
        )
    if not is_right[2] and last - first > TILE:
        return (
            "A later tile may bring a larger maximum. Then `acc` and `total` both shrink by exp(old maximum - new maximum)."
        )
    if not is_right[2]:
        return "`total` is the sum over the tokens of exp(score - maximum); a place without a token adds 0."
    return (
        "Maximum and total are right, so the scores are. What is left is V: the weights belong to tokens, "
        "weights[:, None] * "
        "values, summed over the tokens (axis 0); and `acc` shrinks with `total`."
    )


def check_attend(attend: Any, scene: Scene, head: int, first: int, last: int, **options: Any) -> None:
    """The three numbers must be those of tokens ``first .. last - 1`` taken together."""
    got = run_attend(attend, scene, head, first, last, **options)
    scores = scene.scores(0)[head, first:last]
    maximum = scores.max() if len(scores) else torch.tensor(-math.inf).double()
    weights = (scores - maximum).exp()
    rounded = max((abs(score) for score in scores.tolist()), default=0.0)  # a score's rounding is a factor on its weight
    expected = [weights @ scene.values[0][first:last, head], maximum[None], weights.sum()[None]]
    place = f"tokens {first} to {last - 1}" if last > first else "no tokens"
    place += f", block size {scene.block_size}, block table {scene.tables[0]}, head {head}"
    if all(torch.allclose(mine, theirs.float(), atol=1e-3) for mine, theirs in zip(got[1:], (expected[2], expected[1]))):
        if not torch.allclose(expected[1], expected[2]):
            with hint("The order is acc, maximum, total."):
                pytest.fail(f"for {place}, `maximum` is what `total` should be, and `total` is what `maximum` should be")
    if torch.allclose(got[0] * got[2], expected[0].float(), atol=1e-3) and not torch.allclose(got[0], expected[0].float()):
        with hint("`acc` stays the plain sum of weight * value. The merge divides, once, when all parts are together."):
            pytest.fail(f"`acc` for {place} is divided by `total` already: nothing divides before the merge")
    names = "`maximum`", "`total`", "the numbers of `acc`"
    for name, mine, theirs in zip(names, (*got[1:], got[0]), (*expected[1:], expected[0]), strict=True):
        size = max(1.0, float(theirs.abs().max())) if theirs.isfinite().all() else 1.0
        tolerance = (ATOL + 5e-7 * rounded) * size
        if options or scene.key_pool.dtype != torch.float32:
            assert_same(mine, theirs, what=f"{name} for {place}", axes=("dim",), atol=tolerance)
            continue
        with hint(why_attend(scene, head, first, last, got, expected)):
            assert_same(mine, theirs, what=f"{name} for {place}", axes=("dim",), atol=tolerance)


@pytest.mark.task(
    "6.2", hint="A whole tile: scores are sums over the dims, one for each token; max and sum run over tokens."
)
@pytest.mark.parametrize("block_size", [16, 4, 32])
def test_a_single_full_tile(chapter: Any, seed: int, block_size: int) -> None:
    check_attend(chapter.attend_tokens, Scene(seed, [TILE], block_size), 1, 0, TILE)


@pytest.mark.task(
    "6.2", hint="If a later tile has a larger maximum, what was summed before shrinks. See chapter 03, task 3.1."
)
@pytest.mark.parametrize("spread", [2.0, 300.0])
def test_several_full_tiles(chapter: Any, seed: int, spread: float) -> None:
    scene = Scene(seed, [4 * TILE], 8, spread=spread)
    for head in range(2):
        check_attend(chapter.attend_tokens, scene, head, 0, 4 * TILE)


@pytest.mark.task(
    "6.2",
    hint="Tokens from `last` on are left out in three places: the loads of the table and of V have a mask, and a tl.where "
    "gives their scores minus infinity.",
)
@pytest.mark.parametrize(("block_size", "lasts"), [(4, (1, 3, 4, 5, 15, 17)), (32, (1, 31, 33)), (1, (2, 18))], ids=str)
def test_the_last_tile_may_be_cut_short(chapter: Any, seed: int, block_size: int, lasts: tuple[int, ...]) -> None:
    scene = Scene(seed, [40], block_size)
    for last in lasts:
        check_attend(chapter.attend_tokens, scene, 0, 0, last)


@pytest.mark.task(
    "6.2",
    hint="The mask of V has two parts: the place is one of the head's numbers, and the token comes before `last`.",
)
@pytest.mark.parametrize(("block_size", "context"), [(4, 19), (8, 33), (32, 5)])
def test_slots_that_hold_no_token_are_not_used(chapter: Any, seed: int, block_size: int, context: int) -> None:
    """They hold nan, in block 0 and in the sequence's last page; with a finite number there, a weight of 0 would hide it."""
    scene = Scene(seed, [context], block_size, spare_first=True)
    check_attend(chapter.attend_tokens, scene, 1, 0, context)
    scene.fill_unused(math.nan)
    names = "acc", "maximum", "total"
    found = [name for name, got in zip(names, run_attend(chapter.attend_tokens, scene, 1, 0, context)) if got.isnan().any()]
    said = f"tokens 0 to {context - 1}, block size {block_size}, block table {scene.tables[0]}"
    assert not found, (
        f"a slot that holds no token was read, and what it holds was used: {' and '.join(found)} for {said} "
        "became nan when such slots hold nan (0 * nan is nan)"
    )
    check_attend(chapter.attend_tokens, scene, 1, 0, context)


@pytest.mark.task(
    "6.2",
    hint="The tile that begins at token `start` holds the tokens start, start + 1, and so on. The first tile "
    "begins at `first`.",
)
def test_a_range_may_begin_later(chapter: Any, seed: int) -> None:
    scene = Scene(seed, [70], 8)
    for first, last in ((16, 32), (32, 70), (64, 67)):
        check_attend(chapter.attend_tokens, scene, 1, first, last)


@pytest.mark.task(
    "6.2",
    hint="With no tokens the loop is not entered, and the three values that you begin with are returned. "
    "Nothing is divided.",
)
def test_an_empty_range_gives_nothing(chapter: Any, seed: int) -> None:
    scene = Scene(seed, [20], 4)
    check_attend(chapter.attend_tokens, scene, 0, 16, 16)
    check_attend(chapter.attend_tokens, scene, 0, 32, 20)  # a part that would begin past the end


@pytest.mark.task("6.2", hint="pool_strides[0] leads to the next block, pool_strides[1] to the next slot: in any layout.")
@pytest.mark.parametrize("num_heads", [1, 3])
def test_pages_may_be_laid_out_in_any_way(chapter: Any, seed: int, num_heads: int) -> None:
    scene = Scene(seed, [21], 4, num_heads, heads_first=True)
    check_attend(chapter.attend_tokens, scene, num_heads - 1, 0, 21)


@pytest.mark.task(
    "6.2",
    hint="Of PADDED_DIM places HEAD_DIM hold numbers of this head. The others belong to the next head or slot: "
    "mask them, with `other=0.0`.",
)
def test_a_head_may_have_fewer_numbers_than_the_tile(chapter: Any, seed: int) -> None:
    scene = Scene(seed, [19], 4, 2, 20)
    check_attend(chapter.attend_tokens, scene, 1, 0, 19)
    scene.fill_unused(math.nan)  # the last token's numbers are followed by those of an empty slot
    assert not any(got.isnan().any() for got in run_attend(chapter.attend_tokens, scene, 1, 0, 19)), (
        "of a head of 20 numbers, places from 20 on were read, and what lies there was used: it was nan (0 * nan is nan)"
    )


@pytest.mark.task("6.2", hint="Convert what you load to float32 before you compute with it; sums are float32, too.")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_pools_of_another_dtype(chapter: Any, seed: int, dtype: torch.dtype) -> None:
    check_attend(chapter.attend_tokens, Scene(seed, [21], 4, dtype=dtype), 0, 0, 21)


@pytest.mark.task("6.2", hint="Block ids may be 32-bit numbers. Make them 64 bits wide (.to(tl.int64)) before you multiply.")
def test_a_block_may_lie_more_than_32_bits_into_the_pool(chapter: Any, seed: int, memory_guard: Any) -> None:
    scene = Scene(seed, [9], 4, 1, dtype=torch.float16, index_dtype=torch.int32)  # 4 blocks, of which one is spare
    pools = scene.key_pool, scene.value_pool
    with far_pool(pools[0], memory_guard) as (scene.key_pool, stride), far_pool(pools[1], memory_guard) as (value_pool, _):
        scene.value_pool = value_pool
        check_attend(chapter.attend_tokens, scene, 0, 0, 9, pool_strides=(stride, *pools[0].stride()[1:3]))


@pytest.mark.task(
    "6.2",
    hint="Token t is in the page t // BLOCK_SIZE, at place t % BLOCK_SIZE. Both work for every block size, and "
    "for a tile that "
    "begins in the middle of a page.",
)
@pytest.mark.parametrize(
    ("block_size", "ranges"),
    [(5, ((0, 23), (16, 37))), (12, ((0, 12), (16, 40))), (24, ((16, 41), (32, 50))), (32, ((16, 32), (16, 60), (48, 63)))],
    ids=str,
)
def test_a_page_may_have_any_size_and_a_range_may_begin_inside_it(
    chapter: Any, seed: int, block_size: int, ranges: tuple[tuple[int, int], ...]
) -> None:
    scene = Scene(seed, [64], block_size)
    for first, last in ranges:
        check_attend(chapter.attend_tokens, scene, 1, first, last)


@pytest.mark.task(
    "6.2", hint="One load of K and one of V for each tile of TILE tokens. Keep what you need of it in variables."
)
@pytest.mark.parametrize(("first", "last"), [(0, 64), (16, 48)])
def test_each_key_and_value_is_read_once_and_a_tile_at_a_time(
    chapter: Any, seed: int, memory_guard: Any, first: int, last: int
) -> None:
    scene = Scene(seed, [64], 8)
    check_attend(chapter.attend_tokens, scene, 1, first, last)
    if memory_guard is None:
        return  # compiled: the loads cannot be watched there
    from chapters.aids.watch_kernels import watching

    with watching() as watch:
        run_attend(chapter.attend_tokens, scene, 1, first, last)
    most, num_tiles = TILE * scene.head_dim, (last - first) // TILE
    for name, letter in (("key_ptr", "K"), ("value_ptr", "V")):
        loads = [access for access in watch.accesses if access.tensor == name]
        read = sum(int(access.is_used.sum()) for access in loads) // scene.head_dim
        with hint(
            "The roofline counts each number of K and V once. A second pass, or tokens before `first`, cost time again."
        ):
            assert read == last - first, (
                f"for tokens {first} to {last - 1}, which are {last - first}, {letter} was read for {read} "
                f"tokens: each token "
                f"of the range is to be read once, and no other token"
            )
        with hint(
            "The loop begins at `first`. `tokens = start + tl.arange(0, TILE)` are a tile's tokens, and one "
            "load takes all their addresses."
        ):
            assert len(loads) <= num_tiles, (
                f"{letter} of {num_tiles} tiles was read with {len(loads)} loads: a load takes TILE ({TILE}) tokens at once"
            )
            largest = max((access.is_used.size for access in loads), default=0)
            assert largest <= most, f"a load of {letter} has {largest} places: TILE tokens of PADDED_DIM numbers are {most}"


@pytest.mark.task("6.2", hint=COMPILER_HINT)
def test_attend_tokens_compiles_for_a_gpu(chapter: Any) -> None:
    from tests.support.kernel_parts import one_program

    types_of = TYPES | {"query_ptr": "*fp32"}
    check_compiles(one_program, types_of, HEAD_DIM=64, PADDED_DIM=64, BLOCK_SIZE=16, ATTEND=chapter.attend_tokens)


# Task 6.3


@pytest.fixture
def sound(chapter: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The chapter with an ``attend_tokens`` that works: if its own does not, later tasks are judged with another."""
    from tests.support.kernel_parts import attend_twice

    try:
        for scene, first, last in ((Scene(seed, [37], 4), 0, 37), (Scene(seed, [20], 4, 1, 20), 16, 20)):
            check_attend(chapter.attend_tokens, scene, 0, first, last)
        check_attend(chapter.attend_tokens, scene, 0, 16, 16)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        monkeypatch.setattr(chapter, "attend_tokens", attend_twice)
    return chapter


Parts = tuple[Tensor, Tensor, Tensor]
"""``acc``, ``maximum`` and ``total`` of all parts, in float64."""


def run_decode(chapter: Any, scene: Scene, num_splits: int) -> Parts:
    """What ``decode_kernel`` writes for all queries of a scene."""
    shape = (len(scene.contexts), scene.num_heads, num_splits)
    outs = [torch.full(size, UNWRITTEN, device=DEVICE) for size in ((*shape, scene.head_dim), shape, shape)]
    inputs = scene.query, scene.key_pool, scene.value_pool, scene.block_tables, scene.context_lens, scene.scale
    strides = scene.query.stride()[:2], scene.key_pool.stride()[:3], scene.block_tables.stride(0)
    chapter.decode_kernel[shape](*outs, *inputs, *strides, **sizes(scene.head_dim, scene.block_size), num_warps=1)
    acc, maximum, total = (out.cpu().double() for out in outs)
    return acc, maximum, total


def merged(parts: Parts) -> Tensor:
    """The parts put together in the textbook way."""
    acc, maximum, total = parts
    weights = (maximum - maximum.amax(-1, keepdim=True)).exp()
    return (weights[..., None] * acc).sum(-2) / (weights * total).sum(-1, keepdim=True)


def other_order(scene: Scene, parts: Parts) -> str:
    """The layout in which the parts are right, if it is not ``[num_seqs, num_heads, num_splits]``; else empty."""
    shape, names = parts[1].shape, ("num_seqs", "num_heads", "num_splits")
    if torch.allclose(merged(parts), scene.out(), atol=1e-3):
        return ""
    for order in permutations(range(3)):
        laid = [part.reshape(*(shape[axis] for axis in order), *part.shape[3:]) for part in parts]
        back = [order.index(axis) for axis in range(3)]
        acc, maximum, total = (part.permute(*back, *range(3, part.dim())) for part in laid)
        if torch.allclose(merged((acc, maximum, total)), scene.out(), atol=1e-3):
            return ", ".join(names[axis] for axis in order)
    return ""


ROW_HINT = (
    "The row of a part is (seq * num_heads + head) * num_splits + split: all parts of a head, then the next head, then the "
    "next sequence. tl.num_programs(1) is num_heads, tl.num_programs(2) is num_splits; rows of `acc` are HEAD_DIM apart."
)


def check_decode(chapter: Any, scene: Scene, num_splits: int) -> None:
    """The parts together are attention over the whole context."""
    parts = run_decode(chapter, scene, num_splits)
    for name, numbers in zip(("acc", "maximum", "total"), parts, strict=True):
        for is_bad, said, told in (
            (numbers == UNWRITTEN, "was not written", ROW_HINT),
            (
                numbers.isnan(),
                "is nan",
                "Where does nan come from? The query's padding is undefined unless its load says `other=0.0`.",
            ),
        ):
            seq, head, split, *_ = (*torch.nonzero(is_bad)[:1].flatten().tolist(), 0, 0, 0)
            place = f"for part {split} of head {head} of sequence {seq}, which has {scene.contexts[seq]} tokens"
            num_tiles = -(-scene.contexts[seq] // TILE)
            if split * -(-num_tiles // num_splits) >= num_tiles:
                place += "; this part is empty, and has to write 0, minus infinity and 0"
                told = "Every program stores its three results. An empty part stores what attend_tokens gives for no tokens."
            with hint(told):
                assert not is_bad.any(), f"`{name}` {said} with {counted(num_splits, 'part')}, {place}"
    got = merged(parts)
    if other := other_order(scene, parts):
        with hint(ROW_HINT):
            pytest.fail(f"the rows of the parts lie in the order of [{other}], expected [num_seqs, num_heads, num_splits]")
    undivided = merged((parts[0] * parts[2][..., None], *parts[1:]))
    if torch.allclose(undivided, scene.out(), atol=1e-3) and not torch.allclose(got, scene.out(), atol=1e-3):
        with hint("Store `acc` as attend_tokens returns it. The merge divides, once, when all parts are together."):
            pytest.fail(f"`acc` is divided by `total` already, with {counted(num_splits, 'part')}: nothing divides here")
    what = f"the outputs of {counted(num_splits, 'part')} put together"
    assert_same(got, scene.out(), what=what, axes=("sequence", "head", "dim"), atol=1e-4, where=scene.explain(got))


@pytest.mark.task("6.3", hint="One part is the whole context: 0 to the context's length. The query is multiplied by scale.")
@pytest.mark.parametrize("context", [16, 5])
def test_one_sequence_with_one_head_in_one_part(sound: Any, seed: int, context: int) -> None:
    check_decode(sound, Scene(seed, [context], 4, 1), 1)


@pytest.mark.task(
    "6.3", hint="Each head has its own query (query_strides[1]) and its own place in both pools (pool_strides[2])."
)
@pytest.mark.parametrize("heads_first", [False, True], ids=["slots first", "heads first"])
def test_each_head_reads_its_own_numbers(sound: Any, seed: int, heads_first: bool) -> None:
    check_decode(sound, Scene(seed, [21], 4, 3, heads_first=heads_first), 1)


@pytest.mark.task("6.3", hint="Each sequence has its own query, length and row of the table; rows are table_stride apart.")
def test_each_sequence_has_its_own_table_and_length(sound: Any, seed: int) -> None:
    check_decode(sound, Scene(seed, [9, 33, 1, 20], 4), 1)


@pytest.mark.task("6.3", hint="Take the query's strides as they are given, and mask what lies past HEAD_DIM.")
def test_queries_may_be_views_and_heads_of_any_size(sound: Any, seed: int) -> None:
    scene = Scene(seed, [6, 18], 4, 2, 20)
    query = scene.query
    for scene.query in (torch.stack([query, -query], 1)[:, 0], query.transpose(0, 1).contiguous().transpose(0, 1)):
        check_decode(sound, scene, 1)


@pytest.mark.task("6.3", hint="Together the parts must see every token once. Work out first and last of each part by hand.")
@pytest.mark.parametrize("num_splits", [2, 3, 4])
def test_parts_together_give_the_whole(sound: Any, seed: int, num_splits: int) -> None:
    check_decode(sound, Scene(seed, [64, 37, 80], 8), num_splits)


@pytest.mark.task(
    "6.3", hint="An empty part writes what attend_tokens gives for no tokens. No part goes past the context's end."
)
@pytest.mark.parametrize("num_splits", [4, 7])
def test_there_may_be_more_parts_than_tiles(sound: Any, seed: int, num_splits: int) -> None:
    check_decode(sound, Scene(seed, [70, 17, 3], 8), num_splits)


@pytest.mark.task(
    "6.3", hint="Count in tiles: divide their number by num_splits, round up, and only then go back to tokens."
)
@pytest.mark.parametrize(("context", "num_splits"), [(80, 2), (64, 4), (65, 4), (96, 4), (33, 3), (150, 5)])
def test_tiles_are_shared_out_evenly(sound: Any, seed: int, context: int, num_splits: int) -> None:
    """With keys of zero each token weighs 1; a token's value says in which tile it is. So ``acc`` counts tokens by tile."""
    scene = Scene(seed, [context], 8, 1)
    scene.key_pool.zero_()
    for position in range(context):
        block, offset = scene.tables[0][position // 8], position % 8
        scene.value_pool[block, offset] = 0
        scene.value_pool[block, offset, 0, position // TILE] = 1
    counts = run_decode(sound, scene, num_splits)[0][0, 0]  # [num_splits, tile]
    num_tiles = -(-context // TILE)
    for tile in range(num_tiles):
        whole = min(TILE, context - tile * TILE)
        seen = [int(count) if float(count).is_integer() else float(count) for count in counts[:, tile].tolist()]
        parts = f"{num_splits} parts of {context} tokens see {seen} tokens of tile {tile}"
        assert sum(count > 0 for count in seen) == 1 and sum(seen) == whole, f"{parts}: one part should see all {whole}"
    most, fair = int((counts > 0).sum(1).max()), -(-num_tiles // num_splits)
    got = f"of {num_tiles} tiles in {num_splits} parts, one has {most}"
    assert most <= fair, f"{got}: no part should have more than {fair}, since all wait for the slowest"


@pytest.mark.task(
    "6.3", hint="Convert the query to float32 first, then multiply it by scale: in 16 bits the product is rounded."
)
def test_queries_of_16_bits_are_scaled_in_float32(sound: Any, seed: int) -> None:
    check_decode(sound, Scene(seed, [37, 20], 8, dtype=torch.float16), 2)


@pytest.mark.task("6.3", hint=COMPILER_HINT)
def test_the_decode_kernel_compiles_for_a_gpu(chapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.kernel_parts import attend_twice

    monkeypatch.setattr(chapter, "attend_tokens", attend_twice)  # whether the chapter's own compiles is 6.2's question
    check_compiles(chapter.decode_kernel, HEAD_DIM=64, PADDED_DIM=64, BLOCK_SIZE=16)


@pytest.mark.task("6.3", hint="Entries of the table past a sequence's own pages are not block ids. Do not follow them.")
def test_entries_past_the_pages_are_not_followed(sound: Any, seed: int, memory_guard: Any) -> None:
    scene = Scene(seed, [9, 33, 20], 4)
    if memory_guard is not None:  # on a GPU, following one ends the whole process
        for index, table in enumerate(scene.tables):
            scene.block_tables[index, len(table) :] = 10**9
    check_decode(sound, scene, 3)


# Task 6.4


def random_parts(seed: int, shape: tuple[int, int, int], head_dim: int, shifts: list[float]) -> Parts:
    """Parts of two tokens each; a shift is added to a part's scores, minus infinity makes it empty."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
    values = torch.randn(*shape, 2, head_dim, generator=generator, dtype=torch.float64)
    scores = scores + torch.tensor(shifts, dtype=torch.float64)[:, None]
    maximum = scores.amax(-1)
    weights = torch.where(maximum[..., None] > -math.inf, (scores - maximum[..., None]).exp(), 0.0)
    acc = (weights[..., None] * values).sum(-2)
    return acc, maximum, weights.sum(-1)


LAYOUT_HINT = (
    "A row of `acc` has HEAD_DIM numbers, and rows are HEAD_DIM apart; a tile has PADDED_DIM places. The next query's parts "
    "begin `num_splits` rows further; a tile has PADDED_SPLITS places. Mask what you load and what you store, in both axes."
)


def check_merge(chapter: Any, parts: Parts) -> None:
    """The merged parts must be what the textbook makes of them."""
    acc, maximum, total = (part.float().contiguous().to(DEVICE) for part in parts)
    num_seqs, num_heads, num_splits, head_dim = acc.shape
    out = torch.full((num_seqs, num_heads, head_dim), math.nan, device=DEVICE)
    constants = {"HEAD_DIM": head_dim, "PADDED_DIM": sizes(head_dim, 1)["PADDED_DIM"]}
    constants["PADDED_SPLITS"] = 1 << (num_splits - 1).bit_length()
    with hint(LAYOUT_HINT):  # for addresses outside: what is computed has hints of its own
        chapter.merge_kernel[num_seqs, num_heads](out, acc, maximum, total, num_splits, **constants, num_warps=1)

    found, wanted = out.cpu().double(), merged(parts)
    finite = [abs(number) for number in parts[1].flatten().tolist() if math.isfinite(number)]
    told = ""
    if found.isnan().any() and max(finite) > 80 and float(parts[1].max()) > 80:
        told = "exp of a large number is infinite, and inf / inf is nan. Take the largest maximum off first, then exp."
    elif found.isnan().any() and (parts[2] == 0).any():
        told = "nan comes of 0 / 0: an empty part has a total of 0. Divide once, at the end, not part by part."
    elif found.isnan().any() and max(finite) > 80:
        told = "nan is 0 / 0 here: a padded place with a 0 won the maximum. What must it hold, so that it never does?"
    elif found.isnan().any():
        told = (
            "nan comes of places that a masked load leaves out. They are undefined unless you say `other=`, and "
            "a weight of 0 "
            "does not hide them: 0 * nan is nan."
        )
    for part in range(num_splits):
        kept = [index for index in range(num_splits) if index != part]
        if kept and (parts[2][..., kept].sum(-1) > 0).all():
            less = merged((parts[0][:, :, kept], parts[1][:, :, kept], parts[2][:, :, kept]))
            if torch.allclose(found, less, atol=1e-3) and not torch.allclose(less, wanted, atol=1e-3):
                told = f"That is the result without part {part}. All parts with a number below num_splits count."

    def parts_of(place: tuple[int, ...]) -> str:
        seq, head, _ = place
        pairs = zip(parts[1][seq, head].tolist(), parts[2][seq, head].tolist())
        return f"(maximum, total) of its parts: {', '.join(f'({m:.4g}, {s:.4g})' for m, s in pairs)}"

    what = f"the merged outputs of {counted(num_splits, 'part')}"
    atol = 1e-5 + 5e-7 * max(finite)  # float32 rounds a maximum of 900 to 3e-5
    axes = "sequence", "head", "dim"
    if not told:
        assert_same(out.cpu(), wanted, what=what, axes=axes, atol=atol, where=parts_of)
        return
    with hint(told):
        assert_same(out.cpu(), wanted, what=what, axes=axes, atol=atol, where=parts_of)


@pytest.mark.task("6.4", hint="Of one part: acc divided by total. Which row of the parts belongs to this sequence and head?")
def test_a_single_part_is_divided_by_its_total(chapter: Any, seed: int) -> None:
    check_merge(chapter, random_parts(seed, (2, 3, 1), 16, [0.0]))


@pytest.mark.task("6.4", hint="Each part counts from its own maximum: bring all to the largest before you add them.")
@pytest.mark.parametrize("shifts", [[0.0, 3.0], [2.0, 0.0, 1.0, 5.0]], ids=str)
def test_parts_with_different_maxima(chapter: Any, seed: int, shifts: list[float]) -> None:
    check_merge(chapter, random_parts(seed, (2, 2, len(shifts)), 16, shifts))


@pytest.mark.task("6.4", hint=LAYOUT_HINT)
@pytest.mark.parametrize("num_splits", [1, 2])
def test_rows_may_have_fewer_numbers_than_the_tile(chapter: Any, seed: int, num_splits: int) -> None:
    check_merge(chapter, random_parts(seed, (2, 2, num_splits), 20, [0.0, 1.0][:num_splits]))


@pytest.mark.task(
    "6.4",
    hint="Places from num_splits on are padding. They must not be read, and must weigh nothing. The next query's parts "
    "begin num_splits rows further.",
)
def test_the_number_of_parts_may_be_no_power_of_two(chapter: Any, seed: int) -> None:
    check_merge(chapter, random_parts(seed, (2, 2, 3), 16, [0.0, 1.0, -1.0]))
    check_merge(chapter, random_parts(seed, (1, 3, 5), 20, [0.0, 1.0, -1.0, 2.0, -30.0]))


@pytest.mark.task(
    "6.4", hint="An empty part has maximum minus infinity and total 0: divide once, at the end, not part by part."
)
@pytest.mark.parametrize("shifts", [[0.0, -math.inf], [-math.inf, -math.inf, -20.0]], ids=str)
def test_empty_parts_count_for_nothing(chapter: Any, seed: int, shifts: list[float]) -> None:
    check_merge(chapter, random_parts(seed, (1, 2, len(shifts)), 16, shifts))


@pytest.mark.task("6.4", hint="exp of a large number is infinite: take the largest maximum off first, then exp.")
@pytest.mark.parametrize("shifts", [[900.0, 899.0], [-900.0, -902.0, 900.0], [-500.0, -501.0, -502.0]], ids=str)
def test_maxima_of_any_size(chapter: Any, seed: int, shifts: list[float]) -> None:
    check_merge(chapter, random_parts(seed, (1, 2, len(shifts)), 16, shifts))


@pytest.mark.task("6.4", hint=COMPILER_HINT)
def test_the_merge_kernel_compiles_for_a_gpu(chapter: Any) -> None:
    check_compiles(chapter.merge_kernel, HEAD_DIM=64, PADDED_DIM=64, PADDED_SPLITS=8)


@pytest.fixture
def complete(sound: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A sound chapter whose contexts are cut into two parts, whatever its own choice is."""
    monkeypatch.setattr(sound, "choose_num_splits", lambda *_: 2)
    return sound


@pytest.mark.task(
    "6.4",
    hint="Here all kernels work together, on prompts and decodes, each context in two parts. If the other tests "
    "of 6.4 pass, check 6.1 to 6.3.",
)
def test_generation_equals_hugging_face(complete: Any, seed: int) -> None:
    model: Any = random_gpt2(torch.float32, seed=seed)
    prompts = [[1, 2, 3], list(range(18)), [95]]
    logits: dict[int, list[Tensor]] = {index: [] for index in range(len(prompts))}

    def keep(index: int, scores: Tensor) -> None:
        logits[index].append(scores.cpu())

    answers = complete.generate(model.to(DEVICE), prompts, 4, keep, block_size=4)
    model.to("cpu")
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = hf_logits(model, prompt + answer)[len(prompt) - 1 : -1]
        assert_same(
            torch.stack(logits[index]), expected, what=f"logits of prompt {index}", axes=("token", "score"), atol=1e-4
        )
        assert_same_tokens(answer, hf_greedy(model, prompt, 4, 96), what=f"the answer to prompt {index}")


# Task 6.5


def shapes(seed: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Sequences, context, heads, head_dim, bytes of a number."""
    yield 1, 1, 1, 1, 1
    yield 256, 512, 12, 64, 2
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        counts = [int(torch.randint(1, most, (), generator=generator)) for most in (300, 1025, 20, 129, 9)]
        yield counts[0], counts[1], counts[2], counts[3], counts[4]


@pytest.mark.task(
    "6.5", hint="Each token has K and V, in each head head_dim numbers. Each query is read, each result written."
)
def test_the_bytes_of_a_decode(chapter: Any, seed: int) -> None:
    for num_seqs, context, num_heads, head_dim, itemsize in shapes(seed):
        tokens = num_seqs * context + num_seqs  # K and V of the context; and a query and a result for each sequence
        expected = 2 * tokens * num_heads * head_dim * itemsize
        got = chapter.decode_work(num_seqs, context, num_heads, head_dim, itemsize).num_bytes
        shape = f"{counted(num_seqs, 'sequence')} of {counted(context, 'token')}, {counted(num_heads, 'head')}"
        shape += f" of {counted(head_dim, 'number')} of {counted(itemsize, 'byte')}"
        assert got == expected, f"num_bytes for {shape}: got {got}, expected {expected}"


@pytest.mark.task(
    "6.5",
    hint="For each token and head there are two sums of products: head_dim multiplications and head_dim additions each.",
)
def test_the_operations_of_a_decode(chapter: Any, seed: int) -> None:
    for num_seqs, context, num_heads, head_dim, itemsize in shapes(seed):
        expected = sum((2 * head_dim) * 2 for _ in range(num_heads)) * num_seqs * context
        got = chapter.decode_work(num_seqs, context, num_heads, head_dim, itemsize).num_operations
        shape = f"{counted(num_seqs, 'sequence')} of {counted(context, 'token')}, {counted(num_heads, 'head')}"
        shape += f" of {counted(head_dim, 'number')}"
        assert got == expected, f"num_operations for {shape}: got {got}, expected {expected}"


@pytest.mark.task(
    "6.5", hint="Moving bytes takes a time, and computing takes a time. They overlap, so the longer of the two remains."
)
def test_the_floor_is_what_the_slower_resource_needs(chapter: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(30):
        moved, computed = (int(number) for number in torch.randint(1, 10**9, (2,), generator=generator))
        bytes_per_s, operations_per_s = (float(10 ** (12 * x)) for x in torch.rand(2, generator=generator))
        got = chapter.floor_seconds(chapter.Work(moved, computed), bytes_per_s, operations_per_s)
        expected = sorted([moved / bytes_per_s, computed / operations_per_s])[1]
        said = f"{moved} bytes at {bytes_per_s:.3g}/s, {computed} operations at {operations_per_s:.3g}/s"
        assert math.isclose(got, expected), f"floor_seconds for {said}: got {got:.6g}, expected {expected:.6g}"


@pytest.mark.task("6.5", hint="Round the division up. There are never more splits than tiles, and there is at least one.")
def test_as_few_splits_as_give_enough_programs(chapter: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cases = [(12, 64, 3168), (12 * 256, 64, 3168), (3168, 64, 3168), (3167, 64, 3168), (12, 1, 3168), (1, 5, 5)]
    for _ in range(60):
        cases.append((*(int(torch.randint(1, most, (), generator=generator)) for most in (400, 40, 900)),))  # type: ignore[arg-type]
    for num_queries, num_tiles, num_wanted in cases:
        enough = (count for count in range(1, num_tiles + 1) if count * num_queries >= num_wanted)
        expected = next(enough, num_tiles)
        got = chapter.choose_num_splits(num_queries, num_tiles, num_wanted)
        said = f"{num_queries} {'query' if num_queries == 1 else 'queries'}, {counted(num_tiles, 'tile')}"
        said += f", {counted(num_wanted, 'program')} wanted"
        assert type(got) is int and got == expected, f"choose_num_splits for {said}: got {got!r}, expected {expected}"


# Task 6.6


@pytest.mark.task("6.6", hint="Count with `watching`, as the notebook does for one part, and divide operations by bytes.")
def test_the_intensity_of_six_parts(chapter: Any, record_property: Any) -> None:
    context, heads, head_dim, parts = 96, 2, 64, 6
    operations = 4 * context * heads * head_dim
    least = 2 * (context + 1) * heads * head_dim * 2
    again = parts * heads * (2 * 4 * (head_dim + 2) + 8)  # acc, maximum, total: written and read; and the context's length
    moved = least + again + (parts - 1) * heads * head_dim * 2 + context * heads * 8  # more queries; the table's entries
    expected = operations / moved
    told = {
        "low": "The number is too small. Did you count bytes twice, or those of other launches too?",
        "high": "The number is too large, so bytes are missing. Partial results are written and read again, and each part "
        "reads its query.",
    }
    looks_like = {
        "That looks like the number of bytes. The intensity is operations divided by bytes.": (moved, least),
        "That looks like the number of operations. The intensity is operations divided by bytes.": (operations,),
        "That looks like bytes for each operation. The intensity is operations divided by bytes.": (moved / operations,),
        "That looks like the bytes of decode_work alone, or of one part. Count what the kernels move with 6 parts.": (
            operations / least,
            operations / (moved - again * (parts - 1) / parts - (parts - 1) * heads * head_dim * 2),
        ),
        "That looks like multiplications without additions. decode_work counts both.": (expected / 2,),
    }
    assert_answer(chapter.answer_6_6, expected, 0.06 * expected, record_property, told, looks_like)
