"""Task 6.3: every sequence reads the first row of the table."""


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
    table_ptr = tables_ptr + seq * 0
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)
