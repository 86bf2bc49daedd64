"""The write kernel puts every token's K and V where its slot is, and touches no other slot."""

from typing import Any

import pytest
import torch

from pagebrain.block import BlockManager
from pagebrain.cache import CacheManager
from pagebrain.config import PageBrainConfig
from pagebrain.errors import KernelError
from tests.support.attention_scene import moved
from tests.support.models import POISON, poison, random_gpt2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads_first", [True, False], ids=["heads first", "slots first"])
@pytest.mark.parametrize(("num_heads", "head_dim", "block_size"), [(12, 64, 16), (3, 80, 8), (1, 16, 1)])
def test_only_the_named_slots_are_written(
    num_heads: int, head_dim: int, block_size: int, heads_first: bool, dtype: torch.dtype, device: str
) -> None:
    from pagebrain.kernels.paged import write_kv

    num_blocks, num_tokens = 40 // block_size + 2, 11
    shape = (num_blocks, num_heads, block_size, head_dim) if heads_first else (num_blocks, block_size, num_heads, head_dim)
    pools = [torch.full(shape, POISON, dtype=dtype) for _ in range(2)]
    key_pool, value_pool = (pool.transpose(1, 2) if heads_first else pool for pool in pools)
    qkv = torch.randn(num_tokens, 3, num_heads, head_dim, dtype=dtype)
    _, key, value = qkv.unbind(1)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    expected = [pool.clone() for pool in (key_pool, value_pool)]
    for pool, new in zip(expected, (key, value), strict=True):
        pool[slots // block_size, slots % block_size] = new

    pools_there = moved(key_pool, device), moved(value_pool, device)
    write_kv(moved(key, device), moved(value, device), *pools_there, slots.to(device))
    assert torch.equal(pools_there[0].cpu(), expected[0])
    assert torch.equal(pools_there[1].cpu(), expected[1])


def test_the_engines_pools_hold_what_torch_operations_put_there(device: str) -> None:
    from pagebrain.attention import torch_backend
    from pagebrain.kernels.paged import write_kv

    base: Any = random_gpt2(torch.float32)
    config = PageBrainConfig.for_model(base.to(device), num_blocks=6, block_size=8)
    managers = [CacheManager(BlockManager(config), config) for _ in range(2)]
    for manager in managers:
        poison(manager.pool)
    ours, theirs = (manager.pool for manager in managers)
    key, value = (torch.randn(9, 3, 16, device=device) for _ in range(2))
    slots = torch.tensor([3, 4, 5, 40, 41, 0, 47, 16, 20], dtype=torch.int32, device=device)
    write_kv(key, value, ours.key_pools[1], ours.value_pools[1], slots)
    torch_backend.write_kv(key, value, theirs.key_pools[1], theirs.value_pools[1], slots)
    for mine, other in zip((*ours.key_pools, *ours.value_pools), (*theirs.key_pools, *theirs.value_pools), strict=True):
        assert torch.equal(mine, other)


def test_padding_may_share_a_slot(device: str) -> None:
    from pagebrain.kernels.paged import write_kv

    key_pool, value_pool = (torch.zeros(3, 8, 2, 16, device=device) for _ in range(2))
    key = torch.randn(4, 2, 16, device=device)
    write_kv(key, key, key_pool, value_pool, torch.tensor([9, 0, 0, 0], device=device))
    assert torch.equal(key_pool[1, 1], key[0])
    assert not key_pool[0, 1:].any() and not key_pool[1, 2:].any() and not key_pool[2].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": torch.zeros(4, 2, 8)}, "the same shape"),
        ({"key": torch.zeros(4, 3, 16), "value": torch.zeros(4, 3, 16)}, r"expected \[num_tokens, 2, 16\]"),
        ({"value": torch.zeros(4, 2, 16, dtype=torch.float16)}, "convert them"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int64)}, r"integers \[4\]"),
        ({"slot_mapping": torch.zeros(4)}, r"integers \[4\]"),
        ({"value_pool": torch.zeros(3, 2, 8, 16).transpose(1, 2)}, "make both alike"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    change: dict[str, torch.Tensor], said: str, device: str
) -> None:
    from pagebrain.kernels.paged import write_kv

    inputs = {
        "key": torch.ones(4, 2, 16),
        "value": torch.ones(4, 2, 16),
        "key_pool": torch.zeros(3, 8, 2, 16),
        "value_pool": torch.zeros(3, 8, 2, 16),
        "slot_mapping": torch.arange(4),
    } | change
    inputs = {name: moved(tensor, device) for name, tensor in inputs.items()}
    with pytest.raises(KernelError, match=said):
        write_kv(**inputs)
    assert not inputs["key_pool"].any() and not inputs["value_pool"].any()
