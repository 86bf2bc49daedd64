"""Every paged attention gives what dense attention gives, whatever lies where in the pool."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chapters import ch03_paged_attention
from chapters.aids.new_tensors import NewTensors
from pagebrain.attention import paged_attention
from tests.support.attention_scene import Scene
from tests.support.kernels import require_kernels


def kernels_on(device: str) -> Callable[..., Tensor]:
    """The Triton kernels with the scene on ``device``; skips the test where they cannot run."""

    def attention(*args: Any) -> Tensor:
        require_kernels(device)
        from pagebrain.kernels import paged

        part: Callable[..., Tensor] = paged.paged_attention
        return part(*(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)).cpu()

    return attention


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "page by page": lambda *args: paged_attention(*args, pages_per_step=1),
    "three pages": lambda *args: paged_attention(*args, pages_per_step=3),
    "default": paged_attention,
    "chapter 03": ch03_paged_attention.paged_attention,
    "triton, interpreted": kernels_on("cpu"),
    "triton": kernels_on("cuda"),
}
KERNELS = [name for name in IMPLEMENTATIONS if name.startswith("triton")]
"""Those that compute in float32 at most."""

FULL_PRECISION_INSIDE = [name for name in IMPLEMENTATIONS if name != "chapter 03"]
"""Those that compute in float32 whatever the inputs are; the chapter computes in the dtype it is given."""


def each(names: Iterable[str]) -> pytest.MarkDecorator:
    """The test for each implementation, those that need a GPU marked so."""
    marks = {"triton": [pytest.mark.gpu]}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks.get(name, [])) for name in names])


@st.composite
def scenes(draw: Any, dtype: torch.dtype = torch.float64) -> Scene:
    """Prefills, decodes and chunks over cached prefixes side by side, around page edges."""
    lens = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=7))
    query_lens = [count for count, _ in lens]
    return Scene(
        query_lens,
        [count + cached for count, cached in lens],
        block_size=draw(st.sampled_from([1, 2, 4, 8, 16])),
        num_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([1, 4, 16])),
        dtype=dtype,
        seed=draw(st.integers(0, 2**16)),
        heads_first=draw(st.booleans()),
    )


@each(name for name in IMPLEMENTATIONS if name not in KERNELS)
@settings(max_examples=60, deadline=None)
@given(scene=scenes())
def test_equals_dense_attention_over_random_pages(name: str, scene: Scene) -> None:
    torch.testing.assert_close(scene.run(IMPLEMENTATIONS[name]), scene.dense(), atol=1e-12, rtol=0)


@each(KERNELS)
@settings(max_examples=15, deadline=None)  # the interpreter takes its time
@given(scene=scenes(dtype=torch.float32))
def test_kernels_equal_dense_attention_over_random_pages(name: str, scene: Scene) -> None:
    torch.testing.assert_close(scene.run(IMPLEMENTATIONS[name]).double(), scene.dense(), atol=1e-5, rtol=0)


@each(FULL_PRECISION_INSIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_its_inputs(name: str, dtype: torch.dtype) -> None:
    scene = Scene([1, 5, 1, 17], [40, 5, 1, 33], num_heads=3, head_dim=64, dtype=dtype)
    out = scene.run(IMPLEMENTATIONS[name])
    assert out.dtype == dtype
    # Scores and sums in float32, so that only the rounding of the result itself is left.
    torch.testing.assert_close(out.double(), scene.dense(), atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@each(IMPLEMENTATIONS)
def test_large_scores_neither_overflow_nor_lose_the_maximum(name: str) -> None:
    scene = Scene([3, 1], [21, 30], dtype=torch.float32)
    scene.query *= 300.0  # exp of such scores is infinite unless the running maximum is taken off
    out = scene.run(IMPLEMENTATIONS[name])
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), scene.dense(), atol=1e-3, rtol=0)


@each(IMPLEMENTATIONS)
def test_the_pools_are_only_read(name: str) -> None:
    scene = Scene([2, 1], [9, 14], dtype=torch.float32)
    before = scene.key_pool.clone(), scene.value_pool.clone()
    scene.run(IMPLEMENTATIONS[name])
    assert torch.equal(scene.key_pool, before[0]) and torch.equal(scene.value_pool, before[1])


def largest_temporary(scene: Scene, pages_per_step: int) -> int:
    with NewTensors() as made:
        scene.run(lambda *args: paged_attention(*args, pages_per_step=pages_per_step))
    return made.largest


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
