"""Every paged attention gives what dense attention gives, whatever lies where in the pool."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chapters import ch03_paged_attention
from pagebrain.attention import paged_attention
from tests.support.models import POISON

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "page by page": lambda *args: paged_attention(*args, pages_per_step=1),
    "three pages": lambda *args: paged_attention(*args, pages_per_step=3),
    "default": paged_attention,
    "chapter 03": ch03_paged_attention.paged_attention,
}
FULL_PRECISION_INSIDE = [name for name in IMPLEMENTATIONS if name != "chapter 03"]
"""Those that compute in float32 whatever the inputs are; the chapter computes in the dtype it is given."""


class Scene:
    """Sequences whose K and V lie in random blocks of a poisoned pool, and their dense copies."""

    def __init__(
        self,
        query_lens: list[int],
        context_lens: list[int],
        block_size: int = 4,
        num_heads: int = 2,
        head_dim: int = 8,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        heads_first: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.query_lens, self.lens = query_lens, context_lens
        pages = [-(-length // block_size) for length in context_lens]
        num_blocks = sum(pages) + 3
        order = torch.randperm(num_blocks, generator=generator).tolist()
        shape = (
            (num_blocks, num_heads, block_size, head_dim) if heads_first else (num_blocks, block_size, num_heads, head_dim)
        )
        pools = [torch.full(shape, POISON, dtype=dtype) for _ in range(2)]
        self.key_pool, self.value_pool = (pool.transpose(1, 2) if heads_first else pool for pool in pools)
        width = max(pages) + 2
        self.block_tables = torch.full((len(pages), width), order[-1], dtype=torch.int64)
        self.keys, self.values = [], []
        for index, (length, count) in enumerate(zip(context_lens, pages, strict=True)):
            table, order = order[:count], order[count:]
            self.block_tables[index, :count] = torch.tensor(table)
            key, value = (torch.randn(length, num_heads, head_dim, dtype=dtype, generator=generator) for _ in range(2))
            for position in range(length):
                slot = table[position // block_size], position % block_size
                self.key_pool[slot], self.value_pool[slot] = key[position], value[position]
            self.keys.append(key)
            self.values.append(value)
        self.query = torch.randn(sum(query_lens), num_heads, head_dim, dtype=dtype, generator=generator)
        self.context_lens = torch.tensor(context_lens)
        self.query_starts = torch.tensor([0, *query_lens]).cumsum(0)
        self.scale = 1 / math.sqrt(head_dim)

    def run(self, attention: Callable[..., Tensor]) -> Tensor:
        pools = (self.key_pool, self.value_pool)
        return attention(self.query, *pools, self.block_tables, self.context_lens, self.query_starts, self.scale)

    def dense(self) -> Tensor:
        """The textbook formula in float64, one sequence at a time."""
        out, start = [], 0
        for count, length, key, value in zip(self.query_lens, self.lens, self.keys, self.values, strict=True):
            query = self.query[start : start + count].double()
            scores = torch.einsum("qhd,khd->hqk", query, key.double()) * self.scale
            positions = torch.arange(length - count, length)
            scores.masked_fill_(torch.arange(length) > positions[:, None], -math.inf)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double()))
            start += count
        return torch.cat(out)


@st.composite
def scenes(draw: Any) -> Scene:
    """Prefills, decodes and chunks over cached prefixes side by side, around page edges."""
    lens = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=7))
    query_lens = [count for count, _ in lens]
    return Scene(
        query_lens,
        [count + cached for count, cached in lens],
        block_size=draw(st.sampled_from([1, 2, 4, 8, 16])),
        num_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([1, 4, 16])),
        seed=draw(st.integers(0, 2**16)),
        heads_first=draw(st.booleans()),
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(scene=scenes())
def test_equals_dense_attention_over_random_pages(name: str, scene: Scene) -> None:
    torch.testing.assert_close(scene.run(IMPLEMENTATIONS[name]), scene.dense(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", FULL_PRECISION_INSIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_its_inputs(name: str, dtype: torch.dtype) -> None:
    scene = Scene([1, 5, 1, 17], [40, 5, 1, 33], num_heads=3, head_dim=64, dtype=dtype)
    out = scene.run(IMPLEMENTATIONS[name])
    assert out.dtype == dtype
    # Scores and sums in float32, so that only the rounding of the result itself is left.
    torch.testing.assert_close(out.double(), scene.dense(), atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_scores_neither_overflow_nor_lose_the_maximum(name: str) -> None:
    scene = Scene([3, 1], [21, 30], dtype=torch.float32)
    scene.query *= 300.0  # exp of such scores is infinite unless the running maximum is taken off
    out = scene.run(IMPLEMENTATIONS[name])
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), scene.dense(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_pools_are_only_read(name: str) -> None:
    scene = Scene([2, 1], [9, 14])
    before = scene.key_pool.clone(), scene.value_pool.clone()
    scene.run(IMPLEMENTATIONS[name])
    assert torch.equal(scene.key_pool, before[0]) and torch.equal(scene.value_pool, before[1])


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's fresh result had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(isinstance(a, Tensor) and a.data_ptr() == result.data_ptr() for a in args):
            self.numel = max(self.numel, result.numel())
        return result


def largest_temporary(scene: Scene, pages_per_step: int) -> int:
    with LargestTensor() as mode:
        scene.run(lambda *args: paged_attention(*args, pages_per_step=pages_per_step))
    return mode.numel


@pytest.mark.parametrize("pages_per_step", [1, 4, 16])
def test_temporary_memory_depends_on_pages_per_step_and_not_on_the_context(pages_per_step: int) -> None:
    """No fresh tensor is larger than the pages of one step, though the longest context is 256 pages."""
    scene = Scene([1, 1, 1], [16, 512, 1024], num_heads=4, head_dim=64)
    page_numel = scene.key_pool[0].numel()
    indices = scene.block_tables.numel()  # numbers of pages, one for each: they do grow with the context
    assert indices < page_numel < largest_temporary(scene, pages_per_step) + 1 <= pages_per_step * page_numel + 1


def test_a_short_sequence_is_not_padded_to_the_longest() -> None:
    """One long sequence beside many short ones gathers each page once, and few more."""
    scene = Scene([1] * 9, [4096] + [4] * 8)
    gathered = 0
    original = Tensor.index_select

    def counting(self: Tensor, dim: int, index: Tensor) -> Tensor:
        nonlocal gathered
        gathered += len(index) * self.shape[1] // scene.key_pool.shape[2]  # a run of one head is a share of a page
        return original(self, dim, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "index_select", counting)
        scene.run(paged_attention)
    needed = 2 * (4096 // 4 + 8)
    assert needed <= gathered < needed * 1.1
