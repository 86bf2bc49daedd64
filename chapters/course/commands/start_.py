"""``python -m chapters start``: writes the file that a learner fills in, and never over one that is there."""

import argparse
import os
from datetime import datetime
from pathlib import Path

from chapters.course.catalog import Chapter, CourseError, find_chapter
from chapters.course.cli import add_work_argument
from chapters.course.skeleton import make_skeleton
from chapters.course.workspace import own_file, shown, work_folder, write_beside


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``start``."""
    parser.add_argument("chapters", nargs="+", metavar="CHAPTER", help="such as 02")
    parser.add_argument("--force", action="store_true", help="start again; your file is kept in old/, with the date")
    add_work_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Write the files."""
    work = work_folder(args.work)
    for chapter in [find_chapter(text) for text in args.chapters]:
        path = own_file(chapter, work)
        if chapter.is_skeleton and path.is_file() and not args.force:
            print(f"{shown(path)} came with this copy, and was left as it is: {chapter.title}")
            _print_next(chapter)
            continue
        kept = start_file(path, make_skeleton(chapter), force=args.force)
        if kept is not None:
            print(f"Your file is now {shown(kept)}")
        print(f"Wrote {shown(path)}: {chapter.title}")
        _print_next(chapter)
    return 0


def _print_next(chapter: Chapter) -> None:
    for task in chapter.tasks:
        print(f"  {task.task_id}  {task.points:3} points  {task.summary}")
    print(f"Read {chapter.notebook}, then write your code where the file says TODO.")
    print(f"Check it: python -m chapters check {chapter.number}")


def start_file(path: Path, text: str, *, force: bool) -> Path | None:
    """Write a learner's file that is not there yet. With ``force``, one that is there is moved to ``old/`` first.

    Returns where the old file is now, if there was one. Raises ``CourseError`` if there is one and ``force`` is not set.
    """
    exists = os.path.lexists(path)
    if exists and not force:
        raise CourseError(f"{shown(path)} is there already and was left as it is (--force keeps it in old/ and starts anew)")
    temporary = write_beside(path, text)
    kept = None
    try:
        if exists:
            kept = _free_name(path)
            kept.parent.mkdir(exist_ok=True)
            os.rename(path, kept)
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return kept


def _free_name(path: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = [
        f"{path.stem}_{stamp}{path.suffix}",
        *(f"{path.stem}_{stamp}_{number}{path.suffix}" for number in range(2, 1000)),
    ]
    return next(kept for name in names if not os.path.lexists(kept := path.parent / "old" / name))
