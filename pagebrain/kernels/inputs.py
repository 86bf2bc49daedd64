"""Checks of the Triton kernels' arguments, from shapes, dtypes and strides alone.

A kernel does not check its pointers: with a wrong stride or a CPU tensor it would read invalid memory. No check reads a
value on the GPU, because that waits for all work queued there. Messages are formatted only for an error, because these
checks run for every layer of every step.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pagebrain.errors import KernelError

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128

_INTEGERS = (torch.int32, torch.int64)


class Rows(NamedTuple):
    """Rows of a table that are named and not gathered yet. The norm kernel gathers them while it adds them.

    ``table`` is ``[num_rows, hidden_size]``, ``indices`` are integers ``[num_tokens]``.
    """

    table: Tensor
    indices: Tensor


def mismatch(name: str, got: str, expected: str) -> KernelError:
    """The error about the argument ``name``."""
    return KernelError(f"the Triton kernels got {name} with {got}, expected {expected}")


@functools.cache
def unsupported(dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why the kernels do not support such K and V; ``None`` if they do."""
    if dtype not in KERNEL_DTYPES:
        return f"the Triton kernels compute in float16, bfloat16 and float32, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_HEAD_DIM:
        return f"the Triton kernels hold head dimensions up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


def check_pools(key_pool: Tensor, value_pool: Tensor) -> None:
    """Raise ``KernelError`` unless the same offsets are valid in both pools, and the kernels support their dtype."""
    shape, strides = key_pool.shape, key_pool.stride()
    if len(shape) != 4:
        raise mismatch("key_pool", f"shape {list(shape)}", "[num_blocks, block_size, num_heads, head_dim]")
    if shape != value_pool.shape or strides != value_pool.stride() or key_pool.dtype != value_pool.dtype:
        keys, values = (f"{pool.dtype} {list(pool.shape)}, strides {pool.stride()}" for pool in (key_pool, value_pool))
        raise mismatch("pools", f"{keys}, and {values}", "equal shapes, strides and dtypes: make both alike")
    if strides[3] != 1 and shape[3] != 1:
        raise mismatch("pools", f"strides {strides}", "a contiguous last dimension")
    reason = unsupported(key_pool.dtype, shape[3])
    if reason is not None:
        raise KernelError(f"{reason}: use the part attention=pagebrain.attention:paged_attention, which is torch operations")


def check_attention(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_tables: Tensor, context_lens: Tensor, num_rows: int
) -> None:
    """Raise ``KernelError`` unless the kernels support these tensors, with ``num_rows`` tables and contexts."""
    check_pools(key_pool, value_pool)
    if query.ndim != 3:
        raise mismatch("query", f"shape {list(query.shape)}", "[num_tokens, num_heads, head_dim]")
    _, num_heads, head_dim = query.shape
    num_kv_heads, pool_dim = key_pool.shape[2:]
    if query.dtype != key_pool.dtype:
        raise mismatch("query", f"dtype {query.dtype}", f"the pools' {key_pool.dtype}")
    if head_dim != pool_dim:
        raise mismatch("query", f"head_dim {head_dim}", f"the pools' {pool_dim}")
    if num_heads % num_kv_heads != 0:
        raise mismatch("query", f"{num_heads} heads", f"a multiple of the pools' {num_kv_heads} heads")
    check_last_dimension("query", query)
    if (
        block_tables.ndim != 2
        or block_tables.shape[0] != num_rows
        or block_tables.dtype not in _INTEGERS
        or (block_tables.stride(1) != 1 and block_tables.shape[1] > 1)
    ):
        got = f"{block_tables.dtype} {list(block_tables.shape)}, strides {block_tables.stride()}"
        raise mismatch("block_tables", got, f"integers [{num_rows}, max_blocks] with contiguous rows")
    check_indices("context_lens", context_lens, num_rows)


def check_last_dimension(name: str, tensor: Tensor) -> None:
    """Raise ``KernelError`` unless the last dimension of ``[..., head_dim]`` is contiguous."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise mismatch(name, f"strides {tensor.stride()}", "a contiguous last dimension")


def check_indices(name: str, indices: Tensor, length: int) -> None:
    """Raise ``KernelError`` unless ``indices`` is a contiguous vector of ``length`` integers."""
    if indices.shape != (length,) or indices.dtype not in _INTEGERS or (length > 1 and indices.stride(0) != 1):
        got = f"{indices.dtype} {list(indices.shape)}, strides {indices.stride()}"
        raise mismatch(name, got, f"contiguous integers [{length}]")


def check_out(out: Tensor, query: Tensor) -> None:
    """Raise ``KernelError`` unless results for ``query`` can be written to ``out``."""
    if out.shape != query.shape or out.dtype != query.dtype or not out.is_contiguous():
        got = f"{out.dtype} {list(out.shape)}, strides {out.stride()}"
        raise mismatch("out", got, f"{query.dtype} {list(query.shape)}, contiguous")


def check_device(interpreted: bool, key_pool: Tensor, **tensors: Tensor | None) -> None:
    """Raise ``KernelError`` unless all tensors are on the pools' device and the kernels can run there."""
    device = key_pool.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise mismatch(name, f"device {tensor.device}", f"the pools' {device}")
    if not interpreted and device.type != "cuda":
        raise KernelError(
            f"the pools are on {device}, and the Triton kernels were compiled for a GPU: use device='cuda', or set "
            "TRITON_INTERPRET=1 before Python starts to run them, slowly, in Triton's interpreter"
        )
