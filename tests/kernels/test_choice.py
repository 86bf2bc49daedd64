"""Which attention backend an engine gets: the kernels on a GPU if they can, torch operations everywhere else."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pagebrain.attention import choose_backend, triton_backend
from pagebrain.attention.torch_backend import FunctionBackend, TorchBackend
from pagebrain.attention.triton_backend import TritonBackend
from pagebrain.errors import ConfigError
from pagebrain.kernels import version

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_gets_torch_operations() -> None:
    backend, reason = choose_backend(None, CPU, torch.float32, 64)
    assert type(backend) is TorchBackend and reason is None


def test_a_gpu_gets_the_kernels_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    if not version.available():
        pytest.skip("there is no Triton 3.6 or later: pip install -r requirements.txt on Linux")
    backend, reason = choose_backend(None, CUDA, torch.bfloat16, 64)
    assert type(backend) is TritonBackend and reason is None
    monkeypatch.setattr(triton_backend, "available", lambda: False)
    backend, reason = choose_backend(None, CUDA, torch.bfloat16, 64)
    assert type(backend) is TorchBackend and "no Triton 3.6 or later" in str(reason)


@pytest.mark.parametrize(("dtype", "head_dim", "said"), [(torch.float64, 64, "float64"), (torch.bfloat16, 256, "256")])
def test_a_gpu_gets_torch_operations_for_what_the_kernels_lack(dtype: torch.dtype, head_dim: int, said: str) -> None:
    backend, reason = choose_backend(None, CUDA, dtype, head_dim)
    assert type(backend) is TorchBackend
    if version.available():
        assert said in str(reason)
        with pytest.raises(ConfigError, match=f"the attention that was named cannot serve this model: .*{said}"):
            choose_backend(TritonBackend, CUDA, dtype, head_dim)


def test_a_function_is_wrapped_and_a_backend_is_taken_as_it_is() -> None:
    class Own(TorchBackend):
        pass

    def function(*inputs: Any) -> Any:
        return inputs

    function.supports = frozenset({"async_scheduling", "batch_rows"})  # type: ignore[attr-defined]
    backend, _ = choose_backend(function, CPU, torch.float32, 64)
    # Rows that are not active would be read as sequences by a function that is not told which are.
    assert type(backend) is FunctionBackend and backend.supports == {"async_scheduling"}
    assert type(choose_backend(Own, CPU, torch.float32, 64)[0]) is Own
    made = Own()
    assert choose_backend(made, CPU, torch.float32, 64) == (made, None)


@pytest.mark.parametrize(("found", "fits"), [("3.2.0", False), ("3.6.0", True), ("3.10.1", True), ("4.0", True)])
def test_a_triton_that_is_too_old_is_none(found: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=found))
    assert version.available() == fits
    if not fits:
        assert "no Triton 3.6 or later" in str(TritonBackend.reason_against(CUDA, torch.bfloat16, 64))
        with pytest.raises(ConfigError, match="need Triton 3.6 or later, and this is 3.2.0: pip install"):
            version.require_triton()
