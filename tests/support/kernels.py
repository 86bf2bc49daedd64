"""Where the Triton kernels can be tested: in Triton's interpreter on the CPU, or compiled on a GPU.

Which of the two a process does is decided when Triton is imported (tests/conftest.py chooses), so a test that runs on both
is two cases, and one of them is skipped.
"""

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from pagebrain.kernels.version import available

DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]


def why_no_kernels(device: str) -> str | None:
    """What keeps the kernels from running on ``device`` in this process, or ``None``."""
    if not available():
        return "there is no Triton 3.6 or later: pip install -r requirements.txt on Linux"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA GPU"
        return "TRITON_INTERPRET=1 is set: leave it out to compile the kernels" if interpreted else None
    if not interpreted:
        return "the kernels are compiled in this process: set TRITON_INTERPRET=1 to run them in the interpreter"
    version = importlib.metadata.version("triton")
    if _numbers(version) < (3, 7) and _numbers(numpy.__version__) >= (2, 4):
        return f"the interpreter of Triton {version} cannot loop with numpy {numpy.__version__}: install Triton 3.7 or later"
    return None


def kernel_device() -> str:
    """Where this process runs kernels, if anywhere."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


def require_kernels(device: str) -> None:
    """Skip the test that runs, with a line that says why, unless the kernels can run on ``device``."""
    reason = why_no_kernels(device)
    if reason is not None:
        pytest.skip(reason)


def noting(name: str, note: Callable[[str], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which calls ``note(name)`` first."""

    def noted(*args: Any, **options: Any) -> Any:
        note(name)
        return function(*args, **options)

    return noted


def tolerance(dtype: torch.dtype) -> float:
    """What float32 arithmetic on inputs of ``dtype`` may differ from float64's: the rounding of weights and results."""
    return 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
