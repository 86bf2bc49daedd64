"""Prefill attention in Triton: several queries of a sequence at a time on the tensor cores, causal, over its pages.

The flat batch is cut into tiles of ``BLOCK_M`` queries of one sequence, and a program computes one tile for one query head.
The grid depends on shapes alone, because the host does not know where sequences begin. Sequence ``i`` has the tiles from
``query_starts[i] // BLOCK_M + i`` up to the first one of the next sequence: enough for its queries, and at most one more. A
program finds its sequence by counting the sequences whose first tile is not after its own. K and V of the prefix and of the
new tokens are both read through the block table.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pagebrain.kernels.common import LOG2_E, dot, is_interpreted, pool_offsets
from pagebrain.kernels.inputs import check_attention, check_device, check_indices, check_out


@dataclass(frozen=True)
class PrefillTiling:
    """Queries and keys of one iteration of a program, powers of two from 16, and Triton's compile options."""

    block_m: int = 64
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def for_shape(cls, padded_dim: int, itemsize: int) -> "PrefillTiling":
        """The tiling for a head dimension (padded to a power of two) and the bytes of a number.

        Hopper's matrix instructions take four warps and 64 rows. There is none for float32 at full precision: these products
        are computed in registers, and larger tiles would spill them.
        """
        if itemsize == 2:
            return cls()
        return cls(block_m=32 if padded_dim <= 64 else 16, block_n=16, num_stages=1)


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def prefill_kernel(
    out_ptr,
    query_ptr,
    key_pool_ptr,
    value_pool_ptr,
    block_tables_ptr,
    context_lens_ptr,
    query_starts_ptr,
    active_rows_ptr,
    num_seqs,
    scale_log2e,
    query_stride_token,
    query_stride_head,
    pool_stride_block,
    pool_stride_slot,
    pool_stride_head,
    table_stride,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIP_DECODES: tl.constexpr,
):
    SEQS: tl.constexpr = 128  # sequences that are loaded at once
    tile = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)

    num_begun = 0
    for first_seq in tl.range(0, num_seqs, SEQS):
        seqs = first_seq + tl.arange(0, SEQS)
        starts = tl.load(query_starts_ptr + seqs, mask=seqs < num_seqs, other=0).to(tl.int32)
        num_begun += tl.sum(((starts // BLOCK_M + seqs <= tile) & (seqs < num_seqs)).to(tl.int32), axis=0)
    seq = num_begun - 1
    query_start = tl.load(query_starts_ptr + seq).to(tl.int32)
    query_len = tl.load(query_starts_ptr + seq + 1).to(tl.int32) - query_start
    first_query = (tile - (query_start // BLOCK_M + seq)) * BLOCK_M
    if first_query >= query_len:
        return  # a tile past the sequence's queries
    if SKIP_DECODES:
        if query_len == 1:
            return  # the decode kernel's work

    state = tl.cast(seq, tl.int64)  # the row of its block table and context length
    if active_rows_ptr is not None:
        state = tl.load(active_rows_ptr + state).to(tl.int64)
    context_len = tl.load(context_lens_ptr + state).to(tl.int32)
    table_ptr = block_tables_ptr + state * table_stride
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    queries = first_query + tl.arange(0, BLOCK_M)
    exists = (queries < query_len)[:, None] & is_dim[None, :]
    tokens = (query_start + queries).to(tl.int64)
    query_offsets = tokens[:, None] * query_stride_token + head * query_stride_head + dims[None, :]
    query = tl.load(query_ptr + query_offsets, mask=exists, other=0.0)  # [BLOCK_M, PADDED_DIM]
    positions = context_len - query_len + queries  # a query attends to the keys up to its own position
    last = tl.minimum(context_len, context_len - query_len + first_query + BLOCK_M)
    in_head = (head // GROUP).to(tl.int64) * pool_stride_head + dims

    maximum = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], dtype=tl.float32)
    for first_key in tl.range(0, last, BLOCK_N):
        key_positions = first_key + tl.arange(0, BLOCK_N)
        slots = pool_offsets(table_ptr, first_key, last, pool_stride_block, pool_stride_slot, BLOCK_SIZE, BLOCK_N)
        offsets = slots[:, None] + in_head[None, :]
        is_used = (key_positions < last)[:, None] & is_dim[None, :]
        keys = tl.load(key_pool_ptr + offsets, mask=is_used, other=0.0)  # [BLOCK_N, PADDED_DIM]
        values = tl.load(value_pool_ptr + offsets, mask=is_used, other=0.0)

        scores = dot(query, tl.trans(keys)) * scale_log2e  # [BLOCK_M, BLOCK_N]
        scores = tl.where(key_positions[None, :] <= positions[:, None], scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        rescale = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        acc = dot(weights.to(values.dtype), values, acc * rescale[:, None])
        maximum = new_maximum

    out = acc / total[:, None]
    out_offsets = (tokens[:, None] * num_heads + head) * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=exists)


def paged_prefill(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    *,
    skip_decodes: bool = False,
    active_rows: Tensor | None = None,
    tiling: PrefillTiling | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's newest tokens over all its tokens. Nothing is read to the host.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``; the rows of sequence ``i`` are
            ``query_starts[i] .. query_starts[i + 1] - 1`` and are its last tokens.
        key_pool, value_pool: ``[num_blocks, block_size, num_kv_heads, head_dim]``, equal strides.
        block_tables: int ``[num_rows, max_blocks]``; entries past a sequence's pages are not used.
        context_lens: int ``[num_rows]``, tokens cached including those of this step.
        query_starts: int ``[num_seqs + 1]``.
        scale: factor on the scores.
        skip_decodes: leave out sequences with exactly one query; their rows of ``out`` are not written.
        active_rows: int ``[num_seqs]``, each sequence's row of ``block_tables`` and ``context_lens``; ``None``: row ``i``.
        tiling: sizes of the tiles; ``None`` chooses.
        out: result tensor, contiguous, shape and dtype of ``query``; ``None`` makes it.

    Returns:
        ``out``, ``[num_tokens, num_heads, head_dim]`` in the query's dtype.

    Raises:
        KernelError: for tensors that the kernel does not support; nothing was computed.
    """
    num_rows = context_lens.shape[0]
    check_attention(query, key_pool, value_pool, block_tables, context_lens, num_rows)
    num_seqs = num_rows if active_rows is None else active_rows.shape[0]
    check_indices("query_starts", query_starts, num_seqs + 1)
    if active_rows is not None:
        check_indices("active_rows", active_rows, num_seqs)
    num_tokens, num_heads, head_dim = query.shape
    out = query.new_empty(query.shape) if out is None else out
    check_out(out, query)
    check_device(
        is_interpreted(),
        key_pool,
        query=query,
        block_tables=block_tables,
        context_lens=context_lens,
        query_starts=query_starts,
        active_rows=active_rows,
        out=out,
    )
    if num_tokens == 0 or num_seqs == 0:
        return out
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    tiling = tiling or PrefillTiling.for_shape(padded_dim, query.element_size())
    prefill_kernel[(num_tokens // tiling.block_m + num_seqs, num_heads)](
        out,
        query,
        key_pool,
        value_pool,
        block_tables,
        context_lens,
        query_starts,
        active_rows,
        num_seqs,
        float(scale) * LOG2_E,
        *query.stride()[:2],
        *key_pool.stride()[:3],
        block_tables.stride(0),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        GROUP=num_heads // key_pool.shape[2],
        BLOCK_SIZE=key_pool.shape[1],
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        SKIP_DECODES=skip_decodes,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out
