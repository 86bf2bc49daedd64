"""Several threads read students' files at the same time."""

import ast
import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from chapters.course.catalog import FOLDER
from chapters.course.parsing import parse


@pytest.fixture
def threads_take_turns() -> Iterator[None]:
    """Let another thread run at every collection of garbage, of which there are many while a tree is made."""

    def let_others_run(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    before = gc.get_threshold()
    gc.set_threshold(20)
    gc.callbacks.append(let_others_run)
    yield
    gc.callbacks.remove(let_others_run)
    gc.set_threshold(*before)


@pytest.mark.usefixtures("threads_take_turns")
def test_two_files_can_be_read_at_the_same_time() -> None:
    source = "\n".join(f"def f{i}(a, b): return [a + b * {i} for a in range(b) if a]" for i in range(40))
    expected = ast.dump(ast.parse(source))
    with ThreadPoolExecutor(4) as pool:
        assert {ast.dump(tree) for tree in pool.map(parse, [source] * 24)} == {expected}


def test_all_of_the_course_reads_sources_in_this_way() -> None:
    files = {path.name for path in (FOLDER / "course").rglob("*.py") if "ast.parse(" in path.read_text("utf-8")}
    assert files == {"parsing.py"}
