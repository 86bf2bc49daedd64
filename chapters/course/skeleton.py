"""Skeletons: a chapter's source with every solution cut out, and in its place a stub that says what to do.

A stub fails closed: it raises ``TodoError``, so a task that is not done can never pass a test by chance.
"""

import ast
import re
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

from chapters.course.catalog import Chapter, CourseError, stub_message
from chapters.course.parsing import parse

_BEGIN = re.compile(r"^( *)# BEGIN SOLUTION (\d+\.\d+)$")
_END = re.compile(r"^ *# END SOLUTION$")
_IMPORT = "from chapters import TodoError"
_WIDTH = 116

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Region:
    """A solution: lines ``first .. last`` of a source, counted from 1, markers included, and the function it is in.

    ``yields``: what makes that function a generator is in the solution, so the stub has to be one too.
    """

    task_id: str
    first: int
    last: int
    indent: str
    qualname: str
    docstring: str
    yields: bool


@cache
def solution_regions(chapter: Chapter) -> tuple[Region, ...]:
    """The marked regions of a chapter's reference, in order. Raises ``CourseError`` for markers that do not pair up."""
    functions = find_functions(parse(chapter.reference))
    regions = []
    begin: tuple[str, str, int] | None = None
    for number, line in enumerate(chapter.reference.splitlines(), start=1):
        found = _BEGIN.match(line)
        if bool(found) + bool(_END.match(line)) and (begin is None) != bool(found):
            raise CourseError(f"{chapter.path.name}:{number}: # BEGIN SOLUTION and # END SOLUTION must take turns")
        if found:
            begin = found[1], found[2], number
        elif _END.match(line) and begin is not None:
            indent, task_id, first = begin
            inside = [item for item in functions if item[1].lineno < first and number <= (item[1].end_lineno or 0) + 1]
            if not inside:
                raise CourseError(f"{chapter.path.name}:{first}: a solution must be inside a function")
            qualname, function = inside[-1]
            yields = bool(lines := _yield_lines(function)) and all(first < line < number for line in lines)
            regions.append(Region(task_id, first, number, indent, qualname, ast.get_docstring(function) or "", yields))
            begin = None
        elif "BEGIN SOLUTION" in line or "END SOLUTION" in line:
            raise CourseError(f"{chapter.path.name}:{number}: this marker cannot be read: {line.strip()}")
    if begin is not None:
        raise CourseError(f"{chapter.path.name}:{begin[2]}: # BEGIN SOLUTION {begin[1]} has no end")
    return tuple(regions)


def make_skeleton(chapter: Chapter, *, done: Collection[str] = ()) -> str:
    """The file that a learner starts from. The chapter of a released copy is a skeleton already, and returned unchanged.

    Tasks in ``done`` keep their solutions.
    """
    if chapter.is_skeleton:
        return chapter.source
    regions = {region.first: region for region in solution_regions(chapter) if region.task_id not in done}
    lines = []
    skip_to = 0
    for number, line in enumerate(chapter.source.splitlines(), start=1):
        if number in regions:
            lines += _stub(chapter, regions[number])
            skip_to = regions[number].last
        elif number > skip_to:
            lines.append(line)
    position, blank_before = _import_position(lines)
    lines[position:position] = ["", _IMPORT] if blank_before else [_IMPORT]
    return "\n".join(lines) + "\n"


def untouched_tasks(source: str | bytes, chapter: Chapter) -> dict[str, str]:
    """The tasks of a learner's file in which every function still begins with its stub, and what the first stub says.

    Raises ``SyntaxError`` or ``ValueError`` for a source that is not Python.
    """
    there = _stubs(source, {region.qualname: region.task_id for region in solution_regions(chapter)})
    wanted = _stubs(make_skeleton(chapter))
    return {task: next(iter(stubs.values())) for task, stubs in wanted.items() if stubs.keys() <= there.get(task, {}).keys()}


def unfinished_tasks(source: str, chapter: Chapter) -> set[str]:
    """The tasks of a learner's file in one of whose functions ``TodoError`` is still raised, whatever it says.

    Empty if the source is not Python.
    """
    try:
        functions = dict(find_functions(parse(source)))
    except (SyntaxError, ValueError):
        return set()
    return {
        region.task_id
        for region in solution_regions(chapter)
        if region.qualname in functions and any(map(_raises_todo, ast.walk(functions[region.qualname])))
    }


def _raises_todo(node: ast.AST) -> bool:
    raised = node.exc.func if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else getattr(node, "exc", None)
    return isinstance(node, ast.Raise) and getattr(raised, "id", getattr(raised, "attr", "")) == "TodoError"


def _stubs(source: str | bytes, tasks: Mapping[str, str] | None = None) -> dict[str, dict[str, str]]:
    """Task -> qualified name of a function that begins with a stub -> its message.

    ``tasks``: of these functions the task is known, so a stub that does not name its task is one too.
    """
    known = tasks or {}
    found: dict[str, dict[str, str]] = {}
    for qualname, function in find_functions(parse(source)):
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        if body and (message := stub_message(body[0])):
            found.setdefault(message.split()[1], {})[qualname] = message
        elif body and qualname in known and _raises_todo(body[0]):
            found.setdefault(known[qualname], {})[qualname] = ""
    return found


def stub_text(chapter: Chapter, region: Region) -> str:
    """The message of a task's ``TodoError``."""
    points = next((task.points for task in chapter.tasks if task.task_id == region.task_id), 0)
    paragraph = " ".join(region.docstring.partition("\n\n")[0].replace("``", "").split())
    what = paragraph.removeprefix(f"Task {region.task_id}: ")
    what += "" if what.endswith((".", "?")) else "."
    return (
        f"Task {region.task_id} ({points} points), {region.qualname}: {what} "
        f"Read: {chapter.notebook}, 'Exercise {region.task_id}'. Check: python -m chapters check {region.task_id}"
    )


def _stub(chapter: Chapter, region: Region) -> list[str]:
    pieces = textwrap.wrap(
        stub_text(chapter, region), _WIDTH - len(region.indent) - 6, break_long_words=False, break_on_hyphens=False
    )
    strings = [_quoted(piece + " " * (piece is not pieces[-1])) for piece in pieces]
    lines = ["# TODO: your code in place of this", "raise TodoError(", *(f"    {string}" for string in strings), ")"]
    if region.yields:
        lines.append("yield  # never reached; it makes this a generator, as your code will")
    return [f"{region.indent}{line}" for line in lines]


def _quoted(text: str) -> str:
    """A literal in double quotes, as the formatter would have it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _import_position(lines: list[str]) -> tuple[int, bool]:
    """Where the import of ``TodoError`` goes: the line before which it belongs, and whether it starts a group."""
    ours = [index for index, line in enumerate(lines) if re.match(r"from (chapters|pagebrain)\b", line)]
    if ours:
        return ours[0], False
    tree = parse("\n".join(lines))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return max((node.end_lineno or 0 for node in imports), default=1), True


def _yield_lines(function: Function) -> list[int]:
    """Where a function itself yields, not counting functions inside it."""
    found = []
    nodes: list[ast.AST] = list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            found.append(node.lineno)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return found


def find_functions(tree: ast.Module) -> list[tuple[str, Function]]:
    """All functions of a module with their qualified names; an inner one after the one it is in."""
    found: list[tuple[str, Function]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if not isinstance(child, ast.ClassDef):
                    found.append((prefix + child.name, child))
                visit(child, f"{prefix}{child.name}.")
            else:
                visit(child, prefix)

    visit(tree, "")
    return found
