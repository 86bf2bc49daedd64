"""Decode attention for grouped heads in Triton: the query heads that share a K/V head share one program.

It is the kernel of :mod:`pagebrain.kernels.decode` with the queries of a group as the rows of a matrix. So tensor cores,
which compute sixteen rows at a time, are used in part, and each K and V is read once for all heads of the group.
"""

import triton
import triton.language as tl

from pagebrain.kernels.common import dot, pool_offsets, split_range


@triton.jit(do_not_specialize=["num_splits", "table_stride"])
def grouped_decode_kernel(
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
    ROWS: tl.constexpr = 16 if GROUP <= 16 else triton.next_power_of_2(GROUP)
    kv_head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_heads = tl.num_programs(0) * GROUP

    token = seq
    if query_starts_ptr is not None:
        token = tl.load(query_starts_ptr + seq).to(tl.int64)
        if tl.load(query_starts_ptr + seq + 1) - token != 1:
            return
    state = seq
    if active_rows_ptr is not None:
        state = tl.load(active_rows_ptr + seq).to(tl.int64)

    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    heads = kv_head * GROUP + tl.arange(0, ROWS)  # the query heads of this K/V head; rows past the group are padding
    exists = (tl.arange(0, ROWS) < GROUP)[:, None] & is_dim[None, :]
    query_offsets = token * query_stride_token + heads[:, None] * query_stride_head + dims[None, :]
    query = tl.load(query_ptr + query_offsets, mask=exists, other=0.0)  # [ROWS, PADDED_DIM]
    context_len = tl.load(context_lens_ptr + state).to(tl.int32)
    first, last = split_range(context_len, num_splits, split, TILE)
    table_ptr = block_tables_ptr + state * table_stride
    in_head = kv_head.to(tl.int64) * pool_stride_head + dims

    maximum = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, PADDED_DIM], dtype=tl.float32)
    for tile in tl.range(first, last, TILE, num_stages=STAGES, loop_unroll_factor=UNROLL):
        in_context = tile + tl.arange(0, TILE) < last
        slots = pool_offsets(table_ptr, tile, last, pool_stride_block, pool_stride_slot, BLOCK_SIZE, TILE)
        offsets = slots[:, None] + in_head[None, :]
        is_used = in_context[:, None] & is_dim[None, :]
        keys = tl.load(key_pool_ptr + offsets, mask=is_used, other=0.0)  # [TILE, PADDED_DIM]
        values = tl.load(value_pool_ptr + offsets, mask=is_used, other=0.0)

        scores = dot(query, tl.trans(keys)) * scale_log2e  # [ROWS, TILE]
        scores = tl.where(in_context[None, :], scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        rescale = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        acc = dot(weights.to(values.dtype), values, acc * rescale[:, None])
        maximum = new_maximum

    if IS_SPLIT:
        is_head = tl.arange(0, ROWS) < GROUP
        partials = (seq * num_heads + heads) * num_splits + split
        tl.store(partial_max_ptr + partials, maximum, mask=is_head)
        tl.store(partial_sum_ptr + partials, total, mask=is_head)
        tl.store(partial_acc_ptr + partials[:, None] * HEAD_DIM + dims[None, :], acc, mask=exists & (first < last))
    else:
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        out_offsets = (token * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=exists)
