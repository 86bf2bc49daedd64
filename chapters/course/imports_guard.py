"""What a graded file may import from the repository: what its skeleton imports, so that the engine's answer cannot be used.

This module reads the source only. It stops careless shortcuts. It is not a sandbox: an import can be hidden from it, for
example with ``getattr`` and a name made of pieces.
"""

import ast
from collections.abc import Iterator

from chapters.course.parsing import parse

GUARDED = ("pagebrain", "chapters", "tests", "work")
_MACHINERY = ("importlib", "runpy", "pkgutil", "imp", "zipimport", "builtins", "ctypes")
_BUILTINS = ("exec", "eval", "compile")
_HIDDEN = ("__import__", "__loader__", "__spec__", "__builtins__", "__globals__", "__subclasses__")
_TELLING = ("sys", "os", "inspect", "gc", "builtins", "importlib", "subprocess", "pytest")
_ALWAYS = frozenset({("chapters", "TodoError")})

Imported = frozenset[tuple[str, str | None]]
"""``(module, name)`` for ``from module import name``, ``(module, None)`` for ``import module``."""


def forbidden_imports(source: str | bytes, skeleton: str) -> list[str]:
    """One sentence for each line of ``source`` that imports what ``skeleton`` does not.

    Raises ``SyntaxError`` or ``ValueError`` for a source that is not Python.
    """
    allowed = frozenset(item for node in ast.walk(parse(skeleton)) for item, _ in _imports(node)) | _ALWAYS
    nodes = list(ast.walk(parse(source)))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    found = {
        (_line(node), text)
        for node in nodes
        for text in [*_import_errors(node, allowed), *_access_errors(node, is_called=id(node) in called)]
    }
    return [f"line {line}: {text}" for line, text in sorted(found)]


def additional_modules(source: str | bytes, skeleton: str) -> list[str]:
    """The modules of other packages than ``skeleton``'s that ``source`` imports, or reaches through those (``torch.sys``).

    Raises ``SyntaxError`` or ``ValueError`` for a source that is not Python.
    """
    known = set(_modules(skeleton))
    packages = {module.partition(".")[0] for module in known} | {"chapters"}
    found = {
        module
        for module in _modules(source)
        if module.partition(".")[0] not in packages or module.rpartition(".")[2] in _TELLING
    }
    return sorted(found - known)


def _modules(source: str | bytes) -> Iterator[str]:
    for node in ast.walk(parse(source)):
        for (module, name), _ in _imports(node):
            yield f"{module}.{name}" if name in _TELLING else module
        if isinstance(node, ast.Attribute) and node.attr in _TELLING:
            yield _short(node)


def _imports(node: ast.AST) -> Iterator[tuple[tuple[str, str | None], str]]:
    """What a node imports, each with the statement as it is written."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (alias.name, None), f"import {ast.unparse(alias)}"
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        for alias in node.names:
            yield (module, alias.name), f"from {module} import {ast.unparse(alias)}"


def _import_errors(node: ast.AST, allowed: Imported) -> Iterator[str]:
    for (module, name), statement in _imports(node):
        top = module.partition(".")[0]
        if (module, name) in allowed:
            continue
        if module.startswith("."):
            yield f"`{statement}` is not allowed: a chapter is one file; write what you need into it"
        elif top in GUARDED:
            yield f"`{statement}` is not allowed: from {top}, only what the skeleton imports may be imported"
        elif top in _MACHINERY or name in _MACHINERY or name in _HIDDEN:
            yield f"`{statement}` is not allowed in a graded file: it could import what is not written there"
        elif name == "modules":
            yield f"`{statement}` is not allowed in a graded file: it gives access to other modules"


def _access_errors(node: ast.AST, *, is_called: bool) -> Iterator[str]:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    if name in _HIDDEN or (name in _BUILTINS and isinstance(node, ast.Name)):  # model.eval() is another thing
        yield f"{name} is not allowed in a graded file: it could run what is not written there"
    if name == "modules" and isinstance(node, ast.Attribute) and not is_called:  # model.modules() is another thing
        yield f"{_short(node)} is not allowed in a graded file: it gives access to other modules"


def _short(node: ast.Attribute) -> str:
    return f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else f".{node.attr}"


def _line(node: ast.AST) -> int:
    return int(getattr(node, "lineno", 0))
