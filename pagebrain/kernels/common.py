"""Functions that the Triton kernels share: offsets of tokens in a pool, the token range of a split, matrix products.

Every offset into a pool is computed in 64 bits: a pool of 141 GB has more elements than 32 bits can count, and a product
that overflows would address other memory.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
"""exp(x) is exp2(x * log2(e)); the GPU has an instruction for exp2, so the factor goes into the scale of the scores."""


@triton.jit
def pool_offsets(
    table_ptr,
    first_token,
    context_len,
    pool_stride_block,
    pool_stride_slot,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Offsets ``[TILE]`` (int64) in a pool of the tokens from ``first_token`` on, through the block table at ``table_ptr``.

    ``first_token`` is a multiple of ``TILE`` below ``context_len``. No table entry past the context's pages is read.
    """
    tokens = first_token + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:  # the tile lies in one block: one table entry to load, and contiguous slots
        block_ids = tl.load(table_ptr + first_token // BLOCK_SIZE).to(tl.int64)
    else:
        block_ids = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < context_len, other=0).to(tl.int64)
    return block_ids * pool_stride_block + (tokens % BLOCK_SIZE).to(tl.int64) * pool_stride_slot


@triton.jit
def split_range(context_len, num_splits, split, TILE: tl.constexpr):
    """``(first, last)``: split number ``split`` of a context reads tokens ``first .. last - 1``.

    Splits have equal numbers of whole tiles. The last ones may be shorter or empty (``first >= last``).
    """
    split_len = tl.cdiv(tl.cdiv(context_len, TILE), num_splits) * TILE
    first = split * split_len
    return first, tl.minimum(first + split_len, context_len)


INTERPRETED = tl.constexpr(type(pool_offsets).__name__ == "InterpretedFunction")
"""Whether this process runs kernels in Triton's interpreter on the CPU (TRITON_INTERPRET=1) instead of compiling them."""


@triton.jit
def dot(a, b, acc=None):
    """``a @ b``, plus ``acc`` if given, summed in float32. Float32 inputs keep their precision (no TF32)."""
    if INTERPRETED:  # the interpreter stores bfloat16 as 16-bit integers and would multiply these
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def is_interpreted() -> bool:
    """The value of :data:`INTERPRETED`, for host code."""
    return bool(INTERPRETED.value)
