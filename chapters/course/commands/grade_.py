"""``python -m chapters grade``."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TextIO

from chapters.course.catalog import find_chapter
from chapters.course.commands.check_ import add_limit_arguments, limits_of
from chapters.course.errors import CourseError
from chapters.course.submissions import Table, find_submissions, grade_submission

_WARNING = """\
This is no sandbox. Each file runs in a process of its own, with limits on time and memory, but with your rights: it can
read and write what you can. Grade files that you do not trust in a container without a network: docs/instructors.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``grade``."""
    parser.add_argument("folder", metavar="DIR", help="holds alice/ch02_block_table.py, or alice_ch02_block_table.py")
    parser.add_argument("--csv", nargs="?", const="-", metavar="FILE", help="write a table as it grows; no FILE: print it")
    parser.add_argument("--chapter", metavar="NN", help="grade this chapter; who has no file of it gets a row too")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is random in the tests (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="files at a time (default: 1)")
    add_limit_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Grade all. The exit status says whether it was done, not how well the students did."""
    limits = limits_of(args)
    if args.jobs < 1:
        raise CourseError("--jobs must be at least 1")
    chapters = [find_chapter(args.chapter)] if args.chapter else None
    submissions = find_submissions(Path(args.folder), chapters)
    present = list({submission.chapter.number: submission.chapter for submission in submissions}.values())
    for chapter in present:
        if not chapter.test_file.is_file():
            raise CourseError(f"chapter {chapter.number} has no tests")
    print(_WARNING, file=sys.stderr)
    told = sys.stderr if args.csv == "-" else sys.stdout
    with _stream(args.csv) as stream, ThreadPoolExecutor(args.jobs) as pool:
        table = Table(stream, present) if stream is not None else None
        futures = [pool.submit(grade_submission, submission, args.seed, limits) for submission in submissions]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                row = future.result()
                if table is not None:
                    table.add(row)
                score = f"{row['points']}/{row['max_points']}"
                line = f"[{done}/{len(futures)}] {row['student']}  chapter {row['chapter']}  {score}  {row['message']}"
                print(f"{' '.join(line.split()):.150}", file=told, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(f"{len(submissions)} files graded with seed {args.seed}", file=told)
    return 0


@contextlib.contextmanager
def _stream(name: str | None) -> Iterator[TextIO | None]:
    """Where the table goes. Raises ``CourseError`` rather than write over grades that are there."""
    if name is None or name == "-":
        yield sys.stdout if name else None
        return
    try:
        file = open(name, "x", encoding="utf-8", newline="")
    except FileExistsError:
        raise CourseError(f"{name} is there already: name another file, or move it away") from None
    with file:
        yield file
