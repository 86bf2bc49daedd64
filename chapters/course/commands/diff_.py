"""``python -m chapters diff``: what a chapter keeps, replaces and adds, and the code that does. A table names the roles.

A definition *replaces* another if the table says so: from that chapter on it does the other's work. It is *kept* if a later
chapter imports it. Everything else that a chapter defines is *new*. A test holds the table against the chapters.
"""

import argparse
import ast
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chapters.course.catalog import Chapter, CourseError, find_chapter, find_chapters
from chapters.course.parsing import parse


@dataclass(frozen=True)
class Role:
    """The part of the engine that a definition belongs to, and what it replaces: ``01.generate`` is chapter 01's."""

    role: str
    replaces: tuple[str, ...] = ()


ROLES: dict[str, dict[str, Role]] = {
    "00": {
        "check_prompts": Role("checks"),
        "compute_logits": Role("forward pass"),
        "greedy_token": Role("sampling"),
        "generate_one": Role("loop"),
        "generate": Role("loop"),
    },
    "01": {
        "forward": Role("forward pass", ("00.compute_logits",)),
        "ReservedCache": Role("cache"),
        "masked_attention": Role("attention"),
        "attend_reserved": Role("attention"),
        "prefill_inputs": Role("batch"),
        "decode_inputs": Role("batch"),
        "generate": Role("loop", ("00.generate", "00.generate_one")),
    },
    "02": {
        "BlockManager": Role("cache"),
        "PagedCache": Role("cache", ("01.ReservedCache",)),
        "Rows": Role("batch", ("01.prefill_inputs", "01.decode_inputs")),
        "attend_gathered": Role("attention", ("01.attend_reserved",)),
        "generate": Role("loop", ("01.generate",)),
    },
    "03": {
        "Partial": Role("attention"),
        "add_page": Role("attention"),
        "attend_one": Role("attention"),
        "paged_attention": Role("attention", ("01.masked_attention",)),
        "attend_paged": Role("attention", ("02.attend_gathered",)),
        "generate": Role("loop"),  # around the loop of chapter 02, which it keeps
    },
    "04": {
        "Cache": Role("interfaces"),
        "Scheduler": Role("scheduler"),
        "StaticScheduler": Role("scheduler"),
        "FreeAtOnce": Role("cache"),
        "half_the_room": Role("cache"),
        "Engine": Role("loop", ("02.generate",)),
        "generate": Role("loop", ("03.generate",)),
    },
    "05": {
        "EngineFailedError": Role("server"),
        "Client": Role("server"),
        "AsyncEngine": Role("server"),
        "GenerateBody": Role("HTTP"),
        "create_app": Role("HTTP"),
        "event": Role("HTTP"),
        "generate": Role("loop", ("04.generate",)),
        "main": Role("HTTP"),
    },
    "06": {
        "write_kernel": Role("kernels"),
        "attend_tokens": Role("kernels"),
        "decode_kernel": Role("kernels"),
        "merge_kernel": Role("kernels"),
        "Work": Role("roofline"),
        "decode_work": Role("roofline"),
        "floor_seconds": Role("roofline"),
        "choose_num_splits": Role("kernels"),
        "num_wanted_programs": Role("kernels"),
        "write_kv": Role("cache"),
        "paged_decode": Role("attention"),
        "paged_attention": Role("attention", ("03.paged_attention",)),
        "attend_by_kernels": Role("attention", ("03.attend_paged",)),
        "generate": Role("loop"),  # around the loop of chapter 02, as chapter 03's
    },
    "07": {
        "bucket_for": Role("batch"),
        "BatchRows": Role("batch"),
        "decode_step": Role("forward pass"),
        "attend_rows": Role("attention"),
        "InFlight": Role("loop"),
        "Executor": Role("forward pass"),
        "LateRetirement": Role("cache"),
        "Scheduler": Role("scheduler"),
        "Engine": Role("loop"),  # the engine of chapter 04, with steps in flight
        "generate": Role("loop", ("04.generate",)),
    },
    "08": {
        "BlockManager": Role("cache", ("02.BlockManager",)),
        "SharedCache": Role("cache"),  # the cache of chapter 04, with tables that name the same block
        "Scheduler": Role("scheduler"),  # the scheduler of chapter 04, with another admit
        "Engine": Role("loop"),  # the engine of chapter 04, with several samples
        "generate": Role("loop", ("04.generate",)),
    },
}
"""Chapter -> public top-level function or class -> its role."""


@dataclass(frozen=True)
class Change:
    """One line of a comparison. ``kind`` is ``kept``, ``replaced`` or ``new``; names are like ``02.PagedCache``."""

    kind: str
    role: str
    name: str
    replaced: tuple[str, ...] = ()


def compare(old: Chapter, new: Chapter) -> list[Change]:
    """What ``new`` keeps, replaces and adds for a reader who knows ``old``, by role. Raises ``CourseError``."""
    if old.number >= new.number:
        raise CourseError(f"compare an earlier chapter with a later one, not {old.number} with {new.number}")
    undescribed = [chapter.number for chapter in (old, new) if chapter.number not in ROLES]
    if undescribed:
        raise CourseError(f"chapters/course/commands/diff_.py says nothing about chapter {undescribed[0]}")
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
    """The public functions and classes at a chapter's top level, in order, without the answers to its questions."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        node.name
        for node in parse(chapter.source).body
        if isinstance(node, kinds) and not node.name.startswith(("_", "answer_"))
    ]


def used_definitions(chapter: Chapter) -> set[str]:
    """What a chapter imports from earlier ones and uses, as ``00.greedy_token``."""
    names = {other.name: other.number for other in find_chapters(chapter.path.parent)}
    tree = parse(chapter.source)
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


_SIGNS = {"kept": ("=", "dim"), "replaced": ("~", "yellow"), "new": ("+", "green")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``diff``."""
    parser.add_argument("--roles", action="store_true", help="only the table of roles, without the code")
    parser.add_argument("chapters", nargs="+", metavar="CHAPTER", help="two chapters, such as 01 02; or one, with the last")


def run(args: argparse.Namespace) -> int:
    """Print the comparison."""
    chosen = [find_chapter(text) for text in args.chapters]
    if len(chosen) == 1:
        chosen = [other for other in find_chapters() if other.number < chosen[0].number][-1:] + chosen
    if len(chosen) != 2:
        raise CourseError("name two chapters, such as 01 02, or one that has another before it")
    old, new = chosen
    console = Console(highlight=False)
    console.print(Text(f"From chapter {old.number} ({old.title})\nto chapter {new.number} ({new.title})\n", style="bold"))
    changes = compare(old, new)
    console.print(_table(changes))
    console.print("\n= kept  ~ replaced  + new", style="dim", markup=False)
    if not args.roles:
        role = ""
        for change in changes:
            if change.kind != "kept":
                heading = f"\n{change.role}\n" if change.role != role else ""
                console.print(Text(f"{heading}\n{_what(change)} ({_where(change)})", style="bold"))
                console.print(_coloured(code_diff(change, new.path.parent)), soft_wrap=True)
                role = change.role
    return 0


def _table(changes: Sequence[Change]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("Role", "", "What", "Where"):
        table.add_column(column)
    role = ""
    for change in changes:
        sign, style = _SIGNS[change.kind]
        title = change.role if change.role != role else ""
        table.add_row(title, Text(sign, style=style), Text(_what(change), style=style), Text(_where(change), style="dim"))
        role = change.role
    return table


def code_diff(change: Change, folder: Path) -> list[str]:
    """The lines of a definition, each with ``+``, against those that it replaces, with ``-``; what stays has a space."""
    before = [line for name in change.replaced for line in _code(name, folder)]
    lines = list(difflib.unified_diff(before, _code(change.name, folder), lineterm=""))
    return lines[2:] if before else lines[3:]  # without the names of files, and where there is no other text, of places


def _code(name: str, folder: Path) -> list[str]:
    """The source of a definition such as ``02.PagedCache``, without the marks around its solutions."""
    number, _, definition = name.partition(".")
    source = find_chapter(number, folder).source
    [node] = [node for node in parse(source).body if getattr(node, "name", "") == definition]
    first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
    lines = source.splitlines()[first - 1 : node.end_lineno]
    return [line for line in lines if not re.match(r" *# (BEGIN|END) SOLUTION", line)]


def _coloured(lines: Sequence[str]) -> Text:
    styles = {"+": "green", "-": "red", "@": "dim"}
    return Text("\n").join(Text(line, style=styles.get(line[:1], "")) for line in lines)


def _what(change: Change) -> str:
    name = change.name.partition(".")[2]
    if not change.replaced:
        return name
    return f"{name} replaces " + " and ".join(old.partition(".")[2] for old in change.replaced)


def _where(change: Change) -> str:
    old = "".join(f", was {number}" for number in sorted({name.partition(".")[0] for name in change.replaced}))
    return f"chapter {change.name.partition('.')[0]}{old}"
