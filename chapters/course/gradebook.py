"""The table that ``grade`` writes: one row for each file, on disk as soon as it is there, and taken up again later."""

import csv
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TextIO

from chapters.course.catalog import Chapter, find_chapters
from chapters.course.errors import CourseError
from chapters.course.submissions import NOT_GRADED, Submission

_BEFORE = ("student", "chapter", "seed", "points", "max_points")
_AFTER = ("seconds", "sha256", "imports", "file", "message")
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
        self._stream.write(line.getvalue())  # at once: half a row is never in the buffer
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
    """The rows of a table, without one that was cut off. Raises ``CourseError`` if it is none of ours."""
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
