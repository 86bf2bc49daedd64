"""A folder of files that were handed in: which student each belongs to, read once before any of them runs.

A graded file runs with the grader's rights and could change the others. So all are kept in memory, and each is graded as a
copy of its own.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chapters.course.catalog import Chapter, CourseError, find_chapters
from chapters.course.grading import Grade, describe_answer, describe_lent, grade_file
from chapters.course.imports_guard import additional_modules
from chapters.course.running import Limits, Processes, StoppedError
from chapters.course.skeleton import make_skeleton

NOT_GRADED = "not graded: "
_IGNORED = ("__MACOSX", "__pycache__")
_LARGEST = 1 << 20  # bytes; a chapter has fifteen thousand


@dataclass(frozen=True)
class Submission:
    """One student's file of one chapter, as it was when it was read; ``problem`` says why there is nothing to grade."""

    student: str
    chapter: Chapter
    path: Path | None
    source: bytes = b""
    problem: str = ""

    @property
    def sha256(self) -> str:
        """The hash of the content, empty if there is none."""
        return "" if self.problem else hashlib.sha256(self.source).hexdigest()


@dataclass
class Found:
    """What a folder holds: ``unknown`` are the entries that were not understood, from that folder."""

    submissions: list[Submission] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def find_submissions(folder: Path, chapters: Sequence[Chapter] | None) -> Found:
    """``folder/alice/ch02_block_table.py`` or ``folder/alice_ch02_block_table.py``, sorted by chapter and student.

    Of ``chapters``, a student's folder without such a file counts too, as handing in nothing; ``None`` looks for all
    chapters and takes what there is. Raises ``CourseError`` if nothing is found.
    """
    if not folder.is_dir():
        raise CourseError(f"{folder} is not a folder")
    found = Found()
    known = {f"{chapter.name}.py": chapter for chapter in find_chapters()}
    paths: dict[tuple[str, str], list[Path]] = {}  # student, name of the chapter's file -> files
    students = set()
    for entry in _entries(folder):
        if entry.is_dir() and not entry.name.startswith("_"):
            files = list(_files(entry))
            for path in files:
                if path.name in known:
                    paths.setdefault((entry.name, path.name), []).append(path)
                elif path.parent == entry or re.match(r"ch\d\d", path.name, re.IGNORECASE):
                    found.unknown.append(path.relative_to(folder).as_posix())
            students.add(entry.name)
            if not files and chapters is None:
                found.unknown.append(f"{entry.name}/")
        elif match := re.fullmatch(rf"(.+)_({'|'.join(map(re.escape, known))})", entry.name):
            paths.setdefault((match[1], match[2]), []).append(entry)
        else:
            found.unknown.append(f"{entry.name}/" if entry.is_dir() else entry.name)
    for name, chapter in known.items():
        if chapters is None or chapter in chapters:
            without = set() if chapters is None else {(student, name) for student in students}
            for key in without | {key for key in paths if key[1] == name}:
                found.submissions.append(_read(key[0], chapter, paths.get(key, []), folder))
    if not found.submissions:
        instead = f"; it holds {_some(found.unknown)}" if found.unknown else ""
        raise CourseError(f"{folder} holds no files such as alice/ch02_block_table.py or alice_ch02_block_table.py{instead}")
    found.submissions.sort(key=lambda submission: (submission.chapter.number, submission.student))
    return found


def describe_unknown(unknown: Sequence[str]) -> str:
    """One line about entries that were not understood."""
    return f"{len(unknown)} {'entry was' if len(unknown) == 1 else 'entries were'} not understood: {_some(unknown)}"


def grade_submission(submission: Submission, seed: int, limits: Limits, processes: Processes) -> dict[str, object]:
    """The row of one file. Nothing that is in the file, and nothing that is wrong with it, makes this fail.

    Raises ``StoppedError`` once ``processes`` are stopped.
    """
    chapter = submission.chapter
    row: dict[str, object] = {
        "student": submission.student,
        "chapter": chapter.number,
        "seed": seed,
        "points": 0,
        "max_points": chapter.points,
        **{task.task_id: 0 for task in chapter.tasks},
        "seconds": 0.0,
        "sha256": submission.sha256,
        "imports": "",
        "file": str(submission.path or ""),
        "lent": "",
        "answers": "",
        "message": submission.problem,
    }
    processes.check()
    if submission.problem:
        return row
    folder = ""
    try:
        with tempfile.TemporaryDirectory(prefix="pagebrain-grade-", ignore_cleanup_errors=True) as folder:
            copy = Path(folder) / f"{chapter.name}.py"
            copy.write_bytes(submission.source)
            grade = grade_file(chapter, chapter.tasks, copy, seed=seed, limits=limits, processes=processes)
        return row | {
            "points": grade.points,
            **{verdict.task.task_id: verdict.points for verdict in grade.verdicts},
            "seconds": round(grade.seconds, 1),
            "imports": _imports(submission),
            "lent": " | ".join(f"{v.task.task_id} {describe_lent(v)}" for v in grade.verdicts if v.lent),
            "answers": " | ".join(f"{v.task.task_id} {describe_answer(v)}" for v in grade.verdicts if v.answer),
            "message": _message(grade),
        }
    except StoppedError:
        raise
    except CourseError as error:
        return row | {"message": NOT_GRADED + str(error).replace(f"{folder}{os.sep}", "")}  # it is gone: do not name it
    except BaseException as error:  # the rest of the class must not wait for this one file
        return row | {"message": f"{NOT_GRADED}{type(error).__name__}: {error}"}


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, without what no student made: dot files, and what macOS puts into archives."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in _IGNORED)


def _files(folder: Path) -> Iterator[Path]:
    """All files below a student's folder, without those that ``start --force`` has put away in ``old/``."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in (*_IGNORED, "old"))
        yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))


def _read(student: str, chapter: Chapter, paths: Sequence[Path], folder: Path) -> Submission:
    if not paths:
        return Submission(student, chapter, None, problem=f"no file {chapter.name}.py")
    if len(paths) > 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in paths)
        return Submission(student, chapter, None, problem=f"{NOT_GRADED}{len(paths)} files of this chapter: {names}")
    path = paths[0]
    source, problem = b"", ""
    try:
        if not path.is_file():
            problem = f"{path.name} is not a file"
        elif path.samefile(chapter.path):
            problem = f"{path.name} is a link to the reference itself"
        else:
            with path.open("rb") as file:
                source = file.read(_LARGEST + 1)
            if len(source) > _LARGEST:
                source, problem = b"", f"{path.name} is larger than {_LARGEST} bytes"
    except (OSError, RuntimeError) as error:  # no permission; links that go round
        problem = f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}"
    return Submission(student, chapter, path, source, problem and f"{NOT_GRADED}{problem}")


def _imports(submission: Submission) -> str:
    try:
        return " ".join(additional_modules(submission.source, make_skeleton(submission.chapter)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the message says so
        return ""


def _message(grade: Grade) -> str:
    """What failed, each reason once with the tasks that it is about; without them if it is about all."""
    tasks: dict[str, list[str]] = {}
    for verdict in grade.verdicts:
        if not verdict.passed:
            tasks.setdefault(verdict.message, []).append(verdict.task.task_id)
    if [len(ids) for ids in tasks.values()] == [len(grade.verdicts)]:
        return next(iter(tasks))
    return " | ".join(f"{', '.join(ids)}: {message}" for message, ids in tasks.items())


def _some(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
