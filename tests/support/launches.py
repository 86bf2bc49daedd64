"""What kernels were launched, as Triton sees it: by the arguments that decide whether one is compiled anew."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

Launch = tuple[Any, ...]


@contextlib.contextmanager
def noted_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Launch]]:
    """The launches within the block, compiled or interpreted; two that need the same compiled kernel are one."""
    seen: set[Launch] = set()
    with monkeypatch.context() as patch:
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", _noting(kind.run, seen))
        yield seen


def _noting(run: Any, seen: set[Launch]) -> Any:
    def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        settings = kernel.rewriter.kwargs if hasattr(kernel, "rewriter") else {"do_not_specialize": kernel.do_not_specialize}
        alike = settings.get("do_not_specialize") or ()
        kinds = tuple(
            "any" if name in alike else _kind_of(value) for name, value in zip(kernel.arg_names, args, strict=False)
        )
        seen.add((kernel.__name__, kinds, tuple(sorted((name, str(value)) for name, value in kwargs.items()))))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    return noted


def _kind_of(value: Any) -> str:
    """What Triton distinguishes: an address at a multiple of 16, a number that is one, or is a multiple of 16."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{'' if value.data_ptr() % 16 else ' aligned'}"
    if isinstance(value, int):
        return "one" if value == 1 else f"int{'' if value % 16 else ' aligned'}"
    return type(value).__name__
