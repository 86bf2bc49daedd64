"""The prefill kernel gives what dense attention gives, whatever was cached before and however the batch is cut up."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.attention_scene import Scene, moved
from tests.support.kernels import tolerance

NAN = math.nan
RAGGED = ([5, 1, 17, 0, 33, 2], [5, 1, 33, 4, 33, 100])
"""Whole prompts, chunks over cached prefixes, a decode, and a sequence with nothing to compute."""

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"num_heads": 2, "head_dim": 64, "block_size": 16, "heads_first": True},
    "small blocks": {"num_heads": 1, "head_dim": 64, "block_size": 8},
    "large blocks": {"num_heads": 1, "head_dim": 32, "block_size": 128},
    "head of 80": {"num_heads": 2, "head_dim": 80, "block_size": 16},
    "head of 128": {"num_heads": 1, "head_dim": 128, "block_size": 32},
    "groups of 3": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "block_size": 16},
}
CASES = [(name, torch.float32) for name in SHAPES]
CASES += [("gpt2", torch.bfloat16), ("gpt2", torch.float16), ("head of 80", torch.bfloat16)]


def prefill(scene: Scene, device: str, block_m: int | None = None, **options: Any) -> Tensor:
    from pagebrain.kernels.paged import paged_prefill
    from pagebrain.kernels.prefill import PrefillTiling

    tiling = PrefillTiling(block_m=block_m, block_n=32) if block_m else None
    return scene.run(paged_prefill, device, tiling=tiling, **options)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_equals_dense_attention(name: str, dtype: torch.dtype, device: str) -> None:
    scene = Scene(*RAGGED, dtype=dtype, poison=NAN, **SHAPES[name])
    out = prefill(scene, device)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), scene.dense(), atol=tolerance(dtype), rtol=tolerance(dtype))


@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_any_tile_gives_the_same(block_m: int, device: str) -> None:
    """Sequences that end at a tile's edge, just before it and just after, in every order."""
    lens = [15, 16, 17, 1, 31, 32, 33]
    for query_lens in (lens, lens[::-1]):
        scene = Scene(query_lens, [count + 3 for count in query_lens], head_dim=16, num_heads=1, dtype=torch.float32)
        out = prefill(scene, device, block_m=block_m)
        torch.testing.assert_close(out.double(), scene.dense(), atol=1e-5, rtol=0)


def test_a_prompt_in_chunks_gives_what_it_gives_in_one_piece(device: str) -> None:
    whole = Scene([50], [50], num_heads=2, head_dim=64, block_size=16, dtype=torch.float32, heads_first=True)
    expected = prefill(whole, device)
    query, pieces, done = whole.query, [], 0
    for count in (7, 1, 16, 17, 9):
        whole.query = query[done : done + count].contiguous()
        whole.query_starts, whole.context_lens = torch.tensor([0, count]), torch.tensor([done + count])
        pieces.append(prefill(whole, device))
        done += count
    assert done == 50
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-6, rtol=0)


def test_one_query_gives_what_the_decode_kernel_gives(device: str) -> None:
    from pagebrain.kernels import paged

    paged_decode: Any = paged.paged_decode
    scene = Scene([1] * 4, [1, 16, 17, 50], num_heads=2, head_dim=64, block_size=16, dtype=torch.float32)
    decoded = scene.run(lambda *args: paged_decode(*args[:5], args[6]), device)
    torch.testing.assert_close(prefill(scene, device), decoded, atol=1e-6, rtol=0)


def test_more_sequences_than_a_program_looks_at_in_one_go(device: str) -> None:
    query_lens = [1 + index % 3 for index in range(150)]
    scene = Scene(query_lens, query_lens, num_heads=1, head_dim=16, block_size=8, dtype=torch.float32)
    out = prefill(scene, device, block_m=16)
    torch.testing.assert_close(out.double(), scene.dense(), atol=1e-5, rtol=0)


def test_decodes_are_left_alone_when_asked(device: str) -> None:
    scene = Scene(*RAGGED, dtype=torch.float32, num_heads=2, head_dim=16, block_size=8)
    out = moved(torch.full_like(scene.query, -7.0), device)
    found = prefill(scene, device, skip_decodes=True, out=out)
    decode = torch.zeros(len(found), dtype=torch.bool)
    decode[5] = True
    assert (found[decode] == -7.0).all()
    torch.testing.assert_close(found[~decode].double(), scene.dense()[~decode], atol=1e-5, rtol=0)


def test_table_entries_past_the_pages_are_never_followed(device: str) -> None:
    scene = Scene(*RAGGED, dtype=torch.float32, num_heads=1, head_dim=16, block_size=8, poison=NAN)
    for index, count in enumerate(scene.pages):
        scene.block_tables[index, count:] = 2**40
    torch.testing.assert_close(prefill(scene, device).double(), scene.dense(), atol=1e-5, rtol=0)
