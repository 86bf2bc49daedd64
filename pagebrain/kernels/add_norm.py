"""The Triton kernel of a norm and the residual addition before it.

Both read and write a few kilobytes per token, less work than a launch takes, so they are one kernel. At the start of the
residual stream the two addends are rows of embedding tables, and the kernel gathers them. The residual keeps the model's
dtype, as in Hugging Face; means and variances are float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from pagebrain.kernels.inputs import Rows


@triton.jit
def _row(values_ptr, indices_ptr, token, columns, exists, WIDTH: tl.constexpr):
    """The row of ``token``, or the row that ``indices_ptr`` names for it, in float32; zero past the row's end."""
    row = token if indices_ptr is None else tl.load(indices_ptr + token)
    return tl.load(values_ptr + row.to(tl.int64) * WIDTH + columns, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def add_norm_kernel(
    hidden_ptr,
    hidden_indices_ptr,
    residual_ptr,
    residual_indices_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    normed_ptr,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    token = tl.program_id(0)
    columns = tl.arange(0, PADDED)
    exists = columns < WIDTH
    hidden = _row(hidden_ptr, hidden_indices_ptr, token, columns, exists, WIDTH)
    residual = _row(residual_ptr, residual_indices_ptr, token, columns, exists, WIDTH)
    offsets = token.to(tl.int64) * WIDTH + columns
    total = (residual + hidden).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + offsets, total, mask=exists)
    total = total.to(tl.float32)
    mean = tl.sum(total, axis=0) / WIDTH
    centered = tl.where(exists, total - mean, 0.0)
    variance = tl.sum(centered * centered, axis=0) / WIDTH
    weight = tl.load(weight_ptr + columns, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=exists, other=0.0).to(tl.float32)
    normed = centered / tl.sqrt(variance + eps) * weight + bias
    tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=exists)


def add_norm(
    hidden: Tensor | Rows, residual: Tensor | Rows, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``(normed, sum)``: the layer norm of ``residual + hidden``, and the sum, both ``[num_tokens, hidden_size]``."""
    hidden_values, hidden_indices = _pointers(hidden)
    residual_values, residual_indices = _pointers(residual)
    num_tokens, width = len(hidden_values if hidden_indices is None else hidden_indices), weight.shape[0]
    total, normed = (hidden_values.new_empty(num_tokens, width) for _ in range(2))
    if num_tokens:
        add_norm_kernel[(num_tokens,)](
            hidden_values,
            hidden_indices,
            residual_values,
            residual_indices,
            weight,
            bias,
            total,
            normed,
            eps,
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            num_warps=_num_warps(width),
        )
    return normed, total


def _pointers(rows: Tensor | Rows) -> tuple[Tensor, Tensor | None]:
    return (rows.table, rows.indices) if isinstance(rows, Rows) else (rows, None)


def _num_warps(width: int) -> int:
    """Warps of a program, which computes one row: eight numbers a lane need few registers and allow wide loads."""
    return max(1, min(8, 1 << (width - 1).bit_length() - 8)) if width > 256 else 1
