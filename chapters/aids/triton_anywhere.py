"""Triton as this machine can run it: compiled where torch finds a CUDA GPU, in Triton's interpreter on the CPU elsewhere.

Triton reads ``TRITON_INTERPRET`` when it is first imported, and chooses one of the two. Torch may have imported it before
that variable was set. Chapter 06 takes ``triton`` and ``tl`` from here, which works in either case. The import also makes
the interpreter faster, for the whole process: see :func:`patch_language_once` and :func:`remember_dtypes`.
"""

import importlib
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_VARIABLE = "TRITON_INTERPRET"


class NoTritonError(ImportError):
    """Triton cannot be imported on this machine, so no kernel can run."""


def _import_triton() -> tuple[Any, Any]:
    """``triton`` and ``triton.language``. Raises ``NoTritonError``."""
    if not torch.cuda.is_available():
        os.environ.setdefault(_VARIABLE, "1")
    modules = _both()
    if os.environ.get(_VARIABLE) == "1" and not _interprets(modules[1]):
        # It was imported to compile. What is imported from now on interprets; its compiled library is loaded once only.
        for name in [*sys.modules]:
            if name.partition(".")[0] == "triton" and not name.startswith("triton._C"):
                del sys.modules[name]
        modules = _both()
    return modules


def _both() -> tuple[ModuleType, ModuleType]:
    try:
        return importlib.import_module("triton"), importlib.import_module("triton.language")
    except ImportError as error:
        raise NoTritonError(what_to_do(sys.platform, error)) from error


def what_to_do(platform: str, error: Exception) -> str:
    """One line for a machine on which Triton cannot be imported; ``platform`` is like ``sys.platform``."""
    needs = f"chapter 06 needs Triton 3.6 or later ({error}): "
    if platform == "linux":
        return needs + "pip install 'triton>=3.6'. There are builds for x86-64; no GPU is needed"
    return (
        needs + "it exists for Linux on x86-64. Use a Linux container (Docker), WSL 2 or a Codespace, without a GPU, "
        "with pip install 'triton>=3.6'; or read the notebook with its stored outputs. No other chapter needs Triton"
    )


def _interprets(language: Any) -> bool:
    return type(language.sum).__name__ == "InterpretedFunction"


def patch_language_once() -> None:
    """Let Triton's interpreter replace the functions of ``triton.language`` once for a launch.

    It does so again, on top, for every call of a function within a kernel, ``tl.sum`` included: half of its time or more.
    Versions of Triton whose interpreter is made differently are left as they are.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    scope_class = getattr(interpreter, "_LangPatchScope", None)
    patch = getattr(interpreter, "_patch_lang", None)
    if scope_class is None or patch is None or hasattr(patch, "open_scopes"):
        return
    open_scopes: list[Any] = []
    language = importlib.import_module("triton.language")
    everything = SimpleNamespace(__globals__={"tl": language, "core": language.core})  # kernels name one, tl.sum the other

    class OnceScope(scope_class):  # type: ignore[misc, valid-type]
        """What one launch replaced, and its end."""

        def restore(self) -> None:
            super().restore()
            open_scopes.clear()

    def patch_once(function: Any) -> Any:
        if open_scopes:
            return scope_class()
        scope = OnceScope()
        open_scopes.append(scope)
        scope._changes = patch(everything)._changes
        return scope

    patch_once.open_scopes = open_scopes  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_once


def remember_dtypes() -> None:
    """Let the interpreter look up NumPy's type of a Triton type once. It makes a table of all types at each operation."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    look_up = getattr(interpreter, "_get_np_dtype", None)
    if look_up is None or hasattr(look_up, "found"):
        return
    found: dict[str, Any] = {}

    def look_up_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    look_up_once.found = found  # type: ignore[attr-defined]
    interpreter._get_np_dtype = look_up_once


triton, tl = _import_triton()

INTERPRETED = _interprets(tl)
"""Whether kernels are interpreted in this process. Then they work on CPU tensors; compiled ones want a GPU's."""

if INTERPRETED:
    patch_language_once()
    remember_dtypes()
