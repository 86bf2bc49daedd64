"""Triton kernels for what lies between a GPT-2 layer's matrix products: embeddings, residual additions, layer norms.

Each of these reads and writes a few kilobytes per token, so launching it takes longer than its work: what follows one
another is one kernel here. The residual stream keeps the model's dtype, as Hugging Face's does; means and variances are
float32.
"""

import triton
import triton.language as tl
from torch import Tensor, nn


@triton.jit
def _normed(x, weight_ptr, bias_ptr, columns, exists, eps, WIDTH: tl.constexpr):
    """Layer norm of one row ``x`` (float32, zero where it does not exist)."""
    mean = tl.sum(x, axis=0) / WIDTH
    centered = tl.where(exists, x - mean, 0.0)
    variance = tl.sum(centered * centered, axis=0) / WIDTH
    weight = tl.load(weight_ptr + columns, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=exists, other=0.0).to(tl.float32)
    return centered / tl.sqrt(variance + eps) * weight + bias


@triton.jit
def add_norm_kernel(
    hidden_ptr, delta_ptr, weight_ptr, bias_ptr, sum_ptr, normed_ptr, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    columns = tl.arange(0, PADDED)
    exists = columns < WIDTH
    offsets = tl.program_id(0).to(tl.int64) * WIDTH + columns
    hidden = tl.load(hidden_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    hidden = (hidden + delta).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + offsets, hidden, mask=exists)
    normed = _normed(hidden.to(tl.float32), weight_ptr, bias_ptr, columns, exists, eps, WIDTH)
    tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=exists)


@triton.jit
def embed_norm_kernel(
    token_ids_ptr,
    positions_ptr,
    wte_ptr,
    wpe_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    normed_ptr,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    exists = columns < WIDTH
    word = tl.load(token_ids_ptr + token).to(tl.int64) * WIDTH
    place = tl.load(positions_ptr + token).to(tl.int64) * WIDTH
    hidden = tl.load(wte_ptr + word + columns, mask=exists, other=0.0).to(tl.float32)
    hidden += tl.load(wpe_ptr + place + columns, mask=exists, other=0.0).to(tl.float32)
    hidden = hidden.to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + token * WIDTH + columns, hidden, mask=exists)
    normed = _normed(hidden.to(tl.float32), weight_ptr, bias_ptr, columns, exists, eps, WIDTH)
    tl.store(normed_ptr + token * WIDTH + columns, normed.to(normed_ptr.dtype.element_ty), mask=exists)


def add_norm(hidden: Tensor, delta: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """``hidden + delta`` and its layer norm, both ``[num_tokens, n_embd]`` like the arguments."""
    num_tokens, width = hidden.shape
    total, normed = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)
    if num_tokens:
        add_norm_kernel[(num_tokens,)](
            hidden,
            delta,
            norm.weight,
            norm.bias,
            total,
            normed,
            norm.eps,
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            num_warps=_num_warps(width),
        )
    return total, normed


def embed_norm(
    token_ids: Tensor, positions: Tensor, wte: nn.Embedding, wpe: nn.Embedding, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """The embeddings of tokens at positions, both ``[num_tokens]``, and their layer norm: ``[num_tokens, n_embd]`` each."""
    (num_tokens,), width = token_ids.shape, wte.embedding_dim
    hidden, normed = (wte.weight.new_empty(num_tokens, width) for _ in range(2))
    if num_tokens:
        embed_norm_kernel[(num_tokens,)](
            token_ids,
            positions,
            wte.weight,
            wpe.weight,
            norm.weight,
            norm.bias,
            hidden,
            normed,
            norm.eps,
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            num_warps=_num_warps(width),
        )
    return hidden, normed


def _num_warps(width: int) -> int:
    """A row is one program's: eight numbers a lane fill its registers little and keep its memory requests wide."""
    return max(1, min(8, 1 << (width - 1).bit_length() - 8)) if width > 256 else 1
