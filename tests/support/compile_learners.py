"""A learner's kernels compiled for a GPU of compute capability 9.0, on a machine that may have no GPU.

The tests' process interprets kernels, and Triton does one of the two in a process. So a fork of it imports Triton anew, to
compile. All else is imported there already, and a kernel takes about a quarter of a second.
"""

import importlib
import os
import pickle
import re
import signal
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CAPABILITY = 90

_LOOP = re.compile(r"Loop-carried variable (\w+) has initial type (\S+) but is re-assigned to (\S+)")
_MEANINGS = {
    "arange's arguments must be": "the compiler has to know the size of a tile, so tl.arange takes constants "
    "(tl.constexpr) only",
    "power of 2": "along each axis a tile has a power of 2 of places: take a constant whose name begins with PADDED_",
    "unsupported AST node": "this is Python that a kernel cannot have (dictionaries, lists, try, raise, with)",
    "is not defined": "a kernel knows its arguments, its own variables, tl, and the module's constants of type tl.constexpr",
    "global variable": "of the module's variables a kernel may read those of type tl.constexpr only",
}
"""A part of what the compiler says -> what it means."""


def refusal(kernel: Any, types_of: Mapping[str, Any], constants: Mapping[str, Any]) -> str | None:
    """Why the compiler refuses ``kernel``, an interpreted function, in one line that names the file's line; else ``None``.

    ``types_of`` has Triton's name for the type of each argument that is not in ``constants``.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            said = _compile(kernel, types_of, constants)
        except BaseException as error:  # this process must not go on as a second pytest
            said = f"the compiler for GPUs failed: {type(error).__name__}: {str(error).strip()[:500]}"
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(said, pipe)
        os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if not answer:
        return f"the compiler for GPUs ended with status {status} and said nothing"
    found: str | None = pickle.loads(answer)
    return found


def _compile(kernel: Any, types_of: Mapping[str, Any], constants: Mapping[str, Any]) -> str | None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton" and not name.startswith("triton._C")]:
        del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "0"
    triton = importlib.import_module("triton")
    compiler: Any = importlib.import_module("triton.compiler.compiler")
    errors = importlib.import_module("triton.compiler.errors")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", CAPABILITY, 32)
    compiler.get_cache_key = lambda *args, **options: "kernel"  # the real one reads all of Triton, which takes a second
    compiled: dict[Any, Any] = {}
    function = _for_compiler(triton, kernel, compiled)
    signature = {name: "constexpr" if name in constants else types_of[name] for name in function.arg_names}
    values = {
        (function.arg_names.index(name),): _for_compiler(triton, value, compiled) if _is_interpreted(value) else value
        for name, value in constants.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            triton.compile(compiler.ASTSource(function, signature, values), target=target, options={"num_warps": 1})
        except errors.CompilationError as error:
            while isinstance(error.__cause__, errors.CompilationError):  # the innermost is about the line itself
                error = error.__cause__
            return _told(error, [*compiled.values()])
    return None


def _is_interpreted(value: Any) -> bool:
    return type(value).__name__ == "InterpretedFunction"


def _for_compiler(triton: Any, interpreted: Any, compiled: dict[Any, Any]) -> Any:
    """The same function, and those that it calls, for the copy of Triton that compiles."""
    if interpreted in compiled:
        return compiled[interpreted]
    function = interpreted.fn
    names = function.__globals__ | {"triton": triton, "tl": triton.language}
    names |= {name: triton.language.constexpr(value.value) for name, value in names.items() if _is_constant(value)}
    anew = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    anew.__annotations__, anew.__module__ = function.__annotations__, function.__module__
    anew.__qualname__ = function.__qualname__
    compiled[interpreted] = triton.jit(anew)
    for name in function.__code__.co_names:
        if _is_interpreted(names.get(name)):
            names[name] = _for_compiler(triton, names[name], compiled)
    return compiled[interpreted]


def _is_constant(value: Any) -> bool:
    return type(value).__name__ == "constexpr"


def _told(error: Any, functions: list[Any]) -> str:
    message = str(error.error_message or error).strip().splitlines()[0]
    owner = next((function for function in functions if function.src == error.src), None)
    where = "the kernel"
    if owner is not None and hasattr(error.node, "lineno"):
        number = owner.starting_line_number + error.node.lineno - 1
        line = owner.src.splitlines()[error.node.lineno - 1].strip()
        where = f"{owner.__name__}, {Path(owner.fn.__code__.co_filename).name}:{number}: `{line}`"
    if found := _LOOP.search(message):
        name, before, after = found.groups()
        told = (
            f"`{name}` begins as {before} and is {after} at the end of the loop's body, but a variable keeps its type in a "
            f"loop. Begin with a number of the later type: 0.0 instead of 0, for example"
        )
        return f"a GPU's compiler refuses {where}: {told}"
    meaning = next((f" ({told})" for sign, told in _MEANINGS.items() if sign in message), "")
    return f"a GPU's compiler refuses {where}: {message}{meaning}"
