"""Wrong solutions of chapter 06. ``# %%`` names each, its docstring the task and the mistake."""

# %% heads_side_by_side
"""Task 6.1: in the pools, the heads of a token are taken to lie side by side."""


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
    row = token * row_strides[0] + head * row_strides[1] + dims
    place = slot // BLOCK_SIZE * pool_strides[0] + slot % BLOCK_SIZE * pool_strides[1] + head * HEAD_DIM + dims
    tl.store(key_pool_ptr + place, tl.load(key_ptr + row, mask=exists), mask=exists)
    tl.store(value_pool_ptr + place, tl.load(value_ptr + row, mask=exists), mask=exists)


# %% padding_written
"""Task 6.1: the padding of a tile is stored too, over what follows the head."""


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
    row = token * row_strides[0] + head * row_strides[1] + dims
    place = slot // BLOCK_SIZE * pool_strides[0] + slot % BLOCK_SIZE * pool_strides[1] + head * pool_strides[2] + dims
    tl.store(key_pool_ptr + place, tl.load(key_ptr + row, mask=exists, other=0.0))
    tl.store(value_pool_ptr + place, tl.load(value_ptr + row, mask=exists, other=0.0))


# %% row_heads_side_by_side
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


# %% slot_taken_for_block
"""Task 6.1: the slot is multiplied by the block stride, as if it were a block."""


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
    row = token * row_strides[0] + head * row_strides[1] + dims
    place = slot * pool_strides[1] + head * pool_strides[2] + dims
    tl.store(key_pool_ptr + place, tl.load(key_ptr + row, mask=exists), mask=exists)
    tl.store(value_pool_ptr + place, tl.load(value_ptr + row, mask=exists), mask=exists)


# %% slots_in_32_bits
"""Task 6.1: offsets are computed in the bits that the slots come with."""


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
    slot = tl.load(slots_ptr + token).to(tl.int32)
    row = token * row_strides[0] + head * row_strides[1] + dims
    place = slot // BLOCK_SIZE * pool_strides[0] + slot % BLOCK_SIZE * pool_strides[1] + head * pool_strides[2] + dims
    tl.store(key_pool_ptr + place, tl.load(key_ptr + row, mask=exists), mask=exists)
    tl.store(value_pool_ptr + place, tl.load(value_ptr + row, mask=exists), mask=exists)


# %% blocks_in_32_bits
"""Task 6.2: the offset of a block is computed in 32 bits."""


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
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int32)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% divided_in_the_loop
"""Task 6.2: what is returned is divided by the sum already."""


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
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc / total, maximum, total


# %% maximum_of_this_tile
"""Task 6.2: the maximum is the tile's own; an earlier, larger one is forgotten."""


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
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.max(scores, axis=0)
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% no_token_mask_on_values
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


# %% one_block_for_the_tile
"""Task 6.2: the whole tile is looked for in the block of its first token."""


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
        block_ids = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% one_token_too_many
"""Task 6.2: the token after the range is seen as well."""


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
        is_seen = tokens <= last
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% padding_scored
"""Task 6.2: the padding of a head is read, which is the next head's."""


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
        exists = is_seen[:, None] & (dims >= 0)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% scores_of_nothing
"""Task 6.2: tokens past the range are read as zeros, and their score of 0 counts."""


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
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.sum(query[None, :] * keys, axis=1)  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% sum_not_rescaled
"""Task 6.2: a larger maximum shrinks the weighted values but not their sum."""


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
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% table_read_too_far
"""Task 6.2: the table is read for the whole tile, past its end."""


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
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE).to(tl.int64)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% weights_along_the_dims
"""Task 6.2: the weights are multiplied along the dims instead of the tokens."""


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
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[None, :] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% whole_tile_seen
"""Task 6.2: the last tile is not masked at all."""


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
        is_seen = tokens >= 0
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% each_part_sees_all
"""Task 6.3: each part attends to the whole context, which the merge then hides."""


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
    first, last = 0, context_len

    dims = tl.arange(0, PADDED_DIM)
    exists = dims < HEAD_DIM
    query = tl.load(query_ptr + seq * query_strides[0] + head * query_strides[1] + dims, mask=exists, other=0.0)
    query = query.to(tl.float32) * scale
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[2], value_pool_ptr + head * pool_strides[2]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% empty_parts_left_out
"""Task 6.3: an empty part writes nothing."""


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
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    if first >= last:
        return
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% first_table_for_all
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


# %% head_by_slot_stride
"""Task 6.3: the head is looked for where the next slot is."""


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
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[1], value_pool_ptr + head * pool_strides[1]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% last_part_takes_the_rest
"""Task 6.3: the division is rounded down, and the last part takes all that is left."""


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
    part = (tl.cdiv(context_len, TILE) // num_splits) * TILE
    first, last = split * part, tl.minimum((split + 1) * part, context_len)
    last = tl.where(split == num_splits - 1, context_len, last)

    dims = tl.arange(0, PADDED_DIM)
    exists = dims < HEAD_DIM
    query = tl.load(query_ptr + seq * query_strides[0] + head * query_strides[1] + dims, mask=exists, other=0.0)
    query = query.to(tl.float32) * scale
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[2], value_pool_ptr + head * pool_strides[2]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% one_head_for_all
"""Task 6.3: every head reads the numbers of the first."""


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
    key_ptr, value_ptr = key_pool_ptr, value_pool_ptr + head * pool_strides[2]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% parts_side_by_side
"""Task 6.3: the parts of a query are stored apart: all queries' first parts, then all second ones."""


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
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (split * tl.num_programs(0) + seq) * tl.num_programs(1) + head
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% query_heads_side_by_side
"""Task 6.3: the heads of a query are taken to lie side by side."""


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
    query = tl.load(query_ptr + seq * query_strides[0] + head * HEAD_DIM + dims, mask=exists, other=0.0)
    query = query.to(tl.float32) * scale
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[2], value_pool_ptr + head * pool_strides[2]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% scale_forgotten
"""Task 6.3: the query is not scaled."""


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
    query = query.to(tl.float32)
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[2], value_pool_ptr + head * pool_strides[2]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% table_stride_assumed
"""Task 6.3: rows of the table are taken to follow each other without a gap."""


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
    table_ptr = tables_ptr + seq * tl.cdiv(tl.max(tl.load(context_lens_ptr + tl.arange(0, 1)), axis=0), BLOCK_SIZE)
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% exp_before_maximum
"""Task 6.4: exp is taken of the maxima themselves."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.exp(maxima)  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(weights * totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% maxima_ignored
"""Task 6.4: the parts are added as if all had the same maximum."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.where(maxima > -float("inf"), 1.0, 0.0)  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(weights * totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% mean_of_the_parts
"""Task 6.4: the parts count alike, however much their tokens weigh."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(tl.where((totals > 0)[:, None], accs / totals[:, None], 0.0), axis=0) / tl.sum(
        (totals > 0).to(tl.float32), axis=0
    )
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% padding_counts
"""Task 6.4: the next query's parts are read into the padding."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits >= 0
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(weights * totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% padding_has_maximum_zero
"""Task 6.4: padding has a maximum of 0, which may be far above the real ones."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=0.0)
    weights = tl.exp(maxima - tl.max(maxima, axis=0))  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(weights * totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% parts_averaged
"""Task 6.4: each part is divided by its own sum, an empty one by 0."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split, other=1.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    shares = weights * totals / tl.sum(weights * totals, axis=0)
    out = tl.sum(shares[:, None] * (accs / totals[:, None]), axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% multiplications_only
"""Task 6.5: additions are not counted."""


def decode_work(num_seqs: int, context_len: int, num_heads: int, head_dim: int, itemsize: int) -> Work:
    numbers = num_seqs * num_heads * head_dim
    return Work(2 * numbers * (context_len + 1) * itemsize, 2 * numbers * context_len)


# %% outputs_not_counted
"""Task 6.5: queries and results are left out of the bytes."""


def decode_work(num_seqs: int, context_len: int, num_heads: int, head_dim: int, itemsize: int) -> Work:
    numbers = num_seqs * num_heads * head_dim
    return Work(2 * numbers * context_len * itemsize, 4 * numbers * context_len)


# %% rounded_down
"""Task 6.5: the division is rounded down: fewer programs than were wanted."""


def choose_num_splits(num_queries: int, num_tiles: int, num_wanted: int) -> int:
    return max(1, min(num_wanted // num_queries, num_tiles))


# %% splits_without_tiles
"""Task 6.5: there are as many splits as programs are wanted, with tiles for them or not."""


def choose_num_splits(num_queries: int, num_tiles: int, num_wanted: int) -> int:
    return -(-num_wanted // num_queries)


# %% times_added
"""Task 6.5: the time for bytes and the time for operations are added."""


def floor_seconds(work: Work, bytes_per_s: float, operations_per_s: float) -> float:
    return work.num_bytes / bytes_per_s + work.num_operations / operations_per_s


# %% place_by_token
"""Task 6.1: the place in a block is worked out from the token, not from its slot."""


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
    row = token * row_strides[0] + head * row_strides[1] + dims
    place = slot // BLOCK_SIZE * pool_strides[0] + token % BLOCK_SIZE * pool_strides[1] + head * pool_strides[2] + dims
    tl.store(key_pool_ptr + place, tl.load(key_ptr + row, mask=exists), mask=exists)
    tl.store(value_pool_ptr + place, tl.load(value_ptr + row, mask=exists), mask=exists)


# %% loads_not_masked
"""Task 6.1: loads are not masked: places past the end of the tensor are read."""


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
    row = token * row_strides[0] + head * row_strides[1] + dims
    place = slot // BLOCK_SIZE * pool_strides[0] + slot % BLOCK_SIZE * pool_strides[1] + head * pool_strides[2] + dims
    tl.store(key_pool_ptr + place, tl.load(key_ptr + row), mask=exists)
    tl.store(value_pool_ptr + place, tl.load(value_ptr + row), mask=exists)


# %% dictionary_in_a_kernel
"""Task 6.1: a dictionary, which the interpreter takes and a compiler for GPUs does not."""


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
    sizes = {"block": BLOCK_SIZE}
    row = token * row_strides[0] + head * row_strides[1] + dims
    place = slot // sizes["block"] * pool_strides[0] + slot % BLOCK_SIZE * pool_strides[1] + head * pool_strides[2] + dims
    tl.store(key_pool_ptr + place, tl.load(key_ptr + row, mask=exists), mask=exists)
    tl.store(value_pool_ptr + place, tl.load(value_ptr + row, mask=exists), mask=exists)


# %% total_begins_as_an_integer
"""Task 6.2: total begins as the integer 0, and a GPU's compiler wants one type for the whole loop."""


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
    total = 0
    for start in range(first, last, TILE):
        tokens = start + tl.arange(0, TILE)
        is_seen = tokens < last
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% keys_without_other
"""Task 6.2: K is loaded without a value for places that are not there, and the padding of a head is undefined."""


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
        keys = tl.load(key_ptr + places, mask=exists).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% values_without_other
"""Task 6.2: V is loaded without a value for places that are not there: 0 times undefined."""


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
        values = tl.load(value_ptr + places, mask=exists).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% offset_by_bit_mask
"""Task 6.2: the place in a block is found with a bit mask, which is right for powers of two only."""


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
        slots = block_ids * pool_strides[0] + (tokens & (BLOCK_SIZE - 1)) * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% offset_within_the_tile
"""Task 6.2: the place in a block is counted from the tile's first token, as if a tile began a block."""


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
        slots = block_ids * pool_strides[0] + (tokens - start) % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% blocks_counted_from_the_tile
"""Task 6.2: a block larger than a tile is taken to begin where the tile begins."""


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
        block_ids = tl.load(table_ptr + (start // BLOCK_SIZE + (tokens - start) // BLOCK_SIZE), mask=is_seen, other=0).to(
            tl.int64
        )
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% maximum_begins_at_zero
"""Task 6.2: the maximum begins at 0, and is wrong where all scores are negative."""


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
    maximum = 0.0
    total = 0.0
    for start in range(first, last, TILE):
        tokens = start + tl.arange(0, TILE)
        is_seen = tokens < last
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% acc_in_the_pools_type
"""Task 6.2: weights are converted to the type of V before they are multiplied."""


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
        values = tl.load(value_ptr + places, mask=exists, other=0.0)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights.to(values.dtype)[:, None] * values, axis=0).to(tl.float32)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% token_by_token
"""Task 6.2: one token at a time: sixteen times as many loads as tiles."""


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
    for start in range(first, last):
        tokens = start + tl.arange(0, TILE)
        is_seen = tokens == start
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, maximum, total


# %% keys_read_twice
"""Task 6.2: the keys are read twice, a second time for the weights."""


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
    for start in range(first, last, TILE):
        tokens = start + tl.arange(0, TILE)
        is_seen = tokens < last
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        places = (block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1])[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)
        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))
        maximum = tl.maximum(maximum, tl.max(scores, axis=0))
    acc = tl.zeros([PADDED_DIM], dtype=tl.float32)
    total = 0.0
    for start in range(first, last, TILE):
        tokens = start + tl.arange(0, TILE)
        is_seen = tokens < last
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        places = (block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1])[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)
        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))
        weights = tl.exp(scores - maximum)
        acc += tl.sum(weights[:, None] * values, axis=0)
        total += tl.sum(weights, axis=0)
    return acc, maximum, total


# %% always_from_the_beginning
"""Task 6.2: the walk begins at token 0 and tokens before the range are masked: each part reads all before it."""


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
    maximum = -1e30
    total = 0.0
    for start in range(0, last, TILE):
        tokens = start + tl.arange(0, TILE)
        is_seen = (tokens >= first) & (tokens < last)
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        slots = block_ids * pool_strides[0] + tokens % BLOCK_SIZE * pool_strides[1]  # [TILE]
        places = slots[:, None] + dims[None, :]
        exists = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptr + places, mask=exists, other=0.0).to(tl.float32)  # [TILE, PADDED_DIM]
        values = tl.load(value_ptr + places, mask=exists, other=0.0).to(tl.float32)

        scores = tl.where(is_seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))  # [TILE]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        new_maximum = tl.where(new_maximum == -float("inf"), -1e30, new_maximum)
        shrink = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        maximum = new_maximum
    return acc, tl.where(total > 0, maximum, -float("inf")), total


# %% query_without_other
"""Task 6.3: the query is loaded without a value for the padding, which is undefined."""


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
    query = tl.load(query_ptr + seq * query_strides[0] + head * query_strides[1] + dims, mask=exists)
    query = query.to(tl.float32) * scale
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[2], value_pool_ptr + head * pool_strides[2]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% scaled_in_the_querys_type
"""Task 6.3: the query is multiplied by scale before it is converted to float32."""


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
    query = (query * scale).to(tl.float32)
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[2], value_pool_ptr + head * pool_strides[2]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% parts_by_tokens
"""Task 6.3: tokens are shared out, not tiles, and rounded up to a tile: parts that end early."""


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
    part = (context_len // num_splits + TILE - 1) // TILE * TILE
    first, last = split * part, tl.minimum((split + 1) * part, context_len)

    dims = tl.arange(0, PADDED_DIM)
    exists = dims < HEAD_DIM
    query = tl.load(query_ptr + seq * query_strides[0] + head * query_strides[1] + dims, mask=exists, other=0.0)
    query = query.to(tl.float32) * scale
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[2], value_pool_ptr + head * pool_strides[2]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% part_one_tile_longer
"""Task 6.3: each part has a tile more than its share, and the last ones are empty."""


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
    part = (context_len // TILE // num_splits + 1) * TILE
    first, last = split * part, tl.minimum((split + 1) * part, context_len)

    dims = tl.arange(0, PADDED_DIM)
    exists = dims < HEAD_DIM
    query = tl.load(query_ptr + seq * query_strides[0] + head * query_strides[1] + dims, mask=exists, other=0.0)
    query = query.to(tl.float32) * scale
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[2], value_pool_ptr + head * pool_strides[2]
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% total_row_by_query
"""Task 6.3: maximum and total of a query are stored at one place for all its parts."""


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
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + (seq * tl.num_programs(1) + head) * num_splits, total)


# %% value_head_left_out
"""Task 6.3: K's pointer is moved to the head, V's is not."""


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
    key_ptr, value_ptr = key_pool_ptr + head * pool_strides[2], value_pool_ptr
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% acc_divided
"""Task 6.3: each part divides its sum by its total already."""


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
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * HEAD_DIM + dims, acc / total, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% acc_rows_padded
"""Task 6.3: rows of acc are taken to be PADDED_DIM apart."""


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
    table_ptr = tables_ptr + seq * table_stride
    acc, maximum, total = attend_tokens(
        query, key_ptr, value_ptr, table_ptr, first, last, pool_strides, HEAD_DIM, PADDED_DIM, BLOCK_SIZE
    )
    row = (seq * tl.num_programs(1) + head) * num_splits + split
    tl.store(acc_ptr + row * PADDED_DIM + dims, acc, mask=exists)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)


# %% total_without_weight
"""Task 6.4: the totals are added without their weights."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% accs_without_other
"""Task 6.4: the accs are loaded without a value for the padding: 0 times undefined."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(weights * totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% totals_without_other
"""Task 6.4: the totals are loaded without a value for the padding."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(weights * totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% rows_by_padded_splits
"""Task 6.4: rows of a query are taken to be PADDED_SPLITS apart."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * PADDED_SPLITS + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(weights * totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% last_part_dropped
"""Task 6.4: the last part is left out."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, (splits < num_splits - 1) | (splits == 0)
    rows = query * num_splits + splits  # [PADDED_SPLITS]
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))  # 0 for an empty part
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(weights * totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% values_not_counted
"""Task 6.5: only K is counted, V is forgotten."""


def decode_work(num_seqs: int, context_len: int, num_heads: int, head_dim: int, itemsize: int) -> Work:
    numbers = num_seqs * num_heads * head_dim
    return Work(numbers * (context_len + 2) * itemsize, 4 * numbers * context_len)


# %% minimum_of_the_times
"""Task 6.5: the shorter of the two times."""


def floor_seconds(work: Work, bytes_per_s: float, operations_per_s: float) -> float:
    return min(work.num_bytes / bytes_per_s, work.num_operations / operations_per_s)


# %% zero_splits
"""Task 6.5: with enough programs already, no split at all: 0."""


def choose_num_splits(num_queries: int, num_tiles: int, num_wanted: int) -> int:
    return min(-(-max(num_wanted - num_queries, 0) // num_queries) + (num_wanted > num_queries), num_tiles)


# %% splits_rounded_to_a_power
"""Task 6.5: the number of splits is rounded up to a power of two."""


def choose_num_splits(num_queries: int, num_tiles: int, num_wanted: int) -> int:
    return min(1 << (-(-num_wanted // num_queries) - 1).bit_length(), num_tiles)


# %% float_splits
"""Task 6.5: the division is a float's: the number of splits is no int."""


def choose_num_splits(num_queries: int, num_tiles: int, num_wanted: int) -> int:
    return min(-(-num_wanted / num_queries) // 1, num_tiles)


# %% intensity_of_the_least_bytes
"""Task 6.6: the intensity of decode_work, without the partial results."""


def answer_6_6() -> tuple[float, str]:
    return 49152 / 49664, "It is memory that holds the kernels back, since the point is left of the ridge."


# %% bytes_for_each_operation
"""Task 6.6: the fraction is upside down."""


def answer_6_6() -> tuple[float, str]:
    return 58912 / 49152, "It is memory that holds the kernels back, since the point is left of the ridge."


# %% a_word_for_a_text
"""Task 6.6: the number is right, and the text says nothing."""


def answer_6_6() -> tuple[float, str]:
    return 0.834, "memory"


# %% row_pitch_of_the_padding
"""Task 6.4: rows of acc are taken to be PADDED_DIM apart."""


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
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims, splits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    is_dim, is_split = dims < HEAD_DIM, splits < num_splits
    rows = query * num_splits + splits
    maxima = tl.load(maximum_ptr + rows, mask=is_split, other=-float("inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))
    totals = tl.load(total_ptr + rows, mask=is_split, other=0.0)
    exists = is_split[:, None] & is_dim[None, :]
    accs = tl.load(acc_ptr + rows[:, None] * PADDED_DIM + dims[None, :], mask=exists, other=0.0)
    out = tl.sum(weights[:, None] * accs, axis=0) / tl.sum(weights * totals, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out, mask=is_dim)


# %% bytes_as_an_intensity
"""Task 6.6: the bytes are returned, not the operations for each byte."""


def answer_6_6() -> tuple[float, str]:
    return 58912, "It is memory that holds the kernels back, since the point is left of the ridge."


# %% intensity_without_a_text
"""Task 6.6: the number is right, and the text is empty."""


def answer_6_6() -> tuple[float, str]:
    return 0.834, ""


# %% intensity_alone
"""Task 6.6: the number alone, without a text."""


def answer_6_6() -> tuple[float, str]:
    return 0.834
