"""A course of one chapter with two tasks, whose tests need no torch: what the course tool's own tests judge."""

import textwrap
from pathlib import Path

import pytest

from chapters.course.catalog import Chapter
from chapters.course.grading import Grade, Verdict, grade_file
from chapters.course.running import Limits

REFERENCE = '''\
"""Chapter 00: adding.

Tasks (10 points, about 1 hour):

- 0.1 (4 points) ``add``: a sum.
- 0.2 (6 points) ``mul``: a product.

Know first: nothing.
"""


def add(a, b):
    """Task 0.1: the sum of both."""
    # BEGIN SOLUTION 0.1
    return a + b
    # END SOLUTION


def mul(a, b):
    """Task 0.2: the product of both."""
    # BEGIN SOLUTION 0.2
    return a * b
    # END SOLUTION


def call(function, *arguments):
    """Calls the function that it is given."""
    return function(*arguments)
'''

TESTS = """\
import pytest

CHAPTER = "00"


@pytest.mark.task("0.1", hint="Look at the plus.")
@pytest.mark.parametrize("a", [1, 2])
def test_sums(chapter, seed, a):
    assert chapter.add(a, seed) == a + seed, f"add({a}, {seed}) is {chapter.add(a, seed)}, expected {a + seed}"


@pytest.mark.task("0.1", hint="Look at the minus.")
def test_negative_sums(chapter):
    assert chapter.add(-1, -1) == -2, "add(-1, -1) must be -2"


@pytest.mark.task("0.2", hint="Look at the times.")
def test_products(chapter):
    def no(*arguments):
        raise AssertionError("said by the test")

    assert chapter.mul(2, 3) == 6, "mul(2, 3) must be 6"
    with pytest.raises(TypeError):
        chapter.mul(None, None)
    with pytest.raises(AssertionError, match="said by"):
        chapter.call(no)
"""

LIMITS = Limits(test_s=1.5, total_s=60, memory_gb=0)


@pytest.fixture
def toy(tmp_path: Path) -> Chapter:
    for name, text in (("chapters/ch00_toy.py", REFERENCE), ("tests/chapters/test_ch00_toy.py", TESTS)):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    return Chapter("00", "ch00_toy", tmp_path / "chapters" / "ch00_toy.py")


def with_add(body: str) -> str:
    """The reference with another ``add``."""
    return REFERENCE.replace("    return a + b\n", textwrap.indent(textwrap.dedent(body), "    "))


def graded(toy: Chapter, source: str, *, seed: int = 0, limits: Limits = LIMITS) -> Grade:
    path = toy.path.parent.parent / "work" / "ch00_toy.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return grade_file(toy, toy.tasks, path, seed=seed, limits=limits)


def grade(toy: Chapter, source: str, *, seed: int = 0, limits: Limits = LIMITS) -> dict[str, Verdict]:
    found = graded(toy, source, seed=seed, limits=limits)
    return {verdict.task.task_id: verdict for verdict in found.verdicts}
