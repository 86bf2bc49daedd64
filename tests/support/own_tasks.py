"""A pytest plugin for judging many solutions at once: each file meets the tests of the task it is about, and no others.

The environment variable ``PAGEBRAIN_OWN_TASKS`` names a JSON file, ``{path: task id, or null for all tasks}``.
"""

import json
import os
from collections.abc import Generator
from functools import cache
from pathlib import Path

import pytest

from chapters.course.plugin import _FILES as FILES

ENDLESS_S = 5
"""A test of one task's file is stopped after this time; some wrong solutions never end."""


@cache
def tasks() -> dict[str, str | None]:
    """Path -> task id, or ``None`` for all tasks."""
    found: dict[str, str | None] = json.loads(Path(os.environ["PAGEBRAIN_OWN_TASKS"]).read_text(encoding="utf-8"))
    return found


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Generator[None]:
    """Make no test that is not asked for: a chapter has dozens of files, and most tests are about another task."""
    (mark,) = metafunc.definition.iter_markers("task")
    files, number = metafunc.config.stash[FILES], metafunc.module.CHAPTER
    everything = files[number]
    files[number] = [path for path in everything if tasks()[str(path)] in (None, mark.args[0])]
    try:
        return (yield)
    finally:
        files[number] = everything


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what no file is asked, and let what is asked of one task's file end early."""
    files = [getattr(item, "callspec", None) for item in items]
    asked = [(item, spec.params["chapter"].path) for item, spec in zip(items, files) if spec and "chapter" in spec.params]
    for item, path in asked:
        if tasks()[str(path)] is not None:
            item.add_marker(pytest.mark.timeout(ENDLESS_S), append=False)
    items[:] = [item for item, _ in asked]
