"""Who computes where: the kernels on a GPU if they can, torch operations everywhere else."""

import sys
from types import SimpleNamespace

import pytest
import torch

from pagebrain.attention import choice, cpu
from pagebrain.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_gets_torch_operations() -> None:
    assert choice.default_attention(CPU, torch.float32, 64) is cpu.paged_attention
    assert choice.default_writer(CPU, torch.float32, 64) is cpu.write_kv


def test_a_gpu_gets_the_kernels_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    if not choice.available():
        pytest.skip("there is no Triton 3.6 or later: pip install -r requirements.txt on Linux")
    from pagebrain.attention import kernels

    assert choice.default_attention(CUDA, torch.bfloat16, 64) is kernels.paged_attention
    assert choice.default_writer(CUDA, torch.bfloat16, 64) is kernels.write_kv
    monkeypatch.setattr(choice, "available", lambda: False)
    assert choice.default_attention(CUDA, torch.bfloat16, 64) is cpu.paged_attention
    assert choice.default_writer(CUDA, torch.bfloat16, 64) is cpu.write_kv


@pytest.mark.parametrize(("dtype", "head_dim", "said"), [(torch.float64, 64, "float64"), (torch.bfloat16, 256, "256")])
def test_a_gpu_gets_torch_operations_for_what_the_kernels_lack(dtype: torch.dtype, head_dim: int, said: str) -> None:
    assert choice.default_attention(CUDA, dtype, head_dim) is cpu.paged_attention
    if choice.available():
        assert said in str(choice.kernels_fit(CUDA, dtype, head_dim))


@pytest.mark.parametrize(("version", "fits"), [("3.2.0", False), ("3.6.0", True), ("3.10.1", True), ("4.0", True)])
def test_a_triton_that_is_too_old_is_none(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert choice.available() == fits
    if not fits:
        assert "no Triton 3.6 or later" in str(choice.kernels_fit(CUDA, torch.bfloat16, 64))
        with pytest.raises(ConfigError, match="need Triton 3.6 or later, and this is 3.2.0: pip install"):
            choice.require_triton()
