"""``python -m chapters grade``: a whole class. The table of grades is on disk after every row, and can be taken up again."""

import argparse
import contextlib
import csv
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from chapters.course.catalog import Chapter, CourseError, find_chapter, find_chapters
from chapters.course.commands.check_ import add_limit_arguments, limits_of
from chapters.course.running import Limits, Processes, StoppedError
from chapters.course.submissions import NOT_GRADED, Submission, describe_unknown, find_submissions, grade_submission

_BEFORE = ("student", "chapter", "seed", "points", "max_points")
_AFTER = ("seconds", "sha256", "imports", "file", "lent", "answers", "message")
_LONGEST = 8000  # characters; a spreadsheet's cell holds 32767

Row = Mapping[str, object]


class Table:
    """A CSV file that is on disk after every row."""

    def __init__(self, stream: TextIO, chapters: Iterable[Chapter], *, has_header: bool = False) -> None:
        tasks = [task.task_id for chapter in chapters for task in chapter.tasks]
        self._stream = stream
        self._fields = [*_BEFORE, *tasks, *_AFTER]
        if not has_header:
            self._write(dict(zip(self._fields, self._fields, strict=True)))

    def add(self, row: Row) -> None:
        """Write a row."""
        self._write(row)
        if self._stream is not sys.stdout:
            os.fsync(self._stream.fileno())

    def _write(self, row: Row) -> None:
        line = StringIO()
        writer = csv.DictWriter(line, self._fields, restval="", lineterminator="\n")
        writer.writerow({key: plain(value) if isinstance(value, str) else value for key, value in row.items()})
        self._stream.write(line.getvalue())  # in one call, so that the buffer never holds half a row
        self._stream.flush()


def plain(text: str) -> str:
    """A text on one line that any encoding and any terminal takes, and that a spreadsheet does not take for a formula.

    Names and messages are the students'.
    """
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
    line = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in line)
    return f"'{line}" if re.match(r"[=+\-@]", line) else line


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table, without one that was cut off. Raises ``CourseError`` if it has other columns."""
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    text = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(StringIO(text, newline=""))
    tasks = {task.task_id for chapter in find_chapters() for task in chapter.tasks}
    fields = set(rows.fieldnames or ())
    if not text:
        return []
    if not fields >= {*_BEFORE, *_AFTER} or fields - {*_BEFORE, *_AFTER} - tasks:
        raise CourseError(f"{path} has not the columns of a table of grades: it cannot be resumed")
    return [dict(row) for row in rows if None not in row and None not in row.values()]


def chapters_of(rows: Iterable[Row]) -> set[str]:
    """The numbers of the chapters that rows are about."""
    return {str(row["chapter"]) for row in rows}


def split_rows(
    rows: Sequence[dict[str, str]], submissions: Sequence[Submission], seed: int
) -> tuple[list[dict[str, str]], list[Submission]]:
    """``(kept, to_grade)``: the rows that stay, and the submissions that they say nothing about.

    A row stays if it grades the file as it is now, or if it is about a file that is not among ``submissions``. Raises
    ``CourseError`` if a row has another seed.
    """
    if others := sorted({row["seed"] for row in rows} - {str(seed)}):
        raise CourseError(f"the table was made with --seed {others[0]}, not {seed}: resume with that seed")
    asked = {_key(submission): submission for submission in submissions}
    done = set()
    kept = []
    for row in rows:
        key = row["student"], row["chapter"]
        submission = asked.get(key)
        graded = not row["message"].startswith(NOT_GRADED)
        if submission is None or (graded and row["sha256"] and row["sha256"] == submission.sha256 and key not in done):
            kept.append(row)
            done.add(key)
    return kept, [submission for submission in submissions if _key(submission) not in done]


def _key(submission: Submission) -> tuple[str, str]:
    return plain(submission.student), submission.chapter.number


_WARNING = """\
This is not a sandbox. Each file runs in a process of its own, with limits on time and memory, but with your rights: it can
read and write what you can. Grade files that you do not trust in a container without a network: docs/instructors.md.
"""
SOME_NOT_GRADED = 1
_SAME_SIGNAL_S = 0.3  # timeout(1) sends its signal to the process and to its group: twice to this one
_ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``grade``."""
    parser.add_argument("folder", metavar="DIR", help="holds alice/ch02_block_table.py, or alice_ch02_block_table.py")
    parser.add_argument("--csv", nargs="?", const="-", metavar="FILE", help="write a table as it grows; no FILE: print it")
    parser.add_argument("--resume", action="store_true", help="keep FILE's rows of files that are unchanged; add the rest")
    parser.add_argument("--chapter", metavar="NN", help="grade this chapter; a student without a file of it gets a row too")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is random in the tests (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="files at a time (default: 1)")
    add_limit_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Grade all. The exit status says whether it was done, not how well the students did."""
    limits = limits_of(args)
    if args.jobs < 1:
        raise CourseError("--jobs must be at least 1")
    if args.resume and args.csv in (None, "-"):
        raise CourseError("--resume needs --csv FILE: the table that it goes on with")
    found = find_submissions(Path(args.folder), [find_chapter(args.chapter)] if args.chapter else None)
    numbers = {submission.chapter.number for submission in found.submissions}
    for chapter in find_chapters():
        if chapter.number in numbers and not chapter.test_file.is_file():
            raise CourseError(f"chapter {chapter.number} has no tests")
    rows = read_table(Path(args.csv)) if args.resume and Path(args.csv).exists() else []
    kept, to_grade = split_rows(rows, found.submissions, args.seed)
    columns = [chapter for chapter in find_chapters() if chapter.number in numbers | chapters_of(kept)]
    print(_WARNING, file=sys.stderr)
    told = sys.stderr if args.csv == "-" else sys.stdout
    if rows:
        print(f"kept from {args.csv}: {len(kept)} rows", file=told)
    with _table(args.csv, columns, kept, resume=args.resume) as table:
        graded, failed, signal_number = _grade_all(to_grade, args.seed, limits, args.jobs, table, told)
    if found.unknown:
        print(plain(describe_unknown(found.unknown)), file=sys.stderr)
    if signal_number:
        more = "; --resume goes on with it" if table is not None and args.csv != "-" else ""
        print(f"chapters: interrupted: {graded} of {len(to_grade)} files were graded{more}", file=sys.stderr)
        return 128 + signal_number
    print(f"{graded} files graded with seed {args.seed}" + (f", {failed} not graded" if failed else ""), file=told)
    return SOME_NOT_GRADED if failed else 0


def _grade_all(
    submissions: list[Submission], seed: int, limits: Limits, jobs: int, table: Table | None, told: TextIO
) -> tuple[int, int, int]:
    """Returns how many were graded, how many could not be, and the number of a signal that ended it early."""
    processes = Processes()
    done = failed = 0
    with _stopped_by_signals(processes) as received, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(grade_submission, submission, seed, limits, processes) for submission in submissions]
        try:
            for future in as_completed(futures):
                try:
                    row = future.result()
                except StoppedError:
                    continue
                if table is not None:
                    table.add(row)
                done += 1
                failed += str(row["message"]).startswith(NOT_GRADED)
                score = f"{row['points']}/{row['max_points']}"
                line = f"[{done}/{len(futures)}] {row['student']}  chapter {row['chapter']}  {score}  {row['message']}"
                print(f"{plain(line):.150}", file=told, flush=True)
        except BaseException:  # a full disk: what is not written need not be graded
            processes.stop()
            raise
    return done - failed, failed, received[0] if received else 0


@contextlib.contextmanager
def _stopped_by_signals(processes: Processes) -> Iterator[list[int]]:
    """End the processes at the first Ctrl-C (or SIGTERM), and this one at the second. Yields the list of signals received.

    An exception in the middle of a row could lose it, so the handler raises none.
    """
    received: list[int] = []
    began = 0.0
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal began
        if not received:
            began = time.monotonic()
            received.append(number)
            processes.stop()
        elif time.monotonic() - began > _SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _table(name: str | None, chapters: list[Chapter], kept: list[dict[str, str]], *, resume: bool) -> Iterator[Table | None]:
    """Where the rows go, with those that stay. Raises ``CourseError`` rather than write over grades that are there."""
    if name is None:
        yield None
        return
    if name == "-":
        yield Table(sys.stdout, chapters)
        return
    path = Path(name)
    if resume:
        # The rows that stay are written beside the table first, so that at every moment one whole table is there.
        beginning = path.with_name(f".{path.name}.tmp")
        with open(beginning, "w", **_ENCODING) as file:
            table = Table(file, chapters)
            for row in kept:
                table.add(row)
        os.replace(beginning, path)
    try:
        file = open(path, "a" if resume else "x", **_ENCODING)
    except FileExistsError:
        raise CourseError(f"{name} is there already: --resume goes on with it; or name another file") from None
    with file:
        yield Table(file, chapters, has_header=resume)
