"""``python -m chapters start``."""

import argparse

from chapters.course.catalog import find_chapter
from chapters.course.cli import add_work_argument
from chapters.course.skeleton import make_skeleton
from chapters.course.workspace import own_file, shown, start_file, work_folder


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
        kept = start_file(path, make_skeleton(chapter), force=args.force)
        if kept is not None:
            print(f"Your file is now {shown(kept)}")
        print(f"Wrote {shown(path)}: {chapter.title}")
        for task in chapter.tasks:
            print(f"  {task.task_id}  {task.points:3} points  {task.summary}")
        print(f"Read {chapter.notebook}, then write your code where the file says TODO.")
        print(f"Check it: python -m chapters check {chapter.number}")
    return 0
