r"""Chapter 06: attention as kernels, the programs that a GPU runs.

Chapter 03 attends to pages where they lie. But in PyTorch each page is an operation of its own, started from Python, and
what the operation picks from the pool is copied. A kernel does the whole work in one operation. It is a program of which a
GPU runs thousands of copies side by side. Each copy has a number, and finds its share of the work by that number. Triton
is a form of Python for kernels. A program in Triton computes with tiles, which are small arrays, and the compiler spreads a
tile over the threads of the GPU.

In a decode, each sequence and head has one query, and each query gets a program. The program walks over the block table, a
tile of tokens at a time, and keeps the three numbers of chapter 03. That is enough for a full batch. For a single long
sequence it would leave most of the GPU idle. So a context is split into parts, and a program attends to one part. The three
numbers of the parts are put together as those of pages are, by a second kernel:

    m = max_i m_i,    out = sum_i exp(m_i - m) acc_i / sum_i exp(m_i - m) l_i

(Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023). The highest possible speed of a kernel is
known before the kernel is written, because K and V have to be read once, and memory has a known speed (the roofline of
Williams, Waterman and Patterson, 2009).

What changes from chapter 03: attention and the writing of K and V are kernels. Without a GPU they run in Triton's
interpreter. The interpreter is slow, and shows whether the numbers are right. Sums are kept in float32, whatever the model's
dtype. Triton exists for Linux on x86-64.

A word used below: ``TILE`` is a constant, 16. It is the number of tokens that a program reads with one load.

Tasks (38 points, about 5.5 hours):

- 6.1 (5 points) ``write_kernel``: K and V of new tokens to their slots.
- 6.2 (10 points) ``attend_tokens``: one query over a range of tokens, tile by tile through the block table.
- 6.3 (8 points) ``decode_kernel``: a program for each sequence, head and part of the context.
- 6.4 (6 points) ``merge_kernel``: the parts put together.
- 6.5 (6 points) ``decode_work``, ``floor_seconds`` and ``choose_num_splits``: what is possible, and how many parts to use.
- 6.6 (3 points) ``answer_6_6``: at which point of the roofline your kernels are, measured and explained.

Know first: chapters 02 and 03; how a tensor's strides lead to an address.
From pagebrain: ``model_config.attention_scale`` and the ``Observer`` of ``pagebrain.engine.trace``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from chapters import ch02_block_table
from chapters.aids.prefill import TILE, check_alike, paged_prefill, sizes
from chapters.aids.triton_anywhere import tl, triton
from chapters.ch00_baseline import OnLogits
from chapters.ch01_naive_kv_cache import Attend
from chapters.ch02_block_table import PagedCache, Rows
from pagebrain.engine.trace import Observer
from pagebrain.model_config import attention_scale


@triton.jit
def write_kernel(
    key_ptr,
    value_ptr,
    key_pool_ptr,
    value_pool_ptr,
    slots_ptr,
    row_strides,
    pool_strides,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Task 6.1: copy one head's K and V of one token to the token's slot. The grid is ``(num_tokens, num_heads)``.

    As in chapter 02, slot = block id * ``BLOCK_SIZE`` + place in the block.

    A ``..._ptr`` is the address of a tensor's first number. Strides count numbers. The numbers of a head lie side by side.

    Args:
        key_ptr, value_ptr: ``[num_tokens, num_heads, HEAD_DIM]``; ``row_strides`` are those of token and head.
        key_pool_ptr, value_pool_ptr: ``[num_blocks, BLOCK_SIZE, num_heads, HEAD_DIM]``; ``pool_strides`` are those of block,
            slot in a block, and head. Offsets into a pool need 64 bits.
        slots_ptr: ``[num_tokens]``, int32 or int64.
        PADDED_DIM: a power of 2 that is not less than ``HEAD_DIM``, because tiles have no other sizes.
    """
    # BEGIN SOLUTION 6.1
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    exists = dims < HEAD_DIM
    slot = tl.load(slots_ptr + token).to(tl.int64)
    row = token * row_strides[0] + head * row_strides[1] + dims
    place = slot // BLOCK_SIZE * pool_strides[0] + slot % BLOCK_SIZE * pool_strides[1] + head * pool_strides[2] + dims
    tl.store(key_pool_ptr + place, tl.load(key_ptr + row, mask=exists), mask=exists)
    tl.store(value_pool_ptr + place, tl.load(value_ptr + row, mask=exists), mask=exists)
    # END SOLUTION


@triton.jit
def attend_tokens(
    query,
    key_ptr,
    value_ptr,
    table_ptr,
    first,
    last,
    pool_strides,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Task 6.2: one head's query over tokens ``first .. last - 1`` of its sequence, ``TILE`` of them at a time.

    The task also asks two things: one load of K and one of V for each ``TILE`` tokens, and no K or V read twice.

    Args:
        query: ``[PADDED_DIM]`` in float32, scaled already; zeros from ``HEAD_DIM`` on.
        key_ptr, value_ptr: the head's first number in slot 0 of block 0. ``pool_strides`` are as in ``write_kernel``. Slots
            that hold no token of the sequence hold anything, even nan.
        table_ptr: the sequence's block table, int32 or int64. Entries past the page of token ``last - 1`` must not be read.
        first, last: ``first`` is a multiple of ``TILE``, which may lie in the middle of a page: ``BLOCK_SIZE`` is any number
            from 1 up. The range may be empty; then ``first`` may be larger than ``last``.

    Returns:
        ``acc`` ``[PADDED_DIM]``, ``maximum`` and ``total`` as in chapter 03, in float32. For an empty range they are 0,
        minus infinity and 0.
    """
    # BEGIN SOLUTION 6.2
    dims = tl.arange(0, PADDED_DIM)
    acc = tl.zeros([PADDED_DIM], dtype=tl.float32)
    maximum = -float("inf")
    total = 0.0
    for start in range(first, last, TILE):
        tokens = start + tl.arange(0, TILE)
        is_seen = tokens < last
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total
    # END SOLUTION


@triton.jit
def decode_kernel(
    acc_ptr,
    maximum_ptr,
    total_ptr,
    query_ptr,
    key_pool_ptr,
    value_pool_ptr,
    tables_ptr,
    context_lens_ptr,
    scale,
    query_strides,
    pool_strides,
    table_stride,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Task 6.3: one head's query over a part of its context. The grid is ``(num_seqs, num_heads, num_splits)``.

    Parts begin at multiples of ``TILE``. The tiles are shared out evenly: no part has more than ``num_tiles / num_splits``
    tiles, rounded up. Of 6 tiles, 4 parts may have 2, 2, 2 and 0, or 2, 2, 1 and 1. An empty part writes what
    ``attend_tokens`` returns for an empty range.

    Args:
        acc_ptr: ``[num_seqs, num_heads, num_splits, HEAD_DIM]``, float32, contiguous. It is not divided by ``total``.
        maximum_ptr, total_ptr: ``[num_seqs, num_heads, num_splits]``, float32, contiguous.
        query_ptr: ``[num_seqs, num_heads, HEAD_DIM]``; ``query_strides`` are those of sequence and head.
        key_pool_ptr, value_pool_ptr, pool_strides: as in ``write_kernel``.
        tables_ptr: ``[num_seqs, max_blocks]``; ``table_stride`` is that of the sequence.
        context_lens_ptr: ``[num_seqs]``, int32 or int64, at least 1 each.
        scale: factor on the scores. The product of query and scale is computed in float32.
    """
    # BEGIN SOLUTION 6.3
    seq, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_splits = tl.num_programs(2)
    context_len = tl.load(context_lens_ptr + seq).to(tl.int32)
    part = tl.cdiv(tl.cdiv(context_len, TILE), num_splits) * TILE
    first, last = split * part, tl.minimum((split + 1) * part, context_len)

    dims = tl.arange(0, PADDED_DIM)
    exists = dims < HEAD_DIM
    query = tl.load(query_ptr + seq * query_strides[0] + head * query_strides[1] + dims, mask=exists, other=0.0)
    query = query.to(tl.float32) * scale
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[2], value_pool_ptr + head * pool_strides[2]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)
    # END SOLUTION


@triton.jit
def merge_kernel(
    out_ptr,
    acc_ptr,
    maximum_ptr,
    total_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """Task 6.4: put the parts of one head's query together. The grid is ``(num_seqs, num_heads)``.

    Args:
        out_ptr: ``[num_seqs, num_heads, HEAD_DIM]``, contiguous.
        acc_ptr, maximum_ptr, total_ptr, num_splits: what ``decode_kernel`` wrote. Some parts may be empty, but not all.
        PADDED_SPLITS: a power of 2 that is not less than ``num_splits``.
    """
    # BEGIN SOLUTION 6.4
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(weights * totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)
    # END SOLUTION


class Work(NamedTuple):
    """The work that remains however a kernel is written."""

    num_bytes: int
    num_operations: int

    @property
    def intensity(self) -> float:
        """Operations for each byte that is read or written."""
        return self.num_operations / self.num_bytes


def decode_work(num_seqs: int, context_len: int, num_heads: int, head_dim: int, itemsize: int) -> Work:
    """Task 6.5: the work of attention for one query of each of ``num_seqs`` sequences of ``context_len`` tokens.

    Bytes: K and V of every token and the queries are read once, and the results are written once. ``itemsize`` is the
    bytes of a number. Operations: those of the two sums of products; a multiplication is one, and an addition is one.
    """
    # BEGIN SOLUTION 6.5
    numbers = num_seqs * num_heads * head_dim
    return Work(2 * numbers * (context_len + 1) * itemsize, 4 * numbers * context_len)
    # END SOLUTION


def floor_seconds(work: Work, bytes_per_s: float, operations_per_s: float) -> float:
    """Task 6.5: the shortest time that a machine can need for ``work``, if it moves bytes and computes at the same time."""
    # BEGIN SOLUTION 6.5
    return max(work.num_bytes / bytes_per_s, work.num_operations / operations_per_s)
    # END SOLUTION


def choose_num_splits(num_queries: int, num_tiles: int, num_wanted: int) -> int:
    """Task 6.5: the number of parts into which each context is cut. Each part of each query is a program.

    It is the smallest number that gives ``num_wanted`` programs or more, because each further part is a result that has to
    be written and read again. But it is never more than ``num_tiles``, the tiles of the longest context.
    """
    # BEGIN SOLUTION 6.5
    return min(-(-num_wanted // num_queries), num_tiles)
    # END SOLUTION


def answer_6_6() -> tuple[float, str]:
    """Task 6.6: at which point of the roofline are your decode kernels?

    The number: the arithmetic intensity, operations divided by bytes, of ``paged_decode`` for one sequence of 96 tokens
    with 2 heads of 64 numbers in float16, in blocks of 16, cut into 6 parts. Operations are those of ``decode_work``.
    Bytes are all that ``decode_kernel`` and ``merge_kernel`` read and write. The notebook counts them for one part with
    ``scene`` and ``watching``. Do the same for 6 parts in a cell there, and return the number that you found, written as a
    number: nothing is counted in this file.

    The text, one to four sentences and at least 8 different words, goes to your instructor: on which side of the ridge is
    this point, so which of the roofline's two limits is above it (bandwidth or arithmetic), what would the intensity be if
    only the bytes of ``decode_work`` were moved, and where do the other bytes come from?
    """
    # BEGIN SOLUTION 6.6
    text = (
        "The point is far to the left of the ridge, so memory bandwidth limits these kernels and arithmetic "
        "does not. With the "
        "bytes of decode_work alone the intensity would be 0.99. The other bytes are the partial results, which "
        "are written and "
        "read again for each part, the query, which each part reads, and the block table, which each head reads."
    )
    return 49152 / 58912, text
    # END SOLUTION


def num_wanted_programs(device: torch.device) -> int:
    """How many programs keep a device busy: on a GPU 24, of one warp each, for each of its multiprocessors.

    The interpreter runs programs one after the other, so a few of them are enough to test splitting.
    """
    return 24 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def write_kv(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor) -> None:
    """Launch ``write_kernel``: K and V ``[num_tokens, num_heads, head_dim]`` to ``slots`` ``[num_tokens]`` of the pools."""
    check_alike(key, value)
    check_alike(key_pool, value_pool)
    tensors, strides = (key, value, key_pool, value_pool, slots), (key.stride()[:2], key_pool.stride()[:3])
    write_kernel[key.shape[:2]](*tensors, *strides, **sizes(key_pool), num_warps=1)


def paged_decode(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    num_splits: int | None = None,
) -> Tensor:
    """Launch the decode kernels: a query ``[num_seqs, num_heads, head_dim]`` for each sequence. ``None`` chooses splits."""
    check_alike(key_pool, value_pool)
    num_seqs, num_heads, head_dim = query.shape
    if num_splits is None:
        num_tiles = triton.cdiv(block_tables.shape[1] * key_pool.shape[1], TILE.value)  # the host does not know the lengths
        num_splits = choose_num_splits(num_seqs * num_heads, num_tiles, num_wanted_programs(query.device))
    accs = query.new_empty((num_seqs, num_heads, num_splits, head_dim), dtype=torch.float32)
    maxima, totals = query.new_empty((2, num_seqs, num_heads, num_splits), dtype=torch.float32)
    inputs = (query, key_pool, value_pool, block_tables, context_lens, float(scale))
    strides = query.stride()[:2], key_pool.stride()[:3], block_tables.stride(0)
    decode_kernel[num_seqs, num_heads, num_splits](accs, maxima, totals, *inputs, *strides, **sizes(key_pool), num_warps=1)
    out = query.new_empty(query.shape)
    padded = {"PADDED_DIM": sizes(key_pool)["PADDED_DIM"], "PADDED_SPLITS": triton.next_power_of_2(num_splits)}
    merge_kernel[num_seqs, num_heads](out, accs, maxima, totals, num_splits, HEAD_DIM=head_dim, **padded, num_warps=1)
    return out


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention for a batch of sequences, with chapter 03's arguments. A head's numbers lie side by side.

    Sequences with one query go to the decode kernels, the others to the prefill kernel. To tell them apart, the host waits
    for the GPU here. The engine's kernels read the lengths themselves.
    """
    out = query.new_empty(query.shape)
    query_lens = query_starts.diff()
    decodes, prefills = (torch.nonzero(which).flatten() for which in (query_lens == 1, query_lens > 1))
    pools = key_pool, value_pool
    if len(decodes):
        rows = query_starts[decodes]
        out[rows] = paged_decode(query[rows], *pools, block_tables[decodes], context_lens[decodes], scale)
    if len(prefills):
        own = block_tables[prefills], context_lens[prefills], query_starts[prefills], query_starts[prefills + 1]
        paged_prefill(out, query, *pools, *own, scale)
    return out


def attend_by_kernels(model: GPT2LMHeadModel, cache: PagedCache, rows: Rows) -> Attend:
    """Attention of a step whose K and V are written and read by kernels."""
    tables = [cache.block_table(seq_id) for seq_id in rows.seq_ids]
    width = max(map(len, tables))
    device = cache.key_pools.device
    block_tables = torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], device=device)
    context_lens = torch.tensor(rows.context_lens, device=device)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pools = cache.key_pools[layer], cache.value_pools[layer]
        write_kv(key, value, *pools, rows.slots)
        scale = attention_scale(model.config, layer)
        return paged_attention(query, *pools, block_tables, context_lens, rows.query_starts, scale)

    return attend


def generate(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_logits: OnLogits | None = None,
    *,
    block_size: int = 16,
    on_step: Observer | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt: the loop of chapter 02 around this chapter's kernels."""
    return ch02_block_table.generate(
        model, prompts, max_new_tokens, on_logits, block_size=block_size, make_attend=attend_by_kernels, on_step=on_step
    )


# When your tasks are done, compare them with the engine's kernels: pagebrain.kernels.decode and its neighbours.
# In vLLM: vllm/attention/ops.
