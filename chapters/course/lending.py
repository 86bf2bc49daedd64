"""Lending: a learner's file in which the functions of some tasks are the reference's.

A task's tests may call the functions of other tasks. A task that fails is judged again with those functions lent, so that a
mistake costs one task. What is not done yet is lent to the tasks that build on it.

The syntax trees are joined, not the texts: decorators, methods and generators stay what they are, and a line number in a
message is one of the learner's file. Lent code has the file name of :func:`lent_name`, and no such file exists, so that no
traceback quotes a solution.
"""

import ast
import linecache
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

from chapters.course.catalog import Chapter
from chapters.course.parsing import parse
from chapters.course.skeleton import Function, find_functions, solution_regions

USED: set[str] = set()
"""The tasks of which lent code has run since this was cleared. Kernels are left out: they cannot note anything."""

NOTES = "__lent__"
"""The global name by which lent functions know ``USED``."""

_SHOWN: set[str] = set()  # the names of lent sources in linecache
_FAR = 1 << 20  # added to the line numbers of lent code: that tells it apart once all is compiled


def lent_name(chapter: Chapter) -> str:
    """The file name that a chapter's lent code has in tracebacks."""
    return f"<lent: {chapter.name}.py>"


def compose(source: bytes, path: Path, chapter: Chapter, tasks: Collection[str]) -> CodeType:
    """The code of a file of ``chapter`` with the functions of ``tasks`` taken from the reference.

    Functions go by their qualified names; one that the file lacks is added. If all solutions of a class are lent, its given
    methods are too, since they may have been changed to fit. Raises what compiling the file raises.
    """
    tree = parse(source, str(path))
    regions = solution_regions(chapter)
    kept = {region.qualname for region in regions if region.task_id not in tasks}
    wanted = {region.qualname: region.task_id for region in regions if region.qualname not in kept}
    reference = parse(chapter.reference)
    ast.increment_lineno(reference, _FAR)
    imports = [node for node in reference.body if isinstance(node, ast.Import | ast.ImportFrom)]
    bound = _bound_names(tree)
    for qualname, function in find_functions(reference):
        if qualname in wanted and not is_kernel(function):
            start = 0 if ast.get_docstring(function) is None else 1
            function.body[start:start] = [_note(wanted[qualname], function), *_missing_imports(function, imports, bound)]
    _replace(tree.body, reference.body, "", wanted.keys(), kept)
    if any(is_kernel(function) for qualname, function in find_functions(reference) if qualname in wanted):
        show_source(chapter)
    return _named(compile(tree, str(path), "exec", dont_inherit=True), lent_name(chapter))


def show_source(chapter: Chapter) -> None:
    """Let ``linecache`` know the lent source: Triton reads its kernels' text."""
    lines = chapter.reference.splitlines(keepends=True)
    _SHOWN.add(lent_name(chapter))
    linecache.cache[lent_name(chapter)] = (len(chapter.reference), None, lines, lent_name(chapter))


@contextmanager
def hidden_sources() -> Iterator[None]:
    """Meanwhile ``linecache`` knows no lent source, so that a traceback cannot quote one."""
    hidden = {name: linecache.cache.pop(name) for name in [*linecache.cache] if name in _SHOWN}
    try:
        yield
    finally:
        linecache.cache.update(hidden)


def kernel_tasks(chapter: Chapter) -> set[str]:
    """The tasks of a chapter that have a Triton kernel."""
    functions = dict(find_functions(parse(chapter.reference)))
    return {region.task_id for region in solution_regions(chapter) if is_kernel(functions[region.qualname])}


def is_kernel(function: Function) -> bool:
    """Whether Triton reads this function's source and takes no other statements than its own."""
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


def _replace(
    own: list[ast.stmt], given: list[ast.stmt], prefix: str, wanted: Collection[str], kept: Collection[str]
) -> None:
    """Put those statements of ``given`` that are lent into ``own``, in the place of what has the same name there."""
    for node in given:
        name = f"{prefix}{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and name in wanted:
            _put(own, node)
        elif isinstance(node, ast.ClassDef) and _inside(name, wanted):
            is_whole = not _inside(name, kept)
            place = _find(own, node)
            mine = own[place] if place is not None else None
            if isinstance(mine, ast.ClassDef) and is_whole:
                for member in [member for member in node.body if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)]:
                    _put(mine.body, member)
            elif isinstance(mine, ast.ClassDef):
                _replace(mine.body, node.body, f"{name}.", wanted, kept)
            elif is_whole:
                _put(own, node)


def _inside(name: str, qualnames: Iterable[str]) -> bool:
    return any(qualname.startswith(f"{name}.") for qualname in qualnames)


def _find(body: list[ast.stmt], node: ast.stmt) -> int | None:
    """Where the last definition of a node's name stands: the one that counts."""
    places = [index for index, other in enumerate(body) if getattr(other, "name", "") == getattr(node, "name", None)]
    return places[-1] if places else None


def _put(body: list[ast.stmt], node: ast.stmt) -> None:
    place = _find(body, node)
    if place is None:
        body.append(node)
    else:
        body[place] = node


def _note(task: str, function: Function) -> ast.stmt:
    """The statement by which a lent function says that it was used."""
    [note] = parse(f"{NOTES}.add({task!r})").body
    return ast.fix_missing_locations(_at(note, function))


def _missing_imports(
    function: Function, imports: Iterable[ast.Import | ast.ImportFrom], bound: Collection[str]
) -> list[ast.stmt]:
    """What the reference imports, the function uses, and the learner's file does not have (editors remove such lines)."""
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} - set(bound)
    found: list[ast.stmt] = []
    for node in imports:
        names = [alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) in used]
        if names and isinstance(node, ast.ImportFrom):
            found.append(_at(ast.ImportFrom(node.module, names, node.level), function))
        elif names:
            found.append(_at(ast.Import(names), function))
    return found


def _at(node: ast.stmt, function: Function) -> ast.stmt:
    """A new statement, at the line of the function's first."""
    return ast.copy_location(node, function.body[0])


def _bound_names(tree: ast.Module) -> set[str]:
    """The names that a module binds at its top level."""
    found = set()
    for node in tree.body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.alias):
                found.add(inner.asname or inner.name.partition(".")[0])
            elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(inner.name)
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                found.add(inner.id)
    return found


def _named(code: CodeType, name: str) -> CodeType:
    """The code with the file name ``name``, and the true line numbers, in all that is lent."""
    consts = tuple(_named(const, name) if isinstance(const, CodeType) else const for const in code.co_consts)
    if code.co_firstlineno > _FAR:
        return code.replace(co_consts=consts, co_filename=name, co_firstlineno=code.co_firstlineno - _FAR)
    return code.replace(co_consts=consts)
