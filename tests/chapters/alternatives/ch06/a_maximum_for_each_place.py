"""Task 6.2: the running maximum stays a tile, one for each place, until the end; hidden slots are read, then hidden."""


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
    acc = tl.zeros([TILE, PADDED_DIM], dtype=tl.float32)  # a row for each place of a tile, put together at the end
    maxima = tl.full([TILE], -1e38, dtype=tl.float32)
    totals = tl.zeros([TILE], dtype=tl.float32)
    for tile in range(first, last, TILE):
        tokens = tile + tl.arange(0, TILE)
        instead = tl.minimum(tokens, last - 1)  # past the end the last token is read again, and hidden afterwards
        blocks = tl.load(table_ptr + instead // BLOCK_SIZE).to(tl.int64)
        offsets = blocks * pool_strides[0] + instead % BLOCK_SIZE * pool_strides[1]
        keys = tl.load(key_ptr + offsets[:, None] + dims, mask=dims[None, :] < HEAD_DIM, other=0.0).to(tl.float32)
        values = tl.load(value_ptr + offsets[:, None] + dims, mask=dims[None, :] < HEAD_DIM, other=0.0).to(tl.float32)
        scores = tl.where(tokens < last, tl.sum(keys * query, axis=1), -1e38)
        larger = tl.maximum(maxima, scores)
        weights = tl.exp(scores - larger) * (tokens < last)
        shrink = tl.exp(maxima - larger)
        acc = acc * shrink[:, None] + weights[:, None] * values
        totals = totals * shrink + weights
        maxima = larger
    maximum = tl.max(maxima, axis=0)
    shares = tl.exp(maxima - maximum)
    total = tl.sum(totals * shares, axis=0)
    return tl.sum(acc * shares[:, None], axis=0), tl.where(total > 0, maximum, -float("inf")), total


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
