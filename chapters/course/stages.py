"""Which module stands for a chapter: the reference where it is complete, the learner's own where it is left to them."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from chapters.course.catalog import FOLDER, Chapter, find_chapter, find_chapters
from chapters.course.loading import OwnChapters
from chapters.course.workspace import own_file, work_folder


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


def load_stage(number: str) -> ModuleType:
    """The module of a chapter, for a notebook.

    The reference where it is complete. In a copy for students, chapters that are left to them are their own files from
    ``work/``, where these exist; otherwise the skeletons, whose tasks raise ``TodoError``.
    """
    chapter = find_chapter(number)
    own = own_chapters(work_folder(), None, all_of_them=False)
    for finder in [finder for finder in sys.meta_path if isinstance(finder, OwnChapters)]:
        if finder.files == {f"chapters.{name}": path for name, path in own.items()}:
            finder.refresh()
            break
        finder.uninstall()
    else:
        if own:
            OwnChapters(own).install()
    return importlib.import_module(f"chapters.{chapter.name}")
