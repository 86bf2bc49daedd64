r"""Decode attention in Triton: one query per sequence, over all its K and V, read through the block table.

One program serves one sequence, one K/V head and one split of the context. It reads its tokens a tile at a time, with the
online softmax that :mod:`pagebrain.attention.torch_backend` explains, in float32. A query is one row, and tensor cores
compute sixteen at a time, so the kernel multiplies and sums elements instead; memory is the bottleneck either way. With
several splits each program stores a partial result ``(acc_i, m_i, l_i)``, and a second kernel merges those of a context:

    m = max_i m_i;   out = sum_i exp(m_i - m) acc_i / sum_i exp(m_i - m) l_i

(Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023). The kernel for grouped heads is in
:mod:`pagebrain.kernels.grouped_decode`, the choice of tiles and splits in :mod:`pagebrain.kernels.decode_plan`.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagebrain.errors import KernelError
from pagebrain.kernels.common import LOG2_E, is_interpreted, pool_offsets, split_range
from pagebrain.kernels.decode_plan import MAX_NUM_SEQS, MAX_SPLITS, DecodeTiling, choose_num_splits
from pagebrain.kernels.grouped_decode import grouped_decode_kernel
from pagebrain.kernels.inputs import check_attention, check_device, check_indices, check_out, mismatch


@triton.jit(do_not_specialize=["num_splits", "table_stride"])
def decode_kernel(
    out_ptr,
    partial_acc_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    query_ptr,
    key_pool_ptr,
    value_pool_ptr,
    block_tables_ptr,
    context_lens_ptr,
    query_starts_ptr,
    active_rows_ptr,
    scale_log2e,
    num_splits,
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
    TILE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    tl.static_assert(GROUP == 1)
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_heads = tl.num_programs(0)

    token = seq  # the query's row in the flat batch
    if query_starts_ptr is not None:
        token = tl.load(query_starts_ptr + seq).to(tl.int64)
        if tl.load(query_starts_ptr + seq + 1) - token != 1:
            return  # a prefill, which is another kernel's work, or no query
    state = seq  # the row of its block table and context length
    if active_rows_ptr is not None:
        state = tl.load(active_rows_ptr + seq).to(tl.int64)

    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    query = tl.load(query_ptr + token * query_stride_token + head * query_stride_head + dims, mask=is_dim, other=0.0)
    query = query.to(tl.float32) * scale_log2e  # [PADDED_DIM]
    context_len = tl.load(context_lens_ptr + state).to(tl.int32)
    first, last = split_range(context_len, num_splits, split, TILE)
    table_ptr = block_tables_ptr + state * table_stride
    in_head = head.to(tl.int64) * pool_stride_head + dims

    maximum = -float("inf")
    total = 0.0
    acc = tl.zeros([PADDED_DIM], dtype=tl.float32)
    for tile in tl.range(first, last, TILE, num_stages=STAGES, loop_unroll_factor=UNROLL):
        in_context = tile + tl.arange(0, TILE) < last
        slots = pool_offsets(table_ptr, tile, last, pool_stride_block, pool_stride_slot, BLOCK_SIZE, TILE)
        offsets = slots[:, None] + in_head[None, :]
        # Unused slots are not read: they may hold infinities, which a weight of 0 would turn into NaN.
        is_used = in_context[:, None] & is_dim[None, :]
        keys = tl.load(key_pool_ptr + offsets, mask=is_used, other=0.0)  # [TILE, PADDED_DIM]
        values = tl.load(value_pool_ptr + offsets, mask=is_used, other=0.0)

        scores = tl.sum(query[None, :] * keys.to(tl.float32), axis=1)  # [TILE]
        scores = tl.where(in_context, scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        rescale = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum)
        total = total * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * values.to(tl.float32), axis=0)
        maximum = new_maximum

    if IS_SPLIT:
        partial = (seq * num_heads + head) * num_splits + split
        tl.store(partial_max_ptr + partial, maximum)  # minus infinity marks an empty split; its acc is not read
        tl.store(partial_sum_ptr + partial, total)
        tl.store(partial_acc_ptr + partial * HEAD_DIM + dims, acc, mask=is_dim & (first < last))
    else:
        out = acc / tl.where(total > 0, total, 1.0)  # zeros for a context of no tokens
        tl.store(out_ptr + (token * num_heads + head) * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=is_dim)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    out_ptr,
    partial_acc_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    query_starts_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """Merge the partial results of one query head."""
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(0)
    token = seq
    if query_starts_ptr is not None:
        token = tl.load(query_starts_ptr + seq).to(tl.int64)
        if tl.load(query_starts_ptr + seq + 1) - token != 1:
            return

    splits = tl.arange(0, PADDED_SPLITS)
    dims = tl.arange(0, PADDED_DIM)
    partials = (seq * num_heads + head) * num_splits + splits
    maxima = tl.load(partial_max_ptr + partials, mask=splits < num_splits, other=-float("inf"))
    has_tokens = maxima > -float("inf")
    maximum = tl.maximum(tl.max(maxima, axis=0), -1e38)  # finite, so that empty splits weigh exp2(-inf) = 0
    weights = tl.exp2(maxima - maximum)  # [PADDED_SPLITS]
    totals = tl.load(partial_sum_ptr + partials, mask=has_tokens, other=0.0)
    used = has_tokens[:, None] & (dims < HEAD_DIM)[None, :]
    accs = tl.load(partial_acc_ptr + partials[:, None] * HEAD_DIM + dims[None, :], mask=used, other=0.0)

    total = tl.sum(totals * weights, axis=0)
    out = tl.sum(accs * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (token * num_heads + head) * HEAD_DIM + dims, out, mask=dims < HEAD_DIM)


def paged_decode(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    active_rows: Tensor | None = None,
    query_starts: Tensor | None = None,
    num_splits: int | None = None,
    tiling: DecodeTiling | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence over its whole context. A CUDA graph can hold it: nothing is read to the host.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``; sequence ``i``'s query is row ``i``, or ``query_starts[i]``.
        key_pool, value_pool: ``[num_blocks, block_size, num_kv_heads, head_dim]``, equal strides; ``num_heads`` is a
            multiple of ``num_kv_heads``, and the query heads that share a K/V head follow one another.
        block_tables: int ``[num_rows, max_blocks]``; entries past a sequence's pages are not used.
        context_lens: int ``[num_rows]``. A context of 0 tokens, as padding has, gives zeros.
        scale: factor on the scores.
        active_rows: int ``[num_seqs]``, each sequence's row of ``block_tables`` and ``context_lens``; ``None``: row ``i``.
        query_starts: int ``[num_seqs + 1]`` as :func:`pagebrain.attention.paged_attention` takes it. Sequences that do not
            have exactly one query are left out, and their rows of ``out`` are not written.
        num_splits: splits of each context, at most ``MAX_SPLITS``; ``None`` chooses.
        tiling: how a program reads its split; ``None`` chooses.
        out: result tensor, contiguous, shape and dtype of ``query``; ``None`` makes it.

    Returns:
        ``out``, ``[num_tokens, num_heads, head_dim]`` in the query's dtype.

    Raises:
        KernelError: for tensors that the kernels do not support; nothing was computed.
    """
    num_rows = context_lens.shape[0]
    check_attention(query, key_pool, value_pool, block_tables, context_lens, num_rows)
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_pool.shape[1:3]
    if query_starts is not None:
        num_seqs = query_starts.shape[0] - 1
        check_indices("query_starts", query_starts, num_seqs + 1)
    else:
        num_seqs = num_tokens
    if num_seqs > MAX_NUM_SEQS:
        raise KernelError(f"a launch takes at most {MAX_NUM_SEQS} sequences, got {num_seqs}: compute them in several")
    if active_rows is not None:
        check_indices("active_rows", active_rows, num_seqs)
    elif num_seqs != num_rows:
        raise mismatch("query", f"{num_seqs} sequences", f"{num_rows}, as context_lens has")
    out = query.new_empty(query.shape) if out is None else out
    check_out(out, query)
    check_device(
        is_interpreted(),
        key_pool,
        query=query,
        block_tables=block_tables,
        context_lens=context_lens,
        active_rows=active_rows,
        query_starts=query_starts,
        out=out,
    )
    group = num_heads // num_kv_heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    tiling = tiling or DecodeTiling.for_shape(padded_dim, query.element_size(), group)
    if num_splits is None:
        num_sms = num_multiprocessors(query.device)
        num_splits = choose_num_splits(num_seqs * num_kv_heads, block_tables.shape[1] * block_size, num_sms, tiling)
    if not 1 <= num_splits <= MAX_SPLITS:
        raise KernelError(f"num_splits must be 1 to {MAX_SPLITS}, got {num_splits}")
    if num_seqs == 0:
        return out

    partial_acc, partial_max, partial_sum = None, None, None
    if num_splits > 1:
        partials = (num_seqs, num_heads, num_splits)
        partial_acc = query.new_empty((*partials, head_dim), dtype=torch.float32)
        partial_max, partial_sum = (query.new_empty(partials, dtype=torch.float32) for _ in range(2))
    kernel: Any = decode_kernel if group == 1 else grouped_decode_kernel
    kernel[(num_kv_heads, num_seqs, num_splits)](
        out,
        partial_acc,
        partial_max,
        partial_sum,
        query,
        key_pool,
        value_pool,
        block_tables,
        context_lens,
        query_starts,
        active_rows,
        float(scale) * LOG2_E,
        num_splits,
        *query.stride()[:2],
        *key_pool.stride()[:3],
        block_tables.stride(0),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        GROUP=group,
        BLOCK_SIZE=block_size,
        TILE=tiling.tile,
        IS_SPLIT=num_splits > 1,
        STAGES=tiling.num_stages,
        UNROLL=tiling.unroll,
        num_warps=tiling.num_warps,
    )
    if num_splits > 1:
        merge_kernel[(num_heads, num_seqs)](
            out,
            partial_acc,
            partial_max,
            partial_sum,
            query_starts,
            num_splits,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            PADDED_SPLITS=triton.next_power_of_2(num_splits),
            num_warps=1,
        )
    return out


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter, which runs programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
