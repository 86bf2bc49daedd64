"""Task 6.3: the first parts have a tile more than the last; exponents to the base 2; the merge goes from part to part."""


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
    token = tl.program_id(axis=0)
    head = tl.program_id(axis=1)
    slot = tl.cast(tl.load(slots_ptr + token), tl.int64)
    block = slot // BLOCK_SIZE
    dims = tl.arange(0, PADDED_DIM)
    at = block * pool_strides[0] + (slot - block * BLOCK_SIZE) * pool_strides[1] + head * pool_strides[2] + dims
    row = token * row_strides[0] + head * row_strides[1] + dims
    key = tl.load(key_ptr + row, mask=dims < HEAD_DIM, other=0.0)
    value = tl.load(value_ptr + row, mask=dims < HEAD_DIM, other=0.0)
    tl.store(key_pool_ptr + at, key, mask=dims < HEAD_DIM)
    tl.store(value_pool_ptr + at, value, mask=dims < HEAD_DIM)


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
    query = (query * 1.4426950408889634)[:, None]
    dims = tl.arange(0, PADDED_DIM)[:, None]  # a tile is [PADDED_DIM, TILE] here
    maximum = tl.full([], -1e38, dtype=tl.float32)
    total = tl.full([], 0.0, dtype=tl.float32)
    acc = tl.zeros([PADDED_DIM], dtype=tl.float32)
    for start in tl.range(first, last, TILE):
        tokens = start + tl.arange(0, TILE)
        seen = tokens < last
        ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=seen, other=0)
        slots = ids.to(tl.int64) * pool_strides[0] + (tokens % BLOCK_SIZE).to(tl.int64) * pool_strides[1]
        used = seen[None, :] & (dims < HEAD_DIM)
        keys = tl.load(key_ptr + slots[None, :] + dims, mask=used, other=0.0)
        scores = tl.sum(query * keys.to(tl.float32), axis=0)
        scores = tl.where(seen, scores, -1e38)
        before = maximum
        maximum = tl.maximum(before, tl.max(scores, axis=0))
        weights = tl.where(seen, tl.exp2(scores - maximum), 0.0)
        values = tl.load(value_ptr + slots[None, :] + dims, mask=used, other=0.0)
        acc = tl.exp2(before - maximum) * acc + tl.sum(values.to(tl.float32) * weights[None, :], axis=1)
        total = tl.exp2(before - maximum) * total + tl.sum(weights, axis=0)
    return acc, tl.where(total > 0, maximum / 1.4426950408889634, -float("inf")), total


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
    seq = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(context_lens_ptr + seq).to(tl.int32)
    num_tiles = (length + TILE - 1) // TILE
    fewest = num_tiles // tl.num_programs(2)
    num_larger = num_tiles % tl.num_programs(2)
    first = (split * fewest + tl.minimum(split, num_larger)) * TILE
    last = first + (fewest + (split < num_larger).to(tl.int32)) * TILE
    dims = tl.arange(0, PADDED_DIM)
    query = tl.load(query_ptr + seq * query_strides[0] + head * query_strides[1] + dims, mask=dims < HEAD_DIM, other=0.0)
    in_head = head.to(tl.int64) * pool_strides[2]
    acc, maximum, total = attend_tokens(
        scale * query.to(tl.float32),
        key_pool_ptr + in_head,
        value_pool_ptr + in_head,
        tables_ptr + seq.to(tl.int64) * table_stride,
        first,
        tl.minimum(last, length),
        pool_strides,
        HEAD_DIM,
        PADDED_DIM,
        BLOCK_SIZE,
    )
    part = (seq.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(2) + split
    tl.store(total_ptr + part, total)
    tl.store(maximum_ptr + part, maximum)
    tl.store(acc_ptr + part * HEAD_DIM + dims, acc, mask=dims < HEAD_DIM)


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
    query = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    dims = tl.arange(0, PADDED_DIM)
    out = tl.zeros([PADDED_DIM], dtype=tl.float32)
    sums = 0.0
    largest = -1e38
    for part in range(0, num_splits):
        row = query.to(tl.int64) * num_splits + part
        maximum = tl.load(maximum_ptr + row)
        new = tl.maximum(largest, maximum)
        weight = tl.exp(maximum - new)
        shrink = tl.exp(largest - new)
        acc = tl.load(acc_ptr + row * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        out = out * shrink + acc * weight
        sums = sums * shrink + tl.load(total_ptr + row) * weight
        largest = new
    tl.store(out_ptr + query * HEAD_DIM + dims, out / sums, mask=dims < HEAD_DIM)


def decode_work(num_seqs: int, context_len: int, num_heads: int, head_dim: int, itemsize: int) -> Work:
    token_bytes = 2 * num_heads * head_dim * itemsize  # of K and V; a query and its result are as many
    num_operations = num_seqs * num_heads * context_len * (2 * head_dim + 2 * head_dim)
    return Work(num_operations=num_operations, num_bytes=num_seqs * (context_len + 1) * token_bytes)


def choose_num_splits(num_queries: int, num_tiles: int, num_wanted: int) -> int:
    num_splits = 1
    while num_splits < num_tiles and num_splits * num_queries < num_wanted:
        num_splits += 1
    return num_splits
