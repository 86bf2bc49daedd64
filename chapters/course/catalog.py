"""The chapters and their tasks, read from the chapters' sources. Nothing is imported."""

import ast
import base64
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from chapters.course.parsing import parse


class CourseError(Exception):
    """A mistake in what the tool was asked to do: one line for the user, no traceback."""


FOLDER = Path(__file__).resolve().parent.parent
ROOT = FOLDER.parent

_TITLE = re.compile(r"Chapter (\d\d): (.+)")
_TOTAL = re.compile(r"Tasks \((\d+) points, (.+?)\):")
_TASK = re.compile(r"^- (\d+\.\d+) \((\d+) points?\) (.+?)(?=^- |^$|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Task:
    """One exercise: ``2.1``, its points, and what it is about."""

    task_id: str
    points: int
    summary: str


@dataclass(frozen=True)
class Chapter:
    """One chapter: ``02``, ``ch02_block_table``, and its source at ``path``."""

    number: str
    name: str
    path: Path

    @cached_property
    def source(self) -> str:
        """The reference, or in a released copy the skeleton."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def reference(self) -> str:
        """The source with the solutions. A released copy holds it packed; without that, this is the skeleton.

        Raises ``CourseError`` if what is packed cannot be read.
        """
        if not (self.is_skeleton and self.lent_file.is_file()):
            return self.source
        return unpack(self.lent_file)

    @property
    def lent_file(self) -> Path:
        """Where a released copy holds the reference, packed, for checks that lend parts of it."""
        return self.path.parent / "lent" / f"{self.name}.txt"

    @cached_property
    def docstring(self) -> str:
        """What the chapter says about itself."""
        return ast.get_docstring(parse(self.source)) or ""

    @property
    def title(self) -> str:
        """The chapter's name for people, without the full stop."""
        found = _TITLE.match(self.docstring)
        return found[2].rstrip(".") if found else self.name

    @property
    def effort(self) -> str:
        """How long the tasks take, as the chapter says."""
        found = _TOTAL.search(self.docstring)
        return found[2] if found else ""

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks in the order in which the docstring lists them."""
        return tuple(Task(number, int(points), _plain(text)) for number, points, text in _TASK.findall(self.docstring))

    @property
    def points(self) -> int:
        """The sum of the tasks' points."""
        return sum(task.points for task in self.tasks)

    @property
    def notebook(self) -> str:
        """The notebook that goes with the chapter, from the root."""
        return f"notebooks/{self.name[2:]}.ipynb"

    @property
    def test_file(self) -> Path:
        """The tests of the chapter; the file need not exist."""
        return self.path.parent.parent / "tests" / "chapters" / f"test_{self.name}.py"

    @cached_property
    def is_skeleton(self) -> bool:
        """Whether this is a released copy, in which the chapter is left to the reader."""
        return bool(open_tasks(self.source))


_PACKED = """\
The solutions of {name}, packed. The checks lend parts of them to tasks that build on others. Reading them spoils the tasks.
"""


def pack(chapter: Chapter) -> str:
    """A chapter's reference as a text in which no line of it can be read by chance."""
    packed = base64.encodebytes(zlib.compress(chapter.reference.encode("utf-8"), 9)).decode("ascii")
    return _PACKED.format(name=chapter.name) + packed


def unpack(path: Path) -> str:
    """What :func:`pack` packed. Raises ``CourseError``."""
    try:
        _, _, packed = path.read_text(encoding="ascii").partition("\n")
        return zlib.decompress(base64.b64decode(packed)).decode("utf-8")
    except (OSError, ValueError, zlib.error) as error:
        raise CourseError(
            f"{path} cannot be read ({error}): copy it again, or delete it to check without lending"
        ) from error


def find_chapters(folder: Path = FOLDER) -> list[Chapter]:
    """All chapters in reading order."""
    paths = sorted(folder.glob("ch[0-9][0-9]_*.py"))
    return [Chapter(path.stem[2:4], path.stem, path) for path in paths]


def is_given(chapter: Chapter) -> bool:
    """Whether a chapter came complete with a released copy, in which later ones are left to the reader."""
    return not chapter.is_skeleton and any(other.is_skeleton for other in find_chapters(chapter.path.parent))


def find_chapter(text: str, folder: Path = FOLDER) -> Chapter:
    """The chapter that a user names: ``02``, ``2``, ``ch02`` or ``ch02_block_table``. Raises ``CourseError``."""
    chapters = find_chapters(folder)
    digits = text[2:] if text.startswith("ch") else text
    for chapter in chapters:
        if text == chapter.name or (digits.isascii() and digits.isdigit() and digits.zfill(2) == chapter.number):
            return chapter
    numbers = ", ".join(chapter.number for chapter in chapters)
    raise CourseError(f"there is no chapter {text!r}; the chapters are {numbers}")


def find_tasks(text: str, folder: Path = FOLDER) -> tuple[Chapter, tuple[Task, ...]]:
    """A chapter and those of its tasks that a user names: ``02`` for all, ``2.1`` for one. Raises ``CourseError``."""
    if "." not in text:
        chapter = find_chapter(text, folder)
        return chapter, chapter.tasks
    chapter = find_chapter(text.partition(".")[0], folder)
    tasks = tuple(task for task in chapter.tasks if task.task_id == text)
    if not tasks:
        ids = ", ".join(task.task_id for task in chapter.tasks)
        raise CourseError(f"chapter {chapter.number} has no task {text!r}; its tasks are {ids}")
    return chapter, tasks


def in_order(tasks: Iterable[str]) -> list[str]:
    """Task ids in the order of the course: 2.9 before 2.10."""
    return sorted(tasks, key=lambda task: [int(part) for part in task.split(".")])


def open_tasks(source: str) -> list[str]:
    """The tasks whose stub is still in a source, in order; one for each stub. Empty if the source is not Python."""
    try:
        tree = parse(source)
    except (SyntaxError, ValueError):
        return []
    return sorted(message.split()[1] for node in ast.walk(tree) if (message := stub_message(node)))


def stub_message(node: ast.AST) -> str | None:
    """What a stub says (``Task 2.1 ...``), if the statement is one."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        function, text = node.exc.func, node.exc.args[0]
        if isinstance(function, ast.Name) and function.id == "TodoError" and isinstance(text, ast.Constant):
            return str(text.value) if re.match(r"Task \d+\.\d+ ", str(text.value)) else None
    return None


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "").split())
