"""The command line of the course tool: one module of ``chapters.course.commands`` per command.

:func:`main` turns what can go wrong into one line: exit status 2 for a mistake in what was asked for, 130 when interrupted.
A check that does not pass is no mistake: it reports, and its exit status is 1.
"""

import argparse
import contextlib
import importlib
import io
import os
import shutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from chapters.course.errors import CourseError
from pagebrain.cli.quiet import quiet
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
"""Command -> what it does; each is a module with ``add_arguments(parser)`` and ``run(args) -> int``."""

_EXAMPLES = """\
examples:
  python -m chapters start 02        writes work/ch02_block_table.py
  python -m chapters check 2.1       one task of it
  python -m chapters check 02        all of it
  python -m chapters try 02          your block manager in the real engine
"""

NOT_PASSED = 1
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        print(f"chapters: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(100, shutil.get_terminal_size().columns - 2))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a table may hold characters that the terminal has not
    try:
        with quiet():
            status = _run(arguments)
            sys.stdout.flush()  # a closed pipe should be noticed here, not by the interpreter on its way out
            return status
    except (CourseError, PageBrainError) as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("chapters", "pagebrain"):
            raise
        return _fail(f"the package {error.name} is not installed: pip install {error.name}")
    except KeyboardInterrupt:
        print("chapters: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return PIPE_CLOSED
    except OSError as error:  # a full disk, say
        return _fail(str(error))


def add_work_argument(parser: argparse.ArgumentParser) -> None:
    """``--work``, for commands that look at the learner's files."""
    parser.add_argument("--work", metavar="DIR", help="your folder (default: $PAGEBRAIN_WORK, else work/)")


def _run(arguments: list[str]) -> int:
    parser = _parser(arguments)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # help, or an error that the parser has reported
        return int(stop.code or 0)
    if args.command is None:
        parser.print_help()
        return 0
    return int(_module(args.command).run(args))


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser with the options of the command in ``arguments``; those of the others are not needed, nor their modules."""
    parser = OneLineParser(
        prog="python -m chapters", description="PageBrain's course: start a chapter, check it, try it.", epilog=_EXAMPLES
    )
    subparsers = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for command, summary in COMMANDS.items():
        subparser = subparsers.add_parser(command, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if command == wanted:
            _module(command).add_arguments(subparser)
    return parser


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"chapters.course.commands.{command}_")


def _fail(message: str) -> int:
    print(f"chapters: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR


def _discard_output() -> None:
    """Send what is still buffered nowhere, or the interpreter would fail over it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
