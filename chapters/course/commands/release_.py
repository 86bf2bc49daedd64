"""``python -m chapters release``."""

import argparse
from pathlib import Path

from chapters.course.catalog import find_chapter, find_chapters
from chapters.course.errors import CourseError
from chapters.course.release import release


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``release``."""
    parser.add_argument("folder", metavar="DIR", help="where to make it; must be empty, or not there yet")
    parser.add_argument("--chapters", metavar="NN,NN", help="what the students write, such as 02,03 (default: all)")


def run(args: argparse.Namespace) -> int:
    """Make the folder and say what is in it."""
    everything = find_chapters()
    if args.chapters is None:
        released = [chapter for chapter in everything if chapter.tasks]
    else:
        wanted = {find_chapter(text.strip()) for text in args.chapters.split(",") if text.strip()}
        released = [chapter for chapter in everything if chapter in wanted]
    if not released:
        raise CourseError("--chapters names no chapter")
    target = Path(args.folder)
    skeletons = release(target, released)
    print(f"Made {target}. For the students to write:")
    for path in skeletons:
        print(f"  {path.as_posix()}")
    before = [chapter.number for chapter in everything if chapter.number < released[0].number]
    print(f"Complete: chapters {', '.join(before)}." if before else "No chapter is complete.")
    missing = [chapter.notebook for chapter in released if not (target / chapter.notebook).is_file()]
    if missing:
        print(f"Not there to be copied: {', '.join(missing)}")
    print("No line of a solution is in its chapters, skeletons, tests or notebooks. pagebrain/, the engine, is complete.")
    return 0
