"""The command line of the course tool: one module of ``chapters.course.commands`` per command.

The exit status is 2 for a mistake on the command line, 130 when interrupted. A check that does not pass is not such a
mistake: it prints a report, and its exit status is 1.
"""

import argparse
from collections.abc import Sequence

from chapters.course.catalog import CourseError
from pagebrain.cli.frame import CommandLine
from pagebrain.errors import PageBrainError

COMMANDS = {
    "list": "the chapters, their tasks, and where your work stands",
    "start": "write the file that you fill in",
    "check": "run the tests of a chapter or a task on your file",
    "diff": "what a chapter keeps, replaces and adds",
    "try": "run the engine with your part in it, and watch",
    "ladder": "measure every stage on the same work: the staircase",
    "release": "for instructors: make a folder for students",
    "grade": "for instructors: check a folder of files, and write a CSV",
}

_EXAMPLES = """\
examples:
  python -m chapters start 02        writes work/ch02_block_table.py
  python -m chapters check 2.1       one task of it
  python -m chapters check 02        all of it
  python -m chapters try 02          your block manager in the real engine
"""

NOT_PASSED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    line = CommandLine(
        name="chapters",
        prog="python -m chapters",
        description="PageBrain's course: start a chapter, check it, try it.",
        epilog=_EXAMPLES,
        commands=COMMANDS,
        module="chapters.course.commands.{}_",
        mistakes=(CourseError, PageBrainError),
    )
    return line.main(argv)


def add_work_argument(parser: argparse.ArgumentParser) -> None:
    """``--work``, for commands that look at the learner's files."""
    parser.add_argument("--work", metavar="DIR", help="your folder (default: $PAGEBRAIN_WORK, else work/)")
