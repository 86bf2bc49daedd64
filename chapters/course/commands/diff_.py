"""``python -m chapters diff``."""

import argparse

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chapters.course.catalog import find_chapter, find_chapters
from chapters.course.changes import Change, compare
from chapters.course.errors import CourseError

_SIGNS = {"kept": ("=", "dim"), "replaced": ("~", "yellow"), "new": ("+", "green")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``diff``."""
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
    table = Table(box=None, pad_edge=False)
    for column in ("Role", "", "What", "Where"):
        table.add_column(column)
    role = ""
    for change in compare(old, new):
        sign, style = _SIGNS[change.kind]
        title = change.role if change.role != role else ""
        table.add_row(title, Text(sign, style=style), Text(_what(change), style=style), Text(_where(change), style="dim"))
        role = change.role
    console.print(table)
    console.print("\n= kept  ~ replaced  + new", style="dim", markup=False)
    return 0


def _what(change: Change) -> str:
    name = change.name.partition(".")[2]
    if not change.replaced:
        return name
    return f"{name} replaces " + " and ".join(old.partition(".")[2] for old in change.replaced)


def _where(change: Change) -> str:
    old = "".join(f", was {number}" for number in sorted({name.partition(".")[0] for name in change.replaced}))
    return f"chapter {change.name.partition('.')[0]}{old}"
