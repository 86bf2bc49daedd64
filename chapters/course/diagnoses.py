"""What exceptions that say little usually mean. A diagnosis stands in the place of a test's hint, which is about results."""

import ast
import re
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType

from chapters.course.parsing import parse
from chapters.course.skeleton import find_functions

_TYPE = r"\b(?:c10::)?(?:Double|Float|Half|BFloat16|Long|Int|Bool|double|float\d*|int\d\d)\b"
_DTYPE = re.compile(rf"{_TYPE} did not match {_TYPE}|scalar type|[Ss]ame dtype|dtypes match|dtype is \S+, expected")
_INDEX = re.compile(r"tensors used as indices must be|indices must be integers|cannot be interpreted as an integer")
_SHAPE = re.compile(
    r"shapes cannot be multiplied|size of tensor a|[Ss]hape mismatch|cannot be broadcast|broadcastable|expanded size"
    r"|invalid for input of size|does not broadcast|Expected size for first two|[Ss]izes of tensors must match"
)
_NUMBER = re.compile(
    r"'(int|float|bool)' object is not iterable|non-iterable (int|float|bool)|of type 'int' has no len"
    r"|must be an iterable, not int"
)
_NONE = re.compile(r"NoneType")
_ARGUMENTS = re.compile(r"\w+\(\) (missing|takes|got an unexpected|got multiple)")
_TILE_MAKER = re.compile(r"\btl\.(zeros|full)\(")
_ALONE = (NameError, SyntaxError, ImportError)
"""Exceptions that say all there is to say."""


def diagnose(error: BaseException, own_files: Collection[Path]) -> str | None:
    """What an exception means, whatever the task; empty if it says all itself, ``None`` if the test's hint is to be shown.

    ``own_files`` are the learner's.
    """
    text = str(error)
    if isinstance(error, _ALONE):
        return ""
    if _DTYPE.search(text):
        return (
            "Tensors of different types. What torch.zeros, torch.full and torch.tensor make, and .float(), is float32 "
            "unless told otherwise: make it with dtype=x.dtype and device=x.device of the tensor x that was passed in."
        )
    if isinstance(error, AssertionError):
        return None
    line = _own_line(error, own_files)
    if isinstance(error, TypeError) and _TILE_MAKER.search(line):
        return (
            "In Triton a shape is a list, also one of a single axis, and the dtype must be given: "
            "tl.zeros([PADDED_DIM], dtype=tl.float32). tl.full takes shape, value and dtype."
        )
    if isinstance(error, TypeError) and line and _ARGUMENTS.search(text):
        return (
            "The arguments of a call in this line do not fit the function. Compare the call with the function's first line."
        )
    if _INDEX.search(text):
        return "An index must be a whole number, in a tensor torch.long (int64). A division with / gives a fraction: use //."
    if _SHAPE.search(text):
        return (
            "The shapes do not fit together in this line. Write the shape of each tensor beside it, as the docstrings do: "
            "dimensions that meet, counted from the last, must be equal, or one of them 1."
        )
    if _NUMBER.search(text):
        return "A list was expected, and a single number came. What does your function have to return, or to pass on?"
    if _NONE.search(text):
        names = _without_result(own_files)
        more = f" In your file {', '.join(names)} can end without `return`." if names else ""
        return f"A value is None where another was expected: a function that ends without `return` gives None.{more}"
    return None


def _own_line(error: BaseException, own_files: Collection[Path]) -> str:
    """The learner's line that raised, directly or in what it called; empty if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) in own_files]
    return (frames[-1].line or "") if frames else ""


def lead(error: BaseException, own_files: Collection[Path]) -> str:
    """Which calls led to a bare ``KeyError`` or ``IndexError``: ``in block_table(seq_id=7), called by slots``."""
    if not isinstance(error, KeyError | IndexError):
        return ""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = max((index for index, frame in enumerate(frames) if Path(frame.f_code.co_filename) in own_files), default=None)
    if last is None:
        return ""
    raising = next((frame for frame in frames[last + 1 :] if _is_ours(frame)), frames[last])
    callers = [frame for frame in frames[: last + 1] if frame is not raising and Path(frame.f_code.co_filename) in own_files]
    called = f", called by {callers[-1].f_code.co_name}" if callers else ""
    return f"in {raising.f_code.co_name}({_arguments(raising)}){called}"


def _is_ours(frame: FrameType) -> bool:
    """Whether a frame is in a chapter, or in the engine: code with names that a learner knows."""
    return bool({"chapters", "pagebrain"} & set(Path(frame.f_code.co_filename).parts)) or frame.f_code.co_filename[:1] == "<"


def _arguments(frame: FrameType, longest: int = 40) -> str:
    """The arguments of a call as they are now: numbers and short lists; of others the type."""
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    shown = []
    for name in names:
        value = frame.f_locals.get(name)
        if name == "self":
            continue
        text = repr(value) if isinstance(value, int | float | str | list | tuple | range) else type(value).__name__
        shown.append(f"{name}={text if len(text) <= longest else text[: longest - 3] + '...'}")
    return ", ".join(shown)


def _without_result(own_files: Collection[Path]) -> list[str]:
    """The functions in these files that are to return something and have no ``return`` with a value."""
    found = []
    for path in own_files:
        try:
            functions = find_functions(parse(path.read_bytes()))
        except (OSError, SyntaxError, ValueError):
            continue
        for qualname, function in functions:
            returns = ast.unparse(function.returns) if function.returns is not None else "None"
            nodes = list(_own_nodes(function))
            gives = any(isinstance(node, ast.Return) and node.value is not None for node in nodes)
            other = any(isinstance(node, ast.Yield | ast.YieldFrom | ast.Raise) for node in nodes)
            if returns != "None" and not gives and not other:
                found.append(qualname)
    return found


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions in it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _own_nodes(child)
