"""Overlays: a solution written as its differences from a reference chapter.

An overlay is Python text whose docstring begins ``Task N.M: `` and says what it is about. Its functions replace those of the
same name; a class that the reference has lists only the methods and attributes that it replaces or adds. Everything else of
the reference keeps its lines and comments. What is new goes to the top, right after the imports, or to the end if it needs
the reference's names as soon as the module is imported.

A file holds one overlay, or many, each after a heading ``# %% name``.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HEADER = re.compile(r"Task (\d+\.\d+): (\S.*)")
HEADING = re.compile(r"^# %% (\w+)\n", re.MULTILINE)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Overlay:
    """One overlay: its file, its name there, its task, and ``summary``, the docstring's first line without the task."""

    path: Path
    name: str
    task: str
    summary: str
    source: str


def read_overlays(path: Path) -> list[Overlay]:
    """The overlays in a file, in order. A file without headings is one overlay, with the name of the file.

    Raises ``ValueError`` as :func:`parse_header` does, and if two overlays have one name.
    """
    text = path.read_text(encoding="utf-8")
    _, *sections = HEADING.split(text)  # name, source, name, source, ...
    names, sources = sections[::2], sections[1::2]
    if not names:
        names, sources = [path.stem], [text]
    overlays: dict[str, Overlay] = {}
    for name, source in zip(names, sources):
        if name in overlays:
            raise ValueError(f"{path}: two overlays have the name {name}")
        source = source.rstrip() + "\n"
        try:
            overlays[name] = Overlay(path, name, *parse_header(ast.parse(source)), source)
        except ValueError as error:
            raise ValueError(f"{path}, {name}: {error}") from error
    return [*overlays.values()]


def parse_header(overlay: ast.Module) -> tuple[str, str]:
    """Task and summary from an overlay's docstring. Raises ``ValueError`` if it does not begin ``Task N.M: ``."""
    docstring = ast.get_docstring(overlay) or ""
    if not (match := HEADER.match(docstring)):
        raise ValueError(f"an overlay needs a docstring that begins 'Task N.M: ', got {docstring[:40]!r}")
    return match[1], match[2]


def compose(reference_source: str, overlay_source: str) -> str:
    """The reference with the overlay's functions, methods and assignments in place of its own.

    A function keeps the reference's decorators unless the overlay gives some. Raises ``ValueError`` for an overlay without
    its header, for one with a statement that has no place, or for a class with other bases than in the reference.
    """
    reference, overlay = ast.parse(reference_source), ast.parse(overlay_source)
    parse_header(overlay)
    lines, new_lines = reference_source.splitlines(), overlay_source.splitlines()
    known = {name: node for node in reference.body for name in names_of(node)}
    top = max(node.end_lineno or 0 for node in reference.body if isinstance(node, IMPORTS) or node is reference.body[0])
    edits: list[tuple[int, int, list[str]]] = []  # lines[start:end] become these; start == end inserts
    at_end: list[str] = []
    names_at_end: set[str] = set()

    def replace(old: ast.stmt, new: ast.stmt) -> None:
        start = first_line(old) if getattr(new, "decorator_list", []) else old.lineno
        edits.append((start - 1, last_line(old, lines), text_of(new, new_lines)))

    for node in overlay.body[1:]:
        names = names_of(node)
        old = next((known[name] for name in names if name in known), None)
        if not names and not isinstance(node, IMPORTS):
            raise ValueError(f"line {node.lineno} of the overlay is no import, function, class or assignment")
        if isinstance(node, ast.ClassDef) and isinstance(old, ast.ClassDef):
            if node.bases and list(map(ast.dump, node.bases)) != list(map(ast.dump, old.bases)):
                raise ValueError(f"class {node.name} has other bases than in the reference")
            members = {name: member for member in old.body for name in names_of(member)}
            for member in node.body:
                found = [members[name] for name in names_of(member) if name in members]
                if found:
                    replace(found[0], member)
                elif names_of(member):
                    edits.append((end := last_line(old, lines), end, ["", *text_of(member, new_lines)]))
        elif old is not None:
            replace(old, node)
        elif needed_at_import(node) & (known.keys() | names_at_end):
            names_at_end.update(names)
            at_end += ["", "", *text_of(node, new_lines)]
        else:
            blank = [] if isinstance(node, IMPORTS) else ["", ""]
            edits.append((top, top, [*blank, *text_of(node, new_lines)]))

    # From the bottom up, so that line numbers above stay true; the later of two insertions at one place comes first.
    for start, end, text in sorted(reversed(edits), key=lambda edit: edit[0], reverse=True):
        lines[start:end] = text
    return "\n".join(lines + at_end) + "\n"


def names_of(node: ast.stmt) -> list[str]:
    """What a definition or an assignment binds; empty for other statements."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def needed_at_import(node: ast.AST) -> set[str]:
    """Names that a statement looks up when it is executed: those in annotations, defaults and bases, not in bodies."""
    if isinstance(node, ast.Name):
        return {node.id}
    body = node.body if isinstance(node, FUNCTIONS) else []
    return {name for child in ast.iter_child_nodes(node) if child not in body for name in needed_at_import(child)}


def first_line(node: ast.stmt) -> int:
    """A statement's first line, its decorators included."""
    return min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])


def last_line(node: ast.stmt, lines: Sequence[str]) -> int:
    """A statement's last line; comments that end its body, such as ``# END SOLUTION``, belong to it."""
    end = node.end_lineno or node.lineno
    while end < len(lines) and re.match(rf"\s{{{node.col_offset + 1},}}#", lines[end]):
        end += 1
    return end


def text_of(node: ast.stmt, lines: Sequence[str]) -> list[str]:
    """A statement's lines."""
    return list(lines[first_line(node) - 1 : last_line(node, lines)])
