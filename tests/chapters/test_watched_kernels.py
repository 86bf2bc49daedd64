"""The watched interpreter, the compiler without a GPU, and what the chapters' tests and notebooks make of them."""

import math
from typing import Any

import pytest
import torch

from tests.support.kernels import kernel_device, why_no_kernels

REASON = why_no_kernels("cpu") if kernel_device() == "cpu" else "kernels are compiled in this process"
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def kernels() -> Any:
    """Kernels that leave places undefined, and helpers; imported late because they need Triton."""
    from tests.support import careless_kernels

    return careless_kernels


@pytest.mark.parametrize(
    ("dtype", "undefined"), [(torch.float32, math.nan), (torch.float16, math.nan), (torch.bfloat16, math.nan)]
)
def test_what_a_masked_load_leaves_out_is_nan_in_a_watched_kernel(
    kernels: Any, dtype: torch.dtype, undefined: float
) -> None:
    from chapters.aids.watch_kernels import watching

    x, out = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    kernels.copy_two[1,](out, x, TILE=4)
    assert out.tolist() == [1, 1, 0, 0], "the interpreter itself puts 0 there"
    with watching():
        kernels.copy_two[1,](out, x, TILE=4)
    assert out[:2].tolist() == [1, 1] and out[2:].isnan().all()
    kernels.copy_two[1,](out, x, TILE=4)
    assert out.tolist() == [1, 1, 0, 0], "the watch ends with its block"


def test_an_undefined_integer_is_large(kernels: Any) -> None:
    from chapters.aids.watch_kernels import watching

    x, out = torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    with watching():
        kernels.copy_two[1,](out, x, TILE=4)
    assert out[:2].tolist() == [1, 1] and (out[2:] > 2**40).all()


def test_loads_and_stores_are_noted_with_their_program_tensor_and_bytes(kernels: Any) -> None:
    from chapters.aids.draw_accesses import draw_accesses
    from chapters.aids.watch_kernels import watching

    x, out = torch.ones(8), torch.zeros(8)
    with watching() as watch:
        kernels.copy_two[2,](out, x, TILE=4)
    told = [
        (access.program[0], access.verb, access.tensor, access.places[access.is_used].tolist()) for access in watch.accesses
    ]
    assert told == [
        (0, "reads", "x_ptr", [0, 1]),
        (0, "writes", "out_ptr", [0, 1, 2, 3]),
        (1, "reads", "x_ptr", [4, 5]),
        (1, "writes", "out_ptr", [4, 5, 6, 7]),
    ]
    assert watch.num_bytes("x_ptr") == 16 and watch.num_bytes() == 48
    picture = draw_accesses(watch, {"x_ptr": x, "out_ptr": out})
    assert "program 1 reads x 4 to 5" in picture.alt and picture.png()


def test_the_number_of_task_6_6_is_what_the_reference_moves() -> None:
    from chapters import ch06_kernels
    from chapters.aids.watch_kernels import watching

    if not hasattr(ch06_kernels, "answer_6_6"):
        pytest.skip("chapter 06 is left to the reader here")
    key_pool, value_pool = (torch.randn(6, 16, 2, 64).half() for _ in range(2))
    query = torch.randn(1, 2, 64).half()
    tables, lens = torch.randperm(6)[None], torch.tensor([96])
    with watching() as watch:
        ch06_kernels.paged_decode(query, key_pool, value_pool, tables, lens, 0.125, num_splits=6)
    work = ch06_kernels.decode_work(1, 96, 2, 64, 2)
    assert ch06_kernels.answer_6_6()[0] == work.num_operations / watch.num_bytes()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sums_an_integer", "`total` begins as int32 and is fp32 at the end of the loop's body"),
        ("keeps_a_dictionary", "this is Python that a kernel cannot have"),
        ("sizes_a_tile_by_an_argument", "tl.arange takes constants"),
        ("calls_a_wrong_helper", "refuses sums_an_integer_of"),
    ],
)
def test_the_compiler_says_which_line_it_refuses_and_why(kernels: Any, name: str, told: str) -> None:
    from tests.support.compile_learners import refusal

    kernel = getattr(kernels, name)
    said = refusal(kernel, {"out_ptr": "*fp32", "x_ptr": "*fp32", "count": "i32"}, {"TILE": 4})
    assert said is not None and told in said, said
    assert "careless_kernels.py:" in said and "\n" not in said


def test_a_kernel_that_a_gpu_takes_is_not_refused_and_the_interpreter_still_interprets(kernels: Any) -> None:
    from tests.support.compile_learners import refusal

    assert refusal(kernels.copy_two, {"out_ptr": "*fp32", "x_ptr": "*fp32"}, {"TILE": 4}) is None
    out = torch.zeros(4)
    kernels.copy_two[1,](out, torch.ones(4), TILE=4)
    assert out.tolist() == [1, 1, 0, 0]
