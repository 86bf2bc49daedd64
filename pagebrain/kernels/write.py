"""The Triton kernel that writes K and V of new tokens to their slots: one program per token copies all its heads."""

import triton
import triton.language as tl
from torch import Tensor

from pagebrain.kernels.common import is_interpreted
from pagebrain.kernels.inputs import check_device, check_indices, check_last_dimension, check_pools, mismatch


@triton.jit
def write_kernel(
    key_ptr,
    value_ptr,
    key_pool_ptr,
    value_pool_ptr,
    slot_mapping_ptr,
    num_heads,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    pool_stride_block,
    pool_stride_slot,
    pool_stride_head,
    HEAD_DIM: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    heads = tl.arange(0, PADDED_HEADS)[:, None]
    dims = tl.arange(0, PADDED_DIM)[None, :]
    exists = (heads < num_heads) & (dims < HEAD_DIM)
    heads = heads.to(tl.int64)
    target = slot // BLOCK_SIZE * pool_stride_block + slot % BLOCK_SIZE * pool_stride_slot + heads * pool_stride_head + dims

    key = tl.load(key_ptr + token * key_stride_token + heads * key_stride_head + dims, mask=exists)
    tl.store(key_pool_ptr + target, key, mask=exists)
    value = tl.load(value_ptr + token * value_stride_token + heads * value_stride_head + dims, mask=exists)
    tl.store(value_pool_ptr + target, value, mask=exists)


def write_kv(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor) -> None:
    """Write K and V of new tokens to their slots. No other slot changes.

    Args:
        key, value: ``[num_tokens, num_heads, head_dim]``, of the pools' dtype; the last dimension contiguous.
        key_pool, value_pool: ``[num_blocks, block_size, num_heads, head_dim]``, equal strides, the last one 1.
        slot_mapping: int ``[num_tokens]``. Padding tokens may share a slot of the dummy block.

    Raises:
        KernelError: for tensors that the kernel does not support, before anything is written.
    """
    check_pools(key_pool, value_pool)
    if key.shape != value.shape:
        raise mismatch("key and value", f"{list(key.shape)} and {list(value.shape)}", "the same shape")
    num_heads, head_dim = key_pool.shape[2:]
    if key.shape[1:] != (num_heads, head_dim):
        raise mismatch("key", f"shape {list(key.shape)}", f"[num_tokens, {num_heads}, {head_dim}] as the pool has it")
    num_tokens = key.shape[0]
    if not key.dtype == value.dtype == key_pool.dtype:
        raise mismatch("key and value", f"{key.dtype} and {value.dtype}", f"the pool's {key_pool.dtype}: convert them")
    check_last_dimension("key", key)
    check_last_dimension("value", value)
    check_indices("slot_mapping", slot_mapping, num_tokens)
    check_device(is_interpreted(), key_pool, key=key, value=value, slot_mapping=slot_mapping)
    if num_tokens == 0:
        return
    write_kernel[(num_tokens,)](
        key,
        value,
        key_pool,
        value_pool,
        slot_mapping,
        num_heads,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_pool.stride()[:3],
        HEAD_DIM=head_dim,
        PADDED_HEADS=triton.next_power_of_2(num_heads),
        PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=key_pool.shape[1],
        num_warps=4,
    )
