"""Task 6.2: jitted helpers, tiles with the tokens along the second axis, and a range that is clamped by the
decode kernel."""


@triton.jit
def places_of(tokens, is_seen, table_ptr, pool_strides, BLOCK_SIZE: tl.constexpr):
    blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0)
    return tl.cast(blocks, tl.int64) * pool_strides[0] + (tokens - tokens // BLOCK_SIZE * BLOCK_SIZE) * pool_strides[1]


@triton.jit
def offset_of(row, strides):
    return row[0].to(tl.int64) * strides[0] + row[1].to(tl.int64) * strides[1]


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
    dims = tl.arange(0, PADDED_DIM)
    is_dim = (dims < HEAD_DIM)[:, None]
    out, largest, weight = tl.zeros([PADDED_DIM], tl.float32), -float("inf"), 0.0
    num_tiles = tl.maximum(0, tl.cdiv(last - first, TILE))
    for tile in range(num_tiles):
        tokens = first + tile * TILE + tl.arange(0, TILE)
        is_seen = tokens < last
        at = places_of(tokens, is_seen, table_ptr, pool_strides, BLOCK_SIZE)[None, :] + dims[:, None]
        key = tl.load(key_ptr + at, mask=is_dim & is_seen[None, :], other=0.0)
        score = tl.sum(key.to(tl.float32) * query[:, None], axis=0) + tl.where(is_seen, 0.0, -float("inf"))
        before, largest = largest, tl.maximum(largest, tl.max(score, axis=0))
        share = tl.exp(score - largest)
        value = tl.load(value_ptr + at, mask=is_dim & is_seen[None, :], other=0.0)
        old = tl.exp(before - largest)
        out = tl.fma(out, old, tl.sum(value.to(tl.float32) * share[None, :], axis=1))
        weight = weight * old + tl.sum(share, axis=0)
    return out, largest, weight


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
    seq, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(context_lens_ptr + seq).to(tl.int32)
    size = tl.cdiv(length, TILE * tl.num_programs(2)) * TILE
    first = tl.minimum(part * size, tl.cdiv(length, TILE) * TILE)
    dims = tl.arange(0, PADDED_DIM)
    query = tl.load(query_ptr + offset_of((seq, head), query_strides) + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
    head_offset = head.to(tl.int64) * pool_strides[2]
    results = attend_tokens(
        query * scale,
        key_pool_ptr + head_offset,
        value_pool_ptr + head_offset,
        tables_ptr + seq.to(tl.int64) * table_stride,
        first,
        tl.minimum(first + size, length),
        pool_strides,
        HEAD_DIM,
        PADDED_DIM,
        BLOCK_SIZE,
    )
    at = (seq.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(2) + part
    tl.store(acc_ptr + at * HEAD_DIM + dims, results[0], mask=dims < HEAD_DIM)
    tl.store(maximum_ptr + at, results[1])
    tl.store(total_ptr + at, results[2])


def choose_num_splits(num_queries: int, num_tiles: int, num_wanted: int) -> int:
    for num_splits in range(1, num_tiles):
        if num_splits * num_queries >= num_wanted:
            return num_splits
    return num_tiles
