"""``python -m chapters list``: the chapters and their tasks, and where a learner's work stands: what the last check said."""

import argparse
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chapters.course.catalog import Chapter, find_chapters, is_given, open_tasks
from chapters.course.cli import add_work_argument
from chapters.course.workspace import Snapshot, own_file, shown, work_folder, write_file

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


_PROGRESS = ".progress.json"


def save_progress(
    work: Path, chapter: Chapter, snapshot: Snapshot, passed: Mapping[str, bool], own: Mapping[str, Path]
) -> None:
    """Remember what a check of a file of ``work`` said, together with what was said before about the same content.

    ``own`` are the learner's files that stood for earlier chapters: with others, the same file may do otherwise.
    """
    progress = _read_progress(work)
    before = progress.get(chapter.number, {})
    earlier = {str(path): Snapshot.take(path).sha256 for path in own.values()}
    known = before["tasks"] if before.get("sha256") == snapshot.sha256 and before.get("earlier", {}) == earlier else {}
    progress[chapter.number] = {
        "sha256": snapshot.sha256,
        "earlier": earlier,
        "checked": datetime.now().astimezone().isoformat(timespec="seconds"),
        "tasks": {**known, **passed},
    }
    write_file(work / _PROGRESS, json.dumps(progress, indent=2) + "\n")


def task_states(work: Path, chapter: Chapter) -> dict[str, str]:
    """For each task: ``not started``, ``to do``, ``not checked``, ``passed``, ``failed``."""
    path = own_file(chapter, work)
    if not path.is_file():
        return {task.task_id: "not started" for task in chapter.tasks}
    snapshot = Snapshot.take(path)
    todo = set(open_tasks(snapshot.source.decode("utf-8", errors="replace")))
    last = _read_progress(work).get(chapter.number, {})
    same = last.get("sha256") == snapshot.sha256 and all(
        Path(name).is_file() and Snapshot.take(Path(name)).sha256 == sha256
        for name, sha256 in last.get("earlier", {}).items()
    )
    verdicts = last["tasks"] if same else {}
    states = {True: "passed", False: "failed", None: "not checked"}
    return {task.task_id: "to do" if task.task_id in todo else states[verdicts.get(task.task_id)] for task in chapter.tasks}


def _read_progress(work: Path) -> dict[str, Any]:
    """What is remembered; nothing if the file is missing or not ours."""
    try:
        found = json.loads((work / _PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: entry for key, entry in found.items() if isinstance(entry, dict) and isinstance(entry.get("tasks"), dict)}
