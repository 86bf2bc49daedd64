"""The prefill kernel, which computes attention of many queries; and what the launches of chapter 06 have in common.

Read it when task 6.2 is done, because it is nearly the same loop. With many queries of one sequence the sums of products are
products of matrices, ``tl.dot``, for which a GPU has special units. Otherwise this is the loop of
``ch06_kernels.attend_tokens`` with one more axis and a causal mask.
"""

import torch
from torch import Tensor

from chapters.aids.triton_anywhere import INTERPRETED, tl, triton

TILE = tl.constexpr(16)
"""Tokens that a program reads with one load. With 64 numbers of 2 bytes each, that is 2 KiB of keys."""

QUERY_TILE = tl.constexpr(16)
"""Queries that a program computes together: the smallest number that a matrix unit takes."""


@triton.jit
def prefill_kernel(
    out_ptr,
    query_ptr,
    key_pool_ptr,
    value_pool_ptr,
    tables_ptr,
    context_lens_ptr,
    starts_ptr,
    ends_ptr,
    scale,
    query_strides,
    pool_strides,
    table_stride,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """``QUERY_TILE`` queries of one sequence and head share each tile of keys. The grid is (sequences, heads, tiles).

    Queries of sequence ``i`` are rows ``starts[i] .. ends[i] - 1``, its newest tokens. ``NUMBER`` is the type of the factors
    of matrix products; sums are float32. Everything else is as in ``ch06_kernels.decode_kernel``.
    """
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    end, context_len = tl.load(ends_ptr + seq), tl.load(context_lens_ptr + seq)
    rows = tl.load(starts_ptr + seq) + tl.program_id(2) * QUERY_TILE + tl.arange(0, QUERY_TILE)
    positions = context_len - end + rows  # each query sees tokens up to its own
    num_seen = tl.minimum(context_len, tl.max(positions, axis=0) + 1)

    columns = tl.arange(0, PADDED_DIM)[None, :]
    is_query = (rows < end)[:, None] & (columns < HEAD_DIM)
    query_places = rows[:, None] * query_strides[0] + head * query_strides[1] + columns
    queries = tl.load(query_ptr + query_places, mask=is_query, other=0.0).to(NUMBER)  # [QUERY_TILE, PADDED_DIM]
    weighted = tl.zeros([QUERY_TILE, PADDED_DIM], dtype=tl.float32)
    largest = tl.full([QUERY_TILE], -float("inf"), dtype=tl.float32)
    sums = tl.zeros([QUERY_TILE], dtype=tl.float32)
    for begin in range(0, num_seen, TILE):
        token = begin + tl.arange(0, TILE)
        pages = tables_ptr + seq * table_stride + token // BLOCK_SIZE
        blocks = tl.load(pages, mask=token < num_seen, other=0).to(tl.int64)
        slots = blocks * pool_strides[0] + token % BLOCK_SIZE * pool_strides[1] + head * pool_strides[2]
        is_key = (token < num_seen)[:, None] & (columns < HEAD_DIM)
        key_tile = tl.load(key_pool_ptr + slots[:, None] + columns, mask=is_key, other=0.0).to(NUMBER)
        value_tile = tl.load(value_pool_ptr + slots[:, None] + columns, mask=is_key, other=0.0).to(NUMBER)

        scores = tl.dot(queries, tl.trans(key_tile), input_precision="ieee") * scale  # [QUERY_TILE, TILE]
        scores = tl.where(token[None, :] <= positions[:, None], scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - larger[:, None])
        factor = tl.exp(largest - larger)
        weighted = weighted * factor[:, None] + tl.dot(weights.to(NUMBER), value_tile, input_precision="ieee")
        sums = sums * factor + tl.sum(weights, axis=1)
        largest = larger
    out_places = (rows[:, None] * tl.num_programs(1) + head) * HEAD_DIM + columns
    tl.store(out_ptr + out_places, weighted / sums[:, None], mask=is_query)


def paged_prefill(
    out: Tensor,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    starts: Tensor,
    ends: Tensor,
    scale: float,
) -> None:
    """Causal attention of rows ``starts[i] .. ends[i] - 1`` of ``query`` for each sequence ``i``, into those of ``out``.

    Args:
        out, query: ``[num_tokens, num_heads, head_dim]``; ``out`` is contiguous.
        key_pool, value_pool: ``[num_blocks, block_size, num_heads, head_dim]``.
        block_tables: ``[num_seqs, max_blocks]``.
        context_lens, starts, ends: ``[num_seqs]``.
        scale: factor on the scores.
    """
    check_alike(key_pool, value_pool)
    grid = len(starts), query.shape[1], triton.cdiv(int((ends - starts).max()), QUERY_TILE.value)
    # The interpreter holds bfloat16 as 16-bit integers, and would multiply those.
    halves = {} if INTERPRETED else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    strides = query.stride()[:2], key_pool.stride()[:3], block_tables.stride(0)
    inputs = (query, key_pool, value_pool, block_tables, context_lens, starts, ends, float(scale), *strides)
    prefill_kernel[grid](out, *inputs, **sizes(key_pool), NUMBER=halves.get(query.dtype, tl.float32))


def sizes(pool: Tensor) -> dict[str, int]:
    """The constants that kernels over a pool ``[num_blocks, block_size, num_heads, head_dim]`` are compiled for."""
    head_dim = pool.shape[3]
    return {"HEAD_DIM": head_dim, "PADDED_DIM": max(16, triton.next_power_of_2(head_dim)), "BLOCK_SIZE": pool.shape[1]}


def check_alike(key: Tensor, value: Tensor) -> None:
    """Raise ``ValueError`` unless one set of offsets serves both, and the numbers of a head lie side by side."""
    if key.shape != value.shape or key.stride() != value.stride() or key.stride(-1) != 1:
        layouts = [f"{list(tensor.shape)} with strides {tensor.stride()}" for tensor in (key, value)]
        raise ValueError(f"K and V must lie alike and end in a stride of 1, got {' and '.join(layouts)}")
