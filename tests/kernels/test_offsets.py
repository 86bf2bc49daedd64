"""Offsets are 64 bits wide: K and V that lie more than 2**31 elements into a pool are found and written there.

On a GPU the pools are really that large. In the interpreter they are addresses that no memory stands behind until it is
touched, and the pool begins in the middle of them: an offset that wraps around finds a wrong number there, where it would
otherwise end the process.
"""

import mmap
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.attention_scene import Scene

NUM_ELEMENTS = 2**31 + 2**16
GUARD = 2**31
BLOCK_SIZE, NUM_HEADS, HEAD_DIM = 8, 3, 16

FAR = {  # what has the large stride: the index of it that lies past 2**31 elements, and the strides of a pool
    "blocks": (2**31 // 384 + 1, (384, 48, 16, 1)),
    "heads": (2, (128, 16, 2**30, 1)),
    "slots": (2, (48, 2**30, 16, 1)),
}


def elements(device: str) -> Tensor:
    """More float16 numbers than 32 bits can count, from an allocation or from addresses alone."""
    if device == "cuda":
        return torch.empty(NUM_ELEMENTS, dtype=torch.float16, device=device)
    if not sys.platform.startswith("linux"):
        pytest.skip("addresses without memory are asked for as Linux has it")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which the module names from Python 3.13 on
    try:
        space = mmap.mmap(-1, 2 * (GUARD + NUM_ELEMENTS), flags=flags)
    except OSError as error:
        pytest.skip(f"this machine does not hand out 9 GB of addresses: {error}")
    return torch.frombuffer(space, dtype=torch.float16)[GUARD:]


def far_pool(which: str, device: str) -> Tensor:
    """A pool ``[num_blocks, block_size, num_heads, head_dim]`` that ends past 2**31 elements."""
    far, strides = FAR[which]
    num_blocks = far + 1 if which == "blocks" else 3
    block_size = far + 1 if which == "slots" else BLOCK_SIZE
    return elements(device).as_strided((num_blocks, block_size, NUM_HEADS, HEAD_DIM), strides)


@pytest.mark.parametrize("which", FAR)
def test_a_token_far_into_the_pool_is_written_there_and_read_from_there(which: str, device: str) -> None:
    from pagebrain.kernels.paged import paged_decode, paged_prefill, write_kv

    key_pool, value_pool = far_pool(which, device), far_pool(which, device)
    block_size = key_pool.shape[1]
    last_block = key_pool.shape[0] - 1
    shape: dict[str, Any] = {"num_heads": NUM_HEADS, "head_dim": HEAD_DIM, "block_size": block_size}
    scene = Scene([2], [block_size], dtype=torch.float16, **shape)
    furthest = sum((size - 1) * stride for size, stride in zip(key_pool.shape, key_pool.stride(), strict=True))
    assert furthest >= 2**31

    key, value = (part[0].to(device) for part in (scene.keys, scene.values))
    slots = torch.arange(block_size, device=device) + last_block * block_size
    write_kv(key, value, key_pool, value_pool, slots)
    assert torch.equal(key_pool[last_block], key) and torch.equal(value_pool[last_block], value)

    tables, lens = (torch.tensor(values, device=device) for values in ([[last_block]], [block_size]))
    query = scene.query.to(device)
    out = paged_prefill(query, key_pool, value_pool, tables, lens, torch.tensor([0, 2], device=device), scene.scale)
    torch.testing.assert_close(out.cpu().double(), scene.dense(), atol=4e-3, rtol=0)
    for num_splits in (1, 2):
        out = paged_decode(query[1:], key_pool, value_pool, tables, lens, scene.scale, num_splits=num_splits)
        torch.testing.assert_close(out.cpu().double(), scene.dense()[1:], atol=4e-3, rtol=0)


@pytest.mark.parametrize("which", FAR)
def test_grouped_heads_are_read_from_there_too(which: str, device: str) -> None:
    from pagebrain.kernels.paged import paged_decode

    key_pool, value_pool = far_pool(which, device), far_pool(which, device)
    last_block, block_size = key_pool.shape[0] - 1, key_pool.shape[1]
    scene = Scene([1], [block_size], num_heads=6, num_kv_heads=3, head_dim=16, block_size=block_size, dtype=torch.float16)
    key_pool[last_block], value_pool[last_block] = scene.keys[0].to(device), scene.values[0].to(device)
    tables, lens = (torch.tensor(values, device=device) for values in ([[last_block]], [block_size]))
    out = paged_decode(scene.query.to(device), key_pool, value_pool, tables, lens, scene.scale)
    torch.testing.assert_close(out.cpu().double(), scene.dense(), atol=4e-3, rtol=0)
