"""Task 6.2: V is masked by dims only: slots without a token are read, and a weight of 0 does not hide nan."""


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
    acc = tl.zeros([PADDED_DIM], dtype=tl.float32)
    maximum = -float("inf")
    total = 0.0
    for start in range(first, last, TILE):
        tokens = start + tl.arange(0, TILE)
        is_seen = tokens < last
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=(dims < HEAD_DIM)[None, :], other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total
