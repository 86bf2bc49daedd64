"""``python -m chapters list``."""

import argparse

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chapters.course.catalog import find_chapters, is_given
from chapters.course.cli import add_work_argument
from chapters.course.workspace import shown, task_states, work_folder

_STYLES = {"passed": "green", "failed": "red", "to do": "yellow", "not checked": "cyan", "not started": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``list``."""
    add_work_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    work = work_folder(args.work)
    table = Table(box=None, pad_edge=False)
    for column in ("Task", "What", "Points", "Your work"):
        table.add_column(column, justify="right" if column == "Points" else "left", no_wrap=column != "What")
    reached = total = 0
    for chapter in find_chapters():
        states = task_states(work, chapter)
        if is_given(chapter) and set(states.values()) == {"not started"}:
            table.add_row(
                Text(chapter.number, style="bold"), Text(chapter.title, style="bold"), "", Text("complete", style="dim")
            )
            continue
        total += chapter.points
        reached += (own := sum(task.points for task in chapter.tasks if states[task.task_id] == "passed"))
        table.add_section()
        title = Text(f"{chapter.title}" + (f" ({chapter.effort})" if chapter.effort else ""), style="bold")
        table.add_row(Text(chapter.number, style="bold"), title, f"{own}/{chapter.points}", "")
        for task in chapter.tasks:
            state = states[task.task_id]
            table.add_row(Text(task.task_id), Text(task.summary), str(task.points), Text(state, style=_STYLES[state]))
    console = Console(highlight=False, soft_wrap=False)
    console.print(table)
    console.print(f"\n{reached} of {total} points, as of the last check of each file in {shown(work)}.", markup=False)
    return 0
