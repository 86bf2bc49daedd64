"""The course tool, ``python -m chapters``: it makes skeletons from the chapters, and checks learners' files by tests.

- :mod:`~chapters.course.catalog` reads chapters and tasks from the sources. :mod:`~chapters.course.skeleton` cuts the
  solutions out.
- :mod:`~chapters.course.workspace` holds the learner's files, and imports them in place of chapters.
- A check: :mod:`~chapters.course.grading` applies :mod:`~chapters.course.imports_guard`, then starts pytest through
  :mod:`~chapters.course.running`. In that process :mod:`~chapters.course.plugin` writes down each test's result, with the
  words of :mod:`~chapters.course.failures` and :mod:`~chapters.course.diagnoses`. What a task needs of others is lent by
  :mod:`~chapters.course.lending`. :mod:`~chapters.course.submissions` does this for a class.
- :mod:`~chapters.course.recorded_runs` generates with a chapter or with the engine, for ``try`` and ``ladder``;
  :mod:`~chapters.course.visiting_clients` has clients come and go, for ``try`` of chapter 05.
- :mod:`~chapters.course.commands` has a module for each command.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["load_stage"]


def load_stage(number: str) -> "ModuleType":
    """The module of a chapter, for a notebook: see :func:`chapters.course.workspace.load_stage`."""
    from chapters.course.workspace import load_stage as load

    return load(number)
