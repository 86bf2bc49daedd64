"""The part that the engine uses: one call for decodes and prefills side by side, and clear words for what cannot be."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from pagebrain.errors import KernelError
from tests.support.attention_scene import Scene
from tests.support.kernels import noting

MIXED = ([1, 5, 1, 17, 1, 0], [40, 5, 1, 33, 100, 3])
SHAPE: dict[str, Any] = {"num_heads": 2, "head_dim": 64, "block_size": 16, "heads_first": True, "dtype": torch.float32}


@pytest.mark.parametrize("num_decodes", [None, 3])
def test_decodes_and_prefills_of_one_step_go_to_their_kernels(num_decodes: int | None, device: str) -> None:
    from pagebrain.kernels.paged import paged_attention

    scene = Scene(*MIXED, poison=math.nan, **SHAPE)
    out = scene.run(paged_attention, device, num_decodes=num_decodes)
    torch.testing.assert_close(out.double(), scene.dense(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("query_lens", "launched"), [([1, 1, 1], {"paged_decode"}), ([2, 3, 4], {"paged_prefill"})], ids=["decodes", "prefills"]
)
def test_a_kernel_with_nothing_to_do_is_not_launched_when_the_host_knows(
    query_lens: list[int], launched: set[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pagebrain.kernels import paged

    called: list[str] = []
    for name in ("paged_decode", "paged_prefill"):
        monkeypatch.setattr(paged, name, noting(name, called.append, getattr(paged, name)))
    scene = Scene(query_lens, [9, 20, 4], poison=math.nan, **SHAPE)
    out = scene.run(paged.paged_attention, device, num_decodes=query_lens.count(1))
    assert set(called) == launched
    torch.testing.assert_close(out.double(), scene.dense(), atol=1e-5, rtol=0)


def test_a_sequence_is_computed_by_one_kernel_only(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the decode kernel the rows of decodes are left as they were."""
    from pagebrain.kernels import paged

    monkeypatch.setattr(paged, "paged_decode", lambda *args, **options: None)
    original = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *args, **options: original(self, *args, **options).fill_(-7))
    scene = Scene(*MIXED, **SHAPE)
    out = scene.run(paged.paged_attention, device, num_decodes=3)
    decodes = torch.tensor([0, 6, 24])
    assert (out[decodes] == -7).all() and (out != -7).any(dim=(1, 2)).sum() == len(out) - 3


def test_rows_of_no_sequence_are_zero_where_the_host_does_not_count(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the padding of a graph, and what is left in memory there must not get into anything."""
    from pagebrain.kernels import paged

    original = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *args, **options: original(self, *args, **options).fill_(-7))
    scene = Scene(*MIXED, **SHAPE)
    num_tokens, expected = len(scene.query), scene.dense()
    scene.query = torch.cat([scene.query, torch.ones_like(scene.query[:3])])
    out = scene.run(paged.paged_attention, device)
    assert out.shape[0] == num_tokens + 3 and (out[num_tokens:] == 0).all()
    torch.testing.assert_close(out[:num_tokens].double(), expected, atol=1e-5, rtol=0)


def test_sequences_may_share_blocks(device: str) -> None:
    from pagebrain.kernels.paged import paged_attention

    scene = Scene([1, 3], [32, 32], **SHAPE)
    scene.block_tables[1] = scene.block_tables[0]
    scene.keys[1], scene.values[1] = scene.keys[0], scene.values[0]
    torch.testing.assert_close(scene.run(paged_attention, device).double(), scene.dense(), atol=1e-5, rtol=0)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"query": torch.zeros(2, 2, 64, dtype=torch.float16)}, "the pools' torch.float32"),
    ({"query": torch.zeros(2, 2, 32)}, "head_dim 32, expected the pools' 64"),
    ({"query": torch.zeros(2, 3, 64)}, "a multiple of the pools' 2 heads"),
    ({"query": torch.zeros(2, 64, 2).transpose(1, 2)}, "a contiguous last dimension"),
    ({"key_pool": torch.zeros(4, 16, 2, 64, dtype=torch.float64)}, "make both alike"),
    (dict.fromkeys(("key_pool", "value_pool"), torch.zeros(4, 16, 64, 2).transpose(2, 3)), "a contiguous last dimension"),
    ({"context_lens": torch.zeros(2)}, r"context_lens with torch.float32 \[2\]"),
    ({"block_tables": torch.zeros(3, 2, dtype=torch.int64)}, r"integers \[2, max_blocks\]"),
    ({"block_tables": torch.zeros(2, 2, dtype=torch.int64).t()}, "contiguous rows"),
    ({"query_starts": torch.zeros(2, dtype=torch.int64)}, r"query_starts with .* \[2\]"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_what_the_kernels_do_not_work_on_is_refused(change: dict[str, Any], said: str, device: str) -> None:
    from pagebrain.kernels.paged import paged_attention

    inputs: dict[str, Any] = {
        "query": torch.zeros(2, 2, 64),
        "key_pool": torch.zeros(4, 16, 2, 64),
        "value_pool": torch.zeros(4, 16, 2, 64),
        "block_tables": torch.zeros(2, 2, dtype=torch.int64),
        "context_lens": torch.ones(2, dtype=torch.int64),
        "query_starts": torch.tensor([0, 1, 2]),
    } | change
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with pytest.raises(KernelError, match=said):
        paged_attention(**inputs, scale=1.0)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "said"), [(torch.float64, 64, "not in float64"), (torch.float16, 256, "up to 128, not 256")]
)
def test_dtypes_and_heads_that_the_kernels_lack_are_refused(
    dtype: torch.dtype, head_dim: int, said: str, device: str
) -> None:
    from pagebrain.kernels.paged import paged_attention

    scene = Scene([1], [3], head_dim=head_dim, dtype=dtype)
    with pytest.raises(KernelError, match=f"{said}.*use the part attention=pagebrain.attention:paged_attention"):
        scene.run(paged_attention, device)


@pytest.mark.parametrize("num_splits", [0, 33])
def test_splits_out_of_range_are_refused(num_splits: int, device: str) -> None:
    from pagebrain.kernels import paged

    paged_decode: Any = paged.paged_decode
    scene = Scene([1], [3], **SHAPE)
    with pytest.raises(KernelError, match=f"num_splits must be 1 to 32, got {num_splits}"):
        scene.run(lambda *args: paged_decode(*args[:5], args[6], num_splits=num_splits), device)


def test_compiled_kernels_refuse_tensors_on_the_cpu() -> None:
    from pagebrain.kernels.inputs import check_device

    pool = torch.zeros(1)
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        check_device(False, pool)
    check_device(True, pool)
    with pytest.raises(KernelError, match="query with device meta, expected the pools' cpu"):
        check_device(True, pool, query=torch.zeros(1, device="meta"))


def test_without_triton_the_error_says_what_to_install() -> None:
    """In a process of its own, where importing Triton fails."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from pagebrain.engine.parts import find_part\n"
        "from pagebrain.errors import PartError\n"
        "try:\n"
        "    find_part('attention', 'pagebrain.kernels.paged:paged_attention', None)\n"
        "except PartError as error:\n"
        "    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "the GPU kernels need Triton" in said and "pip install 'triton" in said
