"""Task 6.2: two walks over the tokens, the first for the maximum alone; and hidden slots are read, then hidden."""


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
    maximum = -float("inf")
    for tile in range(first, last, TILE):
        tokens = tile + tl.arange(0, TILE)
        # Whoever is past the end looks at the last token again, which is there, and is hidden afterwards.
        instead = tl.minimum(tokens, last - 1)
        blocks = tl.load(table_ptr + instead // BLOCK_SIZE).to(tl.int64)
        offsets = blocks * pool_strides[0] + instead % BLOCK_SIZE * pool_strides[1]
        keys = tl.load(key_ptr + offsets[:, None] + dims, mask=dims[None, :] < HEAD_DIM, other=0.0).to(tl.float32)
        maximum = tl.maximum(maximum, tl.max(tl.sum(keys * query, axis=1), axis=0))
    acc = tl.zeros([PADDED_DIM], dtype=tl.float32)
    total = 0.0
    for tile in range(first, last, TILE):
        tokens = tile + tl.arange(0, TILE)
        instead = tl.minimum(tokens, last - 1)
        blocks = tl.load(table_ptr + instead // BLOCK_SIZE).to(tl.int64)
        offsets = blocks * pool_strides[0] + instead % BLOCK_SIZE * pool_strides[1]
        keys = tl.load(key_ptr + offsets[:, None] + dims, mask=dims[None, :] < HEAD_DIM, other=0.0).to(tl.float32)
        values = tl.load(value_ptr + offsets[:, None] + dims, mask=dims[None, :] < HEAD_DIM, other=0.0).to(tl.float32)
        weights = tl.exp(tl.sum(keys * query, axis=1) - maximum) * (tokens < last)
        total += tl.sum(weights, axis=0)
        acc += tl.sum(weights[:, None] * values, axis=0)
    return acc, maximum, total


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
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    splits = tl.arange(0, PADDED_SPLITS)[None, :]
    dims = tl.arange(0, PADDED_DIM)[:, None]
    parts = row * num_splits + splits  # [1, PADDED_SPLITS]
    exists = splits < num_splits
    maxima = tl.load(maximum_ptr + parts, mask=exists, other=-float("inf"))
    totals = tl.load(total_ptr + parts, mask=exists, other=0.0)
    accs = tl.load(acc_ptr + parts * HEAD_DIM + dims, mask=exists & (dims < HEAD_DIM), other=0.0)
    log_sums = tl.where(totals > 0, maxima + tl.log(tl.where(totals > 0, totals, 1.0)), -float("inf"))
    shares = tl.exp(log_sums - tl.max(log_sums, axis=1, keep_dims=True))
    shares = shares / tl.sum(shares, axis=1, keep_dims=True)
    means = tl.where(totals > 0, accs / tl.where(totals > 0, totals, 1.0), 0.0)
    out = tl.sum(means * shares, axis=1, keep_dims=True)
    tl.store(out_ptr + row * HEAD_DIM + dims, out, mask=dims < HEAD_DIM)


def floor_seconds(work: Work, bytes_per_s: float, operations_per_s: float) -> float:
    ridge = operations_per_s / bytes_per_s
    if work.num_operations / work.num_bytes > ridge:
        return work.num_operations / operations_per_s
    return work.num_bytes / bytes_per_s
