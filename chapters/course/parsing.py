"""Python sources as trees, one at a time.

Python 3.11 counts how deep it is in the tree that it makes, once for all threads: of two that make one at the same time,
either can fail with ``SystemError: AST constructor recursion depth mismatch`` (github.com/python/cpython/issues/106905).
``grade --jobs`` has several threads.
"""

import ast
import threading

_LOCK = threading.Lock()


def parse(source: str | bytes, name: str = "<unknown>") -> ast.Module:
    """The tree of a source, which errors call ``name``. Raises ``SyntaxError`` or ``ValueError`` if it is not Python."""
    with _LOCK:
        return ast.parse(source, name)
