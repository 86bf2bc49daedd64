"""The Triton kernel that reads tokens from the batch rows: the id of each token, and the slot of its K and V."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def locate_kernel(
    token_ids_ptr,
    slots_ptr,
    positions_ptr,
    rows_ptr,
    row_tokens_ptr,
    block_tables_ptr,
    context_lens_ptr,
    growth_ptr,
    token_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    token = tl.program_id(0)
    row = tl.load(rows_ptr + token).to(tl.int64)
    if ADVANCE:
        context_len = tl.load(context_lens_ptr + row) + tl.load(growth_ptr + row)
        tl.store(context_lens_ptr + row, context_len)
        position = context_len - 1
        tl.store(positions_ptr + token, position)
    else:
        position = tl.load(positions_ptr + token)
    tl.store(token_ids_ptr + token, tl.load(row_tokens_ptr + row * token_stride + position))
    block_id = tl.load(block_tables_ptr + row * table_stride + position // BLOCK_SIZE).to(tl.int64)
    tl.store(slots_ptr + token, block_id * BLOCK_SIZE + position % BLOCK_SIZE)


def locate(
    token_rows: Tensor,
    positions: Tensor | None,
    row_tokens: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    growth: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Look up one token for each entry of ``token_rows``.

    Args:
        token_rows: int ``[num_tokens]``, the batch row of each.
        positions: int ``[num_tokens]``. ``None`` takes each row's next token and adds ``growth`` to its context length; then
            ``token_rows`` may name each row only once, except the dummy row.
        row_tokens: int32 ``[num_rows, max_model_len]``.
        block_tables: int32 ``[num_rows, max_blocks]``.
        context_lens: int32 ``[num_rows]``; changed if ``positions`` is ``None``.
        growth: int32 ``[num_rows]``, tokens by which a row's context grows.
        block_size: slots of a block.

    Returns:
        ``(token_ids, slots, positions)``, each ``[num_tokens]``; slots are int64.
    """
    token_ids, slots = torch.empty_like(token_rows), torch.empty_like(token_rows, dtype=torch.int64)
    found = torch.empty_like(token_rows) if positions is None else positions
    locate_kernel[(token_rows.shape[0],)](
        token_ids,
        slots,
        found,
        token_rows,
        row_tokens,
        block_tables,
        context_lens,
        growth,
        row_tokens.stride(0),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        ADVANCE=positions is None,
        num_warps=1,
    )
    return token_ids, slots, found
