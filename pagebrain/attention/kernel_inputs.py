"""What the Triton kernels can work on, checked from shapes, dtypes and strides alone.

A kernel believes what it is told: a wrong stride or a CPU tensor would be read as memory that is not there. Nothing here
looks at a value on the GPU, since that would wait for everything that was asked of it before.
"""

import functools

import torch
from torch import Tensor

from pagebrain.errors import KernelError

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128

_INTEGERS = (torch.int32, torch.int64)


def require(holds: bool, name: str, got: str, expected: str) -> None:
    """Raise ``KernelError`` about the argument ``name`` unless ``holds``."""
    if not holds:
        raise KernelError(f"the Triton kernels got {name} with {got}, expected {expected}")


@functools.cache
def why_not(dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps the kernels from working with such K and V, or ``None``."""
    if dtype not in KERNEL_DTYPES:
        return f"the Triton kernels compute in float16, bfloat16 and float32, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_HEAD_DIM:
        return f"the Triton kernels hold head dimensions up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


def check_pools(key_pool: Tensor, value_pool: Tensor) -> None:
    """Raise ``KernelError`` unless both are pools that one set of offsets serves."""
    shape, strides = key_pool.shape, key_pool.stride()
    require(len(shape) == 4, "key_pool", f"shape {list(shape)}", "[num_blocks, block_size, num_heads, head_dim]")
    require(
        (shape, strides, key_pool.dtype) == (value_pool.shape, value_pool.stride(), value_pool.dtype),
        "pools",
        f"{key_pool.dtype} {list(shape)}, strides {strides}, and {value_pool.dtype} {list(value_pool.shape)}, strides "
        f"{value_pool.stride()}",
        "equal shapes, strides and dtypes: make both alike",
    )
    require(strides[3] == 1 or shape[3] == 1, "pools", f"strides {strides}", "a contiguous last dimension")
    reason = why_not(key_pool.dtype, shape[3])
    if reason is not None:
        raise KernelError(f"{reason}: use swap attention=pagebrain.attention:paged_attention, which is torch operations")


def check_attention(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_tables: Tensor, context_lens: Tensor, num_seqs: int
) -> None:
    """Raise ``KernelError`` unless the kernels can attend with these; ``num_seqs`` is the number of table rows wanted."""
    check_pools(key_pool, value_pool)
    require(query.ndim == 3, "query", f"shape {list(query.shape)}", "[num_tokens, num_heads, head_dim]")
    _, num_heads, head_dim = query.shape
    num_kv_heads, pool_dim = key_pool.shape[2:]
    require(query.dtype == key_pool.dtype, "query", f"dtype {query.dtype}", f"the pools' {key_pool.dtype}")
    require(head_dim == pool_dim, "query", f"head_dim {head_dim}", f"the pools' {pool_dim}")
    require(num_heads % num_kv_heads == 0, "query", f"{num_heads} heads", f"a multiple of the pools' {num_kv_heads} heads")
    require(query.stride(2) == 1 or head_dim == 1, "query", f"strides {query.stride()}", "a contiguous last dimension")
    require(
        block_tables.ndim == 2
        and block_tables.shape[0] == num_seqs
        and block_tables.dtype in _INTEGERS
        and (block_tables.stride(1) == 1 or block_tables.shape[1] <= 1),
        "block_tables",
        f"{block_tables.dtype} {list(block_tables.shape)}, strides {block_tables.stride()}",
        f"integers [{num_seqs}, max_blocks] with contiguous rows",
    )
    check_indices("context_lens", context_lens, num_seqs)


def check_indices(name: str, indices: Tensor, length: int) -> None:
    """Raise ``KernelError`` unless ``indices`` is a contiguous vector of ``length`` integers."""
    require(
        indices.shape == (length,) and indices.dtype in _INTEGERS and (length <= 1 or indices.stride(0) == 1),
        name,
        f"{indices.dtype} {list(indices.shape)}, strides {indices.stride()}",
        f"contiguous integers [{length}]",
    )


def check_out(out: Tensor, query: Tensor) -> None:
    """Raise ``KernelError`` unless results for ``query`` can be written to ``out``."""
    require(
        out.shape == query.shape and out.dtype == query.dtype and out.is_contiguous(),
        "out",
        f"{out.dtype} {list(out.shape)}, strides {out.stride()}",
        f"{query.dtype} {list(query.shape)}, contiguous",
    )


def check_device(interpreted: bool, key_pool: Tensor, **tensors: Tensor | None) -> None:
    """Raise ``KernelError`` unless all tensors are on the pools' device and the kernels can run there."""
    for name, tensor in tensors.items():
        if tensor is not None:
            require(tensor.device == key_pool.device, name, f"device {tensor.device}", f"the pools' {key_pool.device}")
    if key_pool.device.type != "cuda" and not interpreted:
        raise KernelError(
            f"the pools are on {key_pool.device}, and the Triton kernels were compiled for a GPU: use device='cuda', or set "
            "TRITON_INTERPRET=1 before Python starts to run them, slowly, in Triton's interpreter"
        )
