"""Wrong solutions of chapter 06 that raise at once, so no author took them for right. ``# %%`` names each."""

# %% zeros_without_dtype
"""Task 6.2: tl.zeros without dtype."""


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
    acc = tl.zeros([PADDED_DIM])
    return acc, -float("inf"), 0.0


# %% zeros_of_a_number
"""Task 6.2: tl.zeros with a number for a shape."""


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
    acc = tl.zeros(PADDED_DIM, tl.float32)
    return acc, -float("inf"), 0.0
