"""The course tool, ``python -m chapters``: skeletons are cut from the chapters, and learners' files are checked by tests."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["load_stage"]


def load_stage(number: str) -> "ModuleType":
    """The module of a chapter, for a notebook: see :func:`chapters.course.stages.load_stage`."""
    from chapters.course.stages import load_stage as load

    return load(number)
