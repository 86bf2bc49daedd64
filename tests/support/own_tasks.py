"""A pytest plugin for judging many solutions at once: each file meets the tests of the task it is about, and no others.

The environment variable ``PAGEBRAIN_OWN_TASKS`` names a JSON file, ``{path: task id, or null for all tasks}``.
"""

import json
import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not asked."""
    tasks = json.loads(Path(os.environ["PAGEBRAIN_OWN_TASKS"]).read_text(encoding="utf-8"))

    def asked(item: pytest.Item) -> bool:
        path = item.callspec.params["chapter"]  # type: ignore[attr-defined]
        [mark] = item.iter_markers("task")
        task: str | None = tasks[str(path)]
        return task is None or task == mark.args[0]

    dropped = [item for item in items if not asked(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if asked(item)]
