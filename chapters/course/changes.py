"""What a chapter keeps, replaces and adds: its imports, held against the table of roles."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from chapters.course.catalog import Chapter, find_chapters
from chapters.course.errors import CourseError
from chapters.course.roles import ROLES


@dataclass(frozen=True)
class Change:
    """One line of a comparison. ``kind`` is ``kept``, ``replaced`` or ``new``; names are like ``02.PagedCache``."""

    kind: str
    role: str
    name: str
    replaced: tuple[str, ...] = ()


def compare(old: Chapter, new: Chapter) -> list[Change]:
    """What is different in ``new`` for somebody who knows ``old``, by role. Raises ``CourseError``."""
    if old.number >= new.number:
        raise CourseError(f"compare an earlier chapter with a later one, not {old.number} with {new.number}")
    undescribed = [chapter.number for chapter in (old, new) if chapter.number not in ROLES]
    if undescribed:
        raise CourseError(f"chapters/course/roles.py says nothing about chapter {undescribed[0]}")
    changes = []
    for name in sorted(used_definitions(new)) + [f"{new.number}.{name}" for name in definitions(new)]:
        number, _, definition = name.partition(".")
        entry = ROLES.get(number, {}).get(definition)
        if entry is None:
            continue  # a type alias, say
        if number <= old.number:
            changes.append(Change("kept", entry.role, name))
        else:
            known = tuple(_known(entry.replaces, old.number))
            changes.append(Change("replaced" if known else "new", entry.role, name, known))
    order = list(dict.fromkeys(entry.role for table in ROLES.values() for entry in table.values()))
    return sorted(changes, key=lambda change: order.index(change.role))


def definitions(chapter: Chapter) -> list[str]:
    """The public functions and classes at a chapter's top level, in order."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in ast.parse(chapter.source).body if isinstance(node, kinds) and node.name[0] != "_"]


def used_definitions(chapter: Chapter) -> set[str]:
    """What a chapter imports from earlier ones and uses, as ``00.greedy_token``."""
    names = {other.name: other.number for other in find_chapters(chapter.path.parent)}
    tree = ast.parse(chapter.source)
    modules: dict[str, str] = {}  # local name -> chapter
    found = set()
    local: dict[str, str] = {}  # local name -> definition
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            number = names.get(node.module.removeprefix("chapters."))
            for alias in node.names:
                if number is not None:
                    local[alias.asname or alias.name] = f"{number}.{alias.name}"
                elif node.module == "chapters" and alias.name in names:
                    modules[alias.asname or alias.name] = names[alias.name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in local:
            found.add(local[node.id])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found.add(f"{modules[node.value.id]}.{node.attr}")
    return found


def _known(replaced: tuple[str, ...], old: str) -> Iterator[str]:
    """What a definition replaces, as far back as chapter ``old``: over several chapters, the first of the chain."""
    for name in replaced:
        number, _, definition = name.partition(".")
        if number <= old:
            yield name
        else:
            yield from _known(ROLES[number][definition].replaces, old)
