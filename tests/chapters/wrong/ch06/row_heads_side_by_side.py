"""Task 6.1: the heads of a new token are taken to lie side by side."""


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
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    exists = dims < HEAD_DIM
    slot = tl.load(slots_ptr + token).to(tl.int64)
    row = token * row_strides[0] + head * HEAD_DIM + dims
    place = slot // BLOCK_SIZE * pool_strides[0] + slot % BLOCK_SIZE * pool_strides[1] + head * pool_strides[2] + dims
    tl.store(key_pool_ptr + place, tl.load(key_ptr + row, mask=exists), mask=exists)
    tl.store(value_pool_ptr + place, tl.load(value_ptr + row, mask=exists), mask=exists)
