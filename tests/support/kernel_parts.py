"""Kernels with which the tests of chapter 06 call a learner's device function, or stand in for one that does not work."""

from chapters.aids.prefill import TILE
from chapters.aids.triton_anywhere import tl, triton


@triton.jit
def one_program(
    acc_ptr,
    maximum_ptr,
    total_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    first,
    last,
    pool_strides,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ATTEND: tl.constexpr,
):
    """Stores what ``ATTEND``, a learner's ``attend_tokens``, returns for one query."""
    dims = tl.arange(0, PADDED_DIM)
    query = tl.load(query_ptr + dims, mask=dims < HEAD_DIM, other=0.0)
    acc, maximum, total = ATTEND(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    tl.store(acc_ptr + dims, acc, mask=dims < HEAD_DIM)
    tl.store(maximum_ptr, maximum)
    tl.store(total_ptr, total)


@triton.jit
def attend_twice(
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
    """What ``attend_tokens`` must return, in two passes: the maximum first, then the sums."""
    dim = tl.arange(0, PADDED_DIM)[None, :]
    maximum = tl.max(tl.full([TILE], -float("inf"), tl.float32), axis=0)
    for begin in range(first, last, TILE):
        position = (begin + tl.arange(0, TILE))[:, None]
        seen = position < last
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        at = block * pool_strides[0] + position % BLOCK_SIZE * pool_strides[1] + dim
        key = tl.load(key_ptr + at, mask=seen & (dim < HEAD_DIM), other=0.0).to(tl.float32)
        score = tl.sum(query * key, axis=1, keep_dims=True)
        maximum = tl.maximum(maximum, tl.max(tl.max(tl.where(seen, score, -float("inf")), axis=1), axis=0))
    weight_sum = tl.zeros([TILE], tl.float32)
    value_sum = tl.zeros([PADDED_DIM], tl.float32)
    for begin in range(first, last, TILE):
        position = (begin + tl.arange(0, TILE))[:, None]
        seen = position < last
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        at = block * pool_strides[0] + position % BLOCK_SIZE * pool_strides[1] + dim
        key = tl.load(key_ptr + at, mask=seen & (dim < HEAD_DIM), other=0.0).to(tl.float32)
        score = tl.sum(query * key, axis=1, keep_dims=True)
        weight = tl.where(seen, tl.exp(score - maximum), 0.0)
        weight_sum += tl.sum(weight, axis=1)
        value_sum += tl.sum(weight * tl.load(value_ptr + at, mask=seen & (dim < HEAD_DIM), other=0.0).to(tl.float32), axis=0)
    return value_sum, maximum, tl.sum(weight_sum, axis=0)
