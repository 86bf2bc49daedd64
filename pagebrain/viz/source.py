"""Source code in a notebook, read from the current files: the task of an exercise, and its solution."""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BEGIN = re.compile(r"^(\s*)# BEGIN SOLUTION\s*(\S*)")
_END = re.compile(r"^\s*# END SOLUTION")


class Source:
    """Pieces of source code with their places. A notebook cell shows them highlighted.

    Attributes:
        pieces: ``(place, code)``; a place is ``path:line``, or ``path: name``.
    """

    def __init__(self, pieces: list[tuple[str, str]]) -> None:
        self.pieces = pieces

    def __repr__(self) -> str:
        return "\n\n".join(f"# {place}\n{code}" for place, code in self.pieces)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Markdown, which JupyterLab, GitHub and myst-nb highlight in their own colours."""
        longest = max((len(ticks) for _, code in self.pieces for ticks in re.findall("`+", code)), default=0)
        fence = "`" * max(3, longest + 1)  # a docstring may hold a fenced block of its own
        markdown = "\n\n".join(f"`{place}`\n\n{fence}python\n{code}\n{fence}" for place, code in self.pieces)
        return {"text/markdown": markdown, "text/plain": repr(self)}


def show_source(*objects: Any) -> Source:
    """The source of functions, classes, methods or modules, without the lines that mark solutions."""
    return Source([(_place(thing), without_markers(_code(thing))) for thing in objects])


def show_task(*objects: Any) -> Source:
    """The task of an exercise: source without the marked solutions, or without function bodies if none is marked."""
    return Source([(_place(thing), without_solutions(_code(thing))) for thing in objects])


def without_markers(code: str) -> str:
    """``code`` without the lines that mark solutions."""
    return "\n".join(line for line in code.splitlines() if not _BEGIN.match(line) and not _END.match(line))


def without_solutions(code: str) -> str:
    """``code`` with ``...`` in place of each marked solution; if none is marked, of each function body."""
    if not any(map(_BEGIN.match, code.splitlines())):
        return _without_bodies(code)
    kept: list[str] = []
    inside = False
    for line in code.splitlines():
        if begin := _BEGIN.match(line):
            inside = True
            kept.append(f"{begin[1]}...  # task {begin[2]}".removesuffix("  # task "))
        elif _END.match(line):
            inside = False
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def _without_bodies(code: str) -> str:
    """``code`` with ``...`` in place of every function's statements after its docstring."""
    lines = code.splitlines()
    shown: dict[int, str] = dict(enumerate(lines, start=1))
    for node in ast.walk(ast.parse(code)):  # a function within another one comes after it
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or shown.get(node.lineno) != lines[node.lineno - 1]:
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body and body[0].lineno > node.lineno:
            first = min([body[0].lineno, *[item.lineno for item in getattr(body[0], "decorator_list", ())]])
            for number in range(first, (body[-1].end_lineno or 0) + 1):
                shown.pop(number, None)
            shown[first] = " " * body[0].col_offset + "..."
    return "\n".join(line for _, line in sorted(shown.items()))


def _code(thing: Any) -> str:
    """The object's source in its file, without indentation."""
    return textwrap.dedent("".join(_lines(_unwrapped(thing))[0])).rstrip()


def _place(thing: Any) -> str:
    """``package/module.py:line``; for a file outside a package ``folder/file.py:line``.

    In a file with solutions ``package/module.py: name``: a copy for students lacks them, so its lines have other numbers.
    """
    thing = _unwrapped(thing)
    file = _file(thing)
    root = file.parent if (file.parent / "__init__.py").exists() else file.parent.parent
    while (root / "__init__.py").exists():
        root = root.parent
    place = file.relative_to(root).as_posix()
    if any(map(_BEGIN.match, file.read_text(encoding="utf-8").splitlines())):
        return f"{place}: {getattr(thing, '__qualname__', thing.__name__)}"
    return f"{place}:{max(1, _lines(thing)[1])}"


def _file(thing: Any) -> Path:
    """The object's file. For a function that runs in place of the one in its module's file, that file."""
    if _is_stand_in(thing):
        return Path(sys.modules[thing.__module__].__file__ or "?")
    return Path(inspect.getsourcefile(thing) or "?")


def _lines(thing: Any) -> tuple[list[str], int]:
    """The lines of the object in its file, and the number of the first. Raises ``OSError`` if it is not there."""
    if not _is_stand_in(thing):
        return inspect.getsourcelines(thing)
    file = _file(thing)
    text = file.read_text(encoding="utf-8")
    for name, node in _functions(ast.parse(text)):
        if name == thing.__qualname__:
            first = min([node.lineno, *[decorator.lineno for decorator in node.decorator_list]])
            return text.splitlines(keepends=True)[first - 1 : node.end_lineno], first
    raise OSError(f"{thing.__qualname__} is not in {file}: write it there, or begin the file again")


def _is_stand_in(thing: Any) -> bool:
    """Whether a function's code is in no file: the course lends the reference's functions for tasks that are not done."""
    return inspect.isfunction(thing) and thing.__code__.co_filename.startswith("<lent")


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The functions and methods of a module with their qualified names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")


def _unwrapped(thing: Any) -> Any:
    """The function within a property or a decorator."""
    if isinstance(thing, property):
        thing = thing.fget
    return inspect.unwrap(thing) if callable(thing) else thing
