"""The learner's folder: where their files are, how files are written, and how one runs in the place of a chapter.

A learner's file is not part of a package. No bytecode of it is cached on disk: Python recognises a changed file by its size
and a time in whole seconds, which an editor and a grader can beat, and a learner's folder should hold the learner's files.
"""

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import CodeType, ModuleType

from chapters.course.catalog import FOLDER, ROOT, Chapter, CourseError, find_chapter, find_chapters, in_order, open_tasks
from chapters.course.lending import NOTES, USED, compose
from chapters.course.skeleton import solution_regions, unfinished_tasks

VARIABLE = "PAGEBRAIN_WORK"


def work_folder(given: str | None = None) -> Path:
    """``--work``, else ``$PAGEBRAIN_WORK``, else ``work/`` in the repository."""
    return Path(given or os.environ.get(VARIABLE) or ROOT / "work").absolute()


def own_file(chapter: Chapter, work: Path) -> Path:
    """Where the learner's file of a chapter is, or would be."""
    return work / f"{chapter.name}.py"


def shown(path: Path) -> str:
    """A path for people: from the repository if it is in there."""
    with contextlib.suppress(ValueError):
        return path.relative_to(ROOT).as_posix()
    return str(path)


def write_file(path: Path, text: str) -> None:
    """Write a whole file or nothing: a full disk leaves what was there before."""
    temporary = write_beside(path, text)
    os.replace(temporary, path)


def write_beside(path: Path, text: str) -> Path:
    """Write a text to a new file in the folder of ``path``, on disk when this returns. Raises ``CourseError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are the owner's alone
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise CourseError(f"could not write {shown(path)}: {error.strerror or error}; nothing was changed") from error
    return Path(name)


@dataclass(frozen=True)
class Snapshot:
    """Which file, and in which state: what a grade is about."""

    path: Path
    source: bytes
    modified: datetime

    @classmethod
    def take(cls, path: Path) -> "Snapshot":
        """Read the file. Raises ``OSError``."""
        return cls(path, path.read_bytes(), datetime.fromtimestamp(path.stat().st_mtime).astimezone())

    @property
    def sha256(self) -> str:
        """The hash of its content."""
        return hashlib.sha256(self.source).hexdigest()

    def __str__(self) -> str:
        return f"{shown(self.path)}, modified {self.modified:%Y-%m-%d %H:%M:%S}, sha256 {self.sha256[:12]}"


class FreshLoader(importlib.machinery.SourceFileLoader):
    """Compiles the source at every load, with the functions of ``tasks`` lent by the reference of ``chapter``."""

    def __init__(self, fullname: str, path: str, chapter: Chapter | None = None, tasks: Collection[str] = ()) -> None:
        super().__init__(fullname, path)
        self._chapter = chapter
        self._tasks = tasks

    def get_code(self, fullname: str) -> CodeType:
        """The code of the file as it is now."""
        source = self.get_data(self.path)
        if self._chapter is not None and self._tasks:
            return compose(source, Path(self.path), self._chapter, self._tasks)
        code: CodeType = self.source_to_code(source, self.path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        """Run the code."""
        vars(module)[NOTES] = USED
        super().exec_module(module)


def load_file(path: Path, name: str, chapter: Chapter | None = None, lent: Collection[str] = ()) -> ModuleType:
    """Run a file as the module ``name``, which stays in ``sys.modules`` unless it fails. Raises what the file raises.

    The functions of the tasks ``lent`` are those of the reference of ``chapter``.
    """
    loader = FreshLoader(name, str(path), chapter, lent)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class OwnChapters(importlib.abc.MetaPathFinder):
    """Makes ``import chapters.ch01_...`` run the learner's file, for the chapters that have one.

    The functions of the tasks ``lent`` are the reference's.
    """

    def __init__(self, files: Mapping[str, Path], lent: Collection[str] = ()) -> None:
        self.files = {f"chapters.{stem}": path for stem, path in files.items()}
        self.lent = frozenset(lent)
        self._loaded: dict[str, bytes] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Where a module is, if it is one of these."""
        file = self.files.get(fullname)
        if file is None:
            return None
        self._loaded[fullname] = file.read_bytes()
        stem = fullname.partition(".")[2]
        chapter = next((chapter for chapter in find_chapters() if chapter.name == stem), None)
        own = {task.task_id for task in chapter.tasks} & self.lent if chapter is not None and self.lent else set()
        return importlib.util.spec_from_file_location(fullname, file, loader=FreshLoader(fullname, str(file), chapter, own))

    def install(self) -> None:
        """Import these files from now on. Chapters that were imported before are forgotten."""
        sys.meta_path.insert(0, self)
        self._forget()

    def uninstall(self) -> None:
        """Forget these chapters, and import what ``chapters/`` holds from now on."""
        sys.meta_path.remove(self)
        self._forget()

    def refresh(self) -> None:
        """Forget all of these chapters if the file of one has changed since it was imported: they import each other."""
        if any(self.files[fullname].read_bytes() != source for fullname, source in self._loaded.items()):
            self._forget()

    def _forget(self) -> None:
        import chapters

        self._loaded.clear()
        for fullname in self.files:
            sys.modules.pop(fullname, None)
            vars(chapters).pop(fullname.rpartition(".")[2], None)


def own_chapters(work: Path, before: Chapter | None, *, all_of_them: bool, folder: Path = FOLDER) -> dict[str, Path]:
    """The learner's files that stand for chapters before ``before``: all, or only where ``chapters/`` holds a skeleton.

    Returns chapter name -> file.
    """
    chosen = {}
    for chapter in find_chapters(folder):
        path = own_file(chapter, work)
        earlier = before is None or chapter.number < before.number
        if earlier and path.is_file() and (all_of_them or chapter.is_skeleton):
            chosen[chapter.name] = path
    return chosen


def lent_from_the_start(files: Mapping[str, Path], folder: Path = FOLDER) -> set[str]:
    """The tasks of these files, by chapter name, that have a stub left and a reference that can stand for them.

    Answers to questions (``answer_N_M``) are left out: no other task calls them.
    """
    tasks = set()
    for chapter in find_chapters(folder):
        if chapter.name in files and open_tasks(chapter.reference) == []:
            answers = {region.task_id for region in solution_regions(chapter) if region.qualname.startswith("answer_")}
            source = files[chapter.name].read_text(encoding="utf-8", errors="replace")
            tasks |= (set(open_tasks(source)) | unfinished_tasks(source, chapter)) - answers
    return tasks


def load_stage(number: str) -> ModuleType:
    """The module of a chapter, for a notebook.

    The reference where it is complete. In a copy for students, chapters that are left to them are their own files from
    ``work/``; functions of tasks that are not done are lent by the reference, and a line that is printed says which.
    """
    chapter = find_chapter(number)
    skeletons = {other.name: other.path for other in find_chapters() if other.is_skeleton}
    own = {**skeletons, **own_chapters(work_folder(), None, all_of_them=False)}
    lent = lent_from_the_start(own)
    for finder in [finder for finder in sys.meta_path if isinstance(finder, OwnChapters)]:
        same_files = finder.files == {f"chapters.{name}": path for name, path in own.items()}
        if same_files and finder.lent == lent:
            finder.refresh()
            break
        finder.uninstall()
    else:
        if own:
            OwnChapters(own, lent).install()
    if said := in_order(task for task in lent if int(task.partition(".")[0]) <= int(chapter.number)):
        print(f"Lent by the reference until you have done them: {', '.join(said)}")
    elif chapter.name in own:
        print(f"Lent by the reference: nothing up to chapter {chapter.number}, all functions are yours")
    return importlib.import_module(f"chapters.{chapter.name}")
