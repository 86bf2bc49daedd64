"""The norm kernel: it adds, norms and gathers as torch does, for the widths of real models."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pagebrain.kernels.inputs import Rows
from pagebrain.layers import Embedding, LayerNorm
from tests.support.kernels import require_kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def filled(layer: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Give a layer random weights."""
    torch.manual_seed(0)
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch.randn(parameter.shape, device=device, dtype=dtype), requires_grad=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 768])
def test_addition_and_norm_are_those_of_torch(width: int, dtype: torch.dtype, device: str) -> None:
    require_kernels(device)
    norm = LayerNorm(width, 1e-5)
    filled(norm, dtype, device)
    hidden, residual = (torch.randn(3, width, dtype=dtype, device=device) for _ in range(2))
    expected, total = norm(hidden, residual)
    assert torch.equal(total, residual + hidden)
    norm.prepare(kernels=True, owned=False)
    normed, new_residual = norm(hidden, residual)
    close: dict[str, Any] = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(new_residual, total, **close)  # in bfloat16 the interpreter rounds down
    torch.testing.assert_close(normed, expected, **close)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_embeddings_are_gathered_by_the_kernel_that_adds_them(dtype: torch.dtype, device: str) -> None:
    require_kernels(device)
    wte, wpe, norm = Embedding(11, 48), Embedding(7, 48), LayerNorm(48, 1e-5)
    for layer in (wte, wpe, norm):
        filled(layer, torch.float32, device)
    token_ids, positions = (torch.tensor(numbers, dtype=dtype, device=device) for numbers in ([10, 0, 3], [6, 1, 0]))
    expected: Tensor = functional.embedding(token_ids, wte.weight) + functional.embedding(positions, wpe.weight)
    torch.testing.assert_close(wte(token_ids) + wpe(positions), expected, atol=0, rtol=0)
    for layer in (wte, wpe, norm):
        layer.prepare(kernels=True, owned=False)
    assert isinstance(wte(token_ids), Rows)
    normed, residual = norm(wte(token_ids), wpe(positions))
    assert torch.equal(residual, expected)
    wanted = functional.layer_norm(expected, (48,), norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(normed, wanted, atol=1e-5, rtol=1e-5)


def test_a_batch_without_tokens_is_no_launch(device: str) -> None:
    require_kernels(device)
    norm = LayerNorm(48, 1e-5)
    filled(norm, torch.float32, device)
    norm.prepare(kernels=True, owned=False)
    empty = torch.empty(0, 48, device=device)
    assert [tensor.shape for tensor in norm(empty, empty)] == [(0, 48), (0, 48)]
