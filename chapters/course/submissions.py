"""A folder of files that were handed in, and one row of a table for each."""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from chapters.course.catalog import Chapter, find_chapters
from chapters.course.errors import CourseError
from chapters.course.grading import grade_file
from chapters.course.running import Limits


@dataclass(frozen=True)
class Submission:
    """One student's file of one chapter; ``path`` is ``None`` if there is none."""

    student: str
    chapter: Chapter
    path: Path | None
    problem: str = ""


def find_submissions(folder: Path, chapters: Sequence[Chapter] | None) -> list[Submission]:
    """``folder/alice/ch02_block_table.py`` or ``folder/alice_ch02_block_table.py``, sorted by chapter and student.

    Of ``chapters``, a student's folder without such a file counts too, as handing in nothing; ``None`` looks for all
    chapters and takes what there is. Raises ``CourseError`` if nothing is found.
    """
    if not folder.is_dir():
        raise CourseError(f"{folder} is no folder")
    found = []
    for chapter in chapters if chapters is not None else find_chapters():
        for path in sorted(folder.glob(f"*_{chapter.name}.py")):
            found.append(Submission(path.name.removesuffix(f"_{chapter.name}.py"), chapter, path))
        for student in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))):
            paths = [path for path in sorted(student.rglob(f"{chapter.name}.py")) if "old" not in path.parts]
            if len(paths) == 1:
                found.append(Submission(student.name, chapter, paths[0]))
            elif paths or chapters is not None:
                problem = f"{len(paths)} files of that name" if paths else f"no file {chapter.name}.py"
                found.append(Submission(student.name, chapter, None, problem))
    if not found:
        raise CourseError(f"{folder} holds no files such as alice/ch02_block_table.py or alice_ch02_block_table.py")
    return sorted(found, key=lambda submission: (submission.chapter.number, submission.student))


def grade_submission(submission: Submission, seed: int, limits: Limits) -> dict[str, object]:
    """The row of one file. Nothing that is in the file, and nothing that is wrong with it, makes this fail."""
    chapter = submission.chapter
    row: dict[str, object] = {
        "student": submission.student,
        "chapter": chapter.number,
        "points": 0,
        "max_points": chapter.points,
        **{task.task_id: 0 for task in chapter.tasks},
        "seconds": 0.0,
        "sha256": "",
        "file": str(submission.path or ""),
        "message": submission.problem,
    }
    if submission.path is None:
        return row
    try:
        grade = grade_file(chapter, chapter.tasks, submission.path, seed=seed, limits=limits)
    except Exception as error:  # the rest of the class must not wait for this one file
        return row | {"message": f"not graded: {type(error).__name__}: {error}"}
    problems = [f"{verdict.task.task_id}: {verdict.message}" for verdict in grade.verdicts if not verdict.passed]
    return row | {
        "points": grade.points,
        **{verdict.task.task_id: verdict.points for verdict in grade.verdicts},
        "seconds": round(grade.seconds, 1),
        "sha256": grade.snapshot.sha256,
        "message": " | ".join(problems),
    }


class Table:
    """A CSV file that is on disk after every row."""

    def __init__(self, stream: TextIO, chapters: Sequence[Chapter]) -> None:
        tasks = [task.task_id for chapter in chapters for task in chapter.tasks]
        fields = ["student", "chapter", "points", "max_points", *tasks, "seconds", "sha256", "file", "message"]
        self._stream = stream
        self._writer = csv.DictWriter(stream, fields, restval="", lineterminator="\n")
        self._writer.writeheader()
        stream.flush()

    def add(self, row: dict[str, object]) -> None:
        """Write a row."""
        self._writer.writerow({key: _harmless(value) for key, value in row.items()})
        self._stream.flush()
        if self._stream.fileno() > 2:
            os.fsync(self._stream.fileno())


def _harmless(value: object) -> object:
    """A text that a spreadsheet does not take for a formula: messages and names are the students'."""
    if not isinstance(value, str):
        return value
    line = " ".join(value.split())
    return f"'{line}" if re.match(r"[=+\-@]", line) else line
