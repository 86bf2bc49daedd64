"""What a graded file may import from the repository: what its skeleton imports, so that nobody hands in the engine's answer.

This reads the source and nothing more. It stops shortcuts that one takes without thinking; it is no sandbox, and someone who
wants to hide an import from it can.
"""

import ast
from collections.abc import Iterator

GUARDED = ("pagebrain", "chapters", "tests", "work")
_MACHINERY = ("importlib", "runpy", "pkgutil", "imp", "zipimport", "builtins", "ctypes")
_BUILTINS = ("__import__", "exec", "eval", "compile", "__builtins__")
_ALWAYS = frozenset({("chapters", "TodoError")})

Imported = frozenset[tuple[str, str | None]]
"""``(module, name)`` for ``from module import name``, ``(module, None)`` for ``import module``."""


def forbidden_imports(source: str | bytes, skeleton: str) -> list[str]:
    """One sentence for each line of ``source`` that imports what ``skeleton`` does not.

    Raises ``SyntaxError`` or ``ValueError`` for what is no Python.
    """
    allowed = frozenset(item for node in ast.walk(ast.parse(skeleton)) for item in _imports(node)) | _ALWAYS
    found = [(line, text) for node in ast.walk(ast.parse(source)) for line, text in _violations(node, allowed)]
    return [f"line {line}: {text}" for line, text in sorted(set(found))]


def _imports(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        yield from ((module, alias.name) for alias in node.names)


def _violations(node: ast.AST, allowed: Imported) -> Iterator[tuple[int, str]]:
    for module, name in _imports(node):
        if (module, name) not in allowed:
            yield from ((_line(node), text) for text in _import_error(module, name))
    if isinstance(node, ast.Name) and node.id in _BUILTINS:
        yield _line(node), f"{node.id} is not allowed in a graded file: it could run what is not written there"
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.modules":
        yield _line(node), "sys.modules is not allowed in a graded file: it gives access to other modules"


def _import_error(module: str, name: str | None) -> Iterator[str]:
    statement = f"import {module}" if name is None else f"from {module} import {name}"
    top = module.partition(".")[0]
    if module.startswith("."):
        yield f"`{statement}` is not allowed: a chapter is one file; write what you need into it"
    elif top in GUARDED:
        yield f"`{statement}` is not allowed: from {top}, only what the skeleton imports may be imported"
    elif top in _MACHINERY:
        yield f"`{statement}` is not allowed in a graded file: it could import what is not written there"
    elif (module, name) == ("sys", "modules"):
        yield f"`{statement}` is not allowed in a graded file: it gives access to other modules"


def _line(node: ast.AST) -> int:
    return int(getattr(node, "lineno", 0))
