"""The decode kernels give what dense attention gives, however a context is cut up and wherever its pages lie.

Unused slots and scratch memory hold NaN here: a kernel that reads any of it, even with a weight of zero, shows it.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pagebrain.errors import KernelError
from tests.support.attention_scene import Scene, moved
from tests.support.kernels import tolerance

NAN = math.nan
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"num_heads": 2, "head_dim": 64, "block_size": 16, "heads_first": True},
    "half a tile in a block": {"num_heads": 2, "head_dim": 64, "block_size": 8, "heads_first": True},
    "two tiles in a block": {"num_heads": 2, "head_dim": 64, "block_size": 32, "heads_first": True},
    "slots first": {"num_heads": 3, "head_dim": 64, "block_size": 16},
    "head of 80": {"num_heads": 2, "head_dim": 80, "block_size": 16},
    "head of 16": {"num_heads": 2, "head_dim": 16, "block_size": 16},
    "head of 128": {"num_heads": 1, "head_dim": 128, "block_size": 64},
    "pairs of heads": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16},
    "one group of 20": {"num_heads": 20, "num_kv_heads": 1, "head_dim": 16, "block_size": 8},
    "groups with a head of 80": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 80, "block_size": 32},
}
HALF_PRECISION = ["gpt2", "half a tile in a block", "head of 80", "pairs of heads"]
CASES = [(name, torch.float32) for name in SHAPES]
CASES += [(name, dtype) for name in HALF_PRECISION for dtype in (torch.bfloat16, torch.float16)]


def contexts(block_size: int) -> list[int]:
    """No tokens, one, around a block's edges, around several tiles, a table filled to its end."""
    return [0, 1, block_size - 1, block_size, block_size + 1, 70, 8 * block_size]


def decode(scene: Scene, device: str, **options: Any) -> Tensor:
    """:func:`paged_decode` of a scene with one query per sequence, on the CPU again."""
    from pagebrain.kernels import paged

    paged_decode: Any = paged.paged_decode
    tensors = (scene.query, scene.key_pool, scene.value_pool, scene.block_tables, scene.context_lens)
    return paged_decode(*(moved(tensor, device) for tensor in tensors), scene.scale, **options).cpu()


def make(lens: list[int], dtype: torch.dtype = torch.float32, **shape: Any) -> Scene:
    return Scene([1] * len(lens), lens, dtype=dtype, poison=NAN, **shape)


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``new_empty`` hands out, scratch and results, holds NaN instead of what happened to be there."""
    original = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fresh = original(self, *args, **kwargs)
        return fresh.fill_(NAN) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_equals_dense_attention(name: str, dtype: torch.dtype, device: str) -> None:
    scene = make(contexts(SHAPES[name]["block_size"]), dtype, **SHAPES[name])
    out = decode(scene, device, num_splits=1)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), scene.dense(), atol=tolerance(dtype), rtol=tolerance(dtype))


@pytest.mark.parametrize("num_splits", [2, 3, 7, 32])
@pytest.mark.parametrize("name", ["half a tile in a block", "pairs of heads"])
def test_any_number_of_splits_gives_the_same(name: str, num_splits: int, device: str) -> None:
    """More splits than pages or tiles too: those that have nothing to read leave nothing behind."""
    shape = SHAPES[name]
    scene = make([0, 1, shape["block_size"], 70, 8 * shape["block_size"]], **shape)
    out = decode(scene, device, num_splits=num_splits)
    assert num_splits < 16 or num_splits > max(scene.pages)
    torch.testing.assert_close(out.double(), scene.dense(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tile", [4, 8, 32, 64])
def test_any_tile_gives_the_same(tile: int, device: str) -> None:
    from pagebrain.kernels.decode_plan import DecodeTiling

    scene = make(contexts(16), **SHAPES["gpt2"])
    tiling = DecodeTiling(tile=tile, num_warps=2, num_stages=2, unroll=2)
    out = decode(scene, device, num_splits=2, tiling=tiling)
    torch.testing.assert_close(out.double(), scene.dense(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "pairs of heads"])
def test_active_rows_choose_tables_and_contexts(name: str, num_splits: int, device: str) -> None:
    """Batch rows in any order, some left out and one named twice, as padding does."""
    scene = make([20, 0, 33, 5, 16], **SHAPES[name])
    rows = torch.tensor([4, 2, 0, 2], dtype=torch.int32)
    scene.query = scene.query[:4].contiguous()
    out = decode(scene, device, active_rows=moved(rows, device), num_splits=num_splits)
    chosen = make([20, 0, 33, 5, 16], **SHAPES[name])
    chosen.query = scene.query
    chosen.query_lens = [1] * 4
    for name_of_list in ("lens", "keys", "values"):
        values = getattr(chosen, name_of_list)
        setattr(chosen, name_of_list, [values[row] for row in rows.tolist()])
    torch.testing.assert_close(out.double(), chosen.dense(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "pairs of heads"])
def test_sequences_with_other_than_one_query_are_left_alone(name: str, num_splits: int, device: str) -> None:
    from pagebrain.kernels.paged import paged_decode

    scene = Scene([1, 3, 0, 1, 2], [17, 20, 4, 40, 2], dtype=torch.float32, poison=NAN, **SHAPES[name])
    out = moved(torch.full_like(scene.query, -7.0), device)

    def attend(*args: Any) -> Tensor:
        query, key_pool, value_pool, tables, context_lens, query_starts, scale = args
        options = {"query_starts": query_starts, "num_splits": num_splits, "out": out}
        return paged_decode(query, key_pool, value_pool, tables, context_lens, scale, **options)

    found, wanted = scene.run(attend, device), scene.dense()
    decodes = torch.tensor([True, False, False, False, True, False, False])
    torch.testing.assert_close(found[decodes].double(), wanted[decodes], atol=1e-5, rtol=0)
    assert (found[~decodes] == -7.0).all()


def test_table_entries_past_the_pages_are_never_followed(device: str) -> None:
    """They name blocks that no memory holds: following one ends the process, or the GPU's context."""
    for name in ("gpt2", "half a tile in a block", "groups with a head of 80"):
        scene = make(contexts(SHAPES[name]["block_size"])[:-1], **SHAPES[name])
        for index, count in enumerate(scene.pages):
            scene.block_tables[index, count:] = 2**40
        for num_splits in (1, 4):
            out = decode(scene, device, num_splits=num_splits)
            torch.testing.assert_close(out.double(), scene.dense(), atol=1e-5, rtol=0)


def test_tables_and_lengths_may_be_32_bit_integers(device: str) -> None:
    scene = make([0, 9, 40], **SHAPES["gpt2"])
    scene.block_tables, scene.context_lens = scene.block_tables.int(), scene.context_lens.int()
    torch.testing.assert_close(decode(scene, device).double(), scene.dense(), atol=1e-5, rtol=0)


def test_a_query_may_be_a_view_of_the_projection(device: str) -> None:
    """As the model has it: queries, keys and values of a token side by side."""
    scene = make([9, 40], **SHAPES["gpt2"])
    qkv = torch.stack([scene.query, scene.query * 3, scene.query * 5], dim=1)  # [num_tokens, 3, num_heads, head_dim]
    scene.query = qkv[:, 0]
    assert not scene.query.is_contiguous()
    torch.testing.assert_close(decode(scene, device).double(), scene.dense(), atol=1e-5, rtol=0)


def test_no_sequences_are_no_work(device: str) -> None:
    scene = make([5], **SHAPES["gpt2"])
    scene.query, scene.block_tables, scene.context_lens = scene.query[:0], scene.block_tables[:0], scene.context_lens[:0]
    assert decode(scene, device).shape == (0, 2, 64)


def test_more_sequences_than_a_launch_takes_are_refused(device: str) -> None:
    scene = make([1], num_heads=1, head_dim=16, block_size=8)
    too_many = 65_536
    scene.query = scene.query.expand(too_many, -1, -1).contiguous()
    scene.block_tables, scene.context_lens = scene.block_tables.repeat(too_many, 1), scene.context_lens.repeat(too_many)
    with pytest.raises(KernelError, match="at most 65535 sequences, got 65536: compute them in several"):
        decode(scene, device)


@pytest.mark.gpu
def test_a_graph_replays_with_new_lengths_and_rows() -> None:
    """The grid is captured once; which sequences there are and how long they are stays on the GPU."""
    from pagebrain.kernels.paged import paged_decode
    from tests.support.kernels import require_kernels

    require_kernels("cuda")
    scene = make([20, 0, 33, 70, 16], **SHAPES["gpt2"])
    query, key_pool, value_pool, tables, lens = (
        moved(tensor, "cuda")
        for tensor in (scene.query, scene.key_pool, scene.value_pool, scene.block_tables, scene.context_lens)
    )
    rows = torch.arange(5, dtype=torch.int32, device="cuda")
    captured_lens = torch.zeros_like(lens)
    inputs = (query, key_pool, value_pool, tables, captured_lens, scene.scale)
    paged_decode(*inputs, active_rows=rows, num_splits=4)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode(*inputs, active_rows=rows, num_splits=4)
    captured_lens.copy_(lens)
    graph.replay()
    torch.testing.assert_close(out.cpu().double(), scene.dense(), atol=1e-5, rtol=0)
    query.copy_(query.flip(0))
    rows.copy_(rows.flip(0))
    graph.replay()
    torch.testing.assert_close(out.cpu().double(), scene.dense().flip(0), atol=1e-5, rtol=0)
