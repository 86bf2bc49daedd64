"""What a check says of a failure: a hint stays where it fits, and exceptions that say little are explained."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chapters.course.catalog import Chapter
from chapters.course.commands.check_ import as_gradescope, as_json, print_grade
from chapters.course.diagnoses import diagnose
from chapters.course.failures import explain, hint_for
from chapters.course.grading import Grade, grade_file
from chapters.course.running import Limits, Processes
from chapters.course.submissions import Submission, grade_submission
from chapters.course.workspace import load_file
from tests.support.departures import assert_same
from tests.tools.toy_course import LIMITS, REFERENCE, TESTS, grade, with_add
from tests.tools.toy_course import toy as toy

DOUBLE, FLOAT = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3)
NUMBER: Any = 3


def nothing() -> Any:
    """What a function without ``return`` gives."""


WELL_KNOWN: dict[str, tuple[Callable[[], object], str]] = {
    "product": (lambda: DOUBLE @ FLOAT.T, "different types"),
    "einsum": (lambda: torch.einsum("ab,cb->ac", DOUBLE, FLOAT), "different types"),
    "allclose": (lambda: torch.allclose(DOUBLE, FLOAT), "different types"),
    "index_put": (lambda: DOUBLE.index_put_((torch.tensor([0]),), FLOAT[0]), "different types"),
    "result": (lambda: assert_same(FLOAT + 1e-8, DOUBLE, what="it", axes="ab"), "different types"),
    "index": (lambda: DOUBLE[FLOAT], "whole number"),
    "product shapes": (lambda: DOUBLE @ DOUBLE, "shapes do not fit"),
    "sum shapes": (lambda: DOUBLE + DOUBLE.T, "shapes do not fit"),
    "view": (lambda: DOUBLE.view(4, 2), "shapes do not fit"),
    "expand": (lambda: DOUBLE.expand(2, 5), "shapes do not fit"),
    "einsum shapes": (lambda: torch.einsum("ab,bc->ac", DOUBLE, DOUBLE), "shapes do not fit"),
    "assigned": (
        lambda: DOUBLE.__setitem__(torch.tensor([0, 1]), torch.zeros(5, 3, dtype=torch.float64)),
        "shapes do not fit",
    ),
    "cat": (lambda: torch.cat([DOUBLE, DOUBLE.T]), "shapes do not fit"),
    "iterated": (lambda: list(NUMBER), "A list was expected"),
    "unpacked": (lambda: (lambda a, b: a)(*NUMBER), "A list was expected"),
    "attribute": (lambda: nothing().shape, "without `return`"),
    "subscript": (lambda: nothing()[0], "without `return`"),
    "length": (lambda: len(nothing()), "without `return`"),
    "difference": (lambda: nothing() - 1, "without `return`"),
}


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_a_well_known_exception_is_explained_whatever_the_tests_hint_is(name: str) -> None:
    act, words = WELL_KNOWN[name]
    with pytest.raises(Exception) as caught:
        act()
    assert words in hint_for(caught.value, "the mask hides too much", ()), caught.value


def test_an_assertion_about_a_result_keeps_its_hint() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_same(DOUBLE + 1, DOUBLE, what="the sums", axes="ab")
    assert hint_for(caught.value, "the mask hides too much", ()) == "the mask hides too much"
    assert diagnose(AssertionError("row 3 differs: got None"), ()) is None


def test_a_dtype_is_no_mistake_where_the_numbers_are_wrong() -> None:
    """Chapter 06 computes in float32, as its contract says, and is compared with float64: only rounding is the dtype's."""
    for got in (FLOAT + 1, FLOAT * math.nan, FLOAT.half() + 1):
        with pytest.raises(AssertionError) as caught:
            assert_same(got, DOUBLE, what="the sums", axes="ab", atol=1e-4)
        assert "dtype" not in str(caught.value)
        assert hint_for(caught.value, "the mask hides too much", ()) == "the mask hides too much"
    with pytest.raises(AssertionError, match=r"its dtype is torch\.float16, expected torch\.float64"):
        assert_same(DOUBLE.half() + 0.3333, DOUBLE + 0.3333, what="the sums", axes="ab")


KERNEL = """
def kernel(tl):
    acc = tl.zeros(4, 5)


def helper(call):
    return call()
"""

INTERPRETER = """
class InterpreterError(Exception):
    pass


def zeros(*arguments):
    try:
        raise TypeError("'int' object is not iterable")
    except TypeError as error:
        raise InterpreterError(repr(error)) from error


def run(kernel, tl):
    try:
        kernel(tl)
    except InterpreterError as error:
        raise InterpreterError(repr(error)) from error
"""
"""Triton's interpreter wraps what a kernel raises once for each function, Triton's own included."""


def test_what_triton_raises_in_a_kernel_is_told_with_the_learners_line(tmp_path: Path) -> None:
    """No line of the kernel is in the exception itself, because a function of Triton's raised it."""
    path, other = tmp_path / "mine.py", tmp_path / "interpreter.py"
    path.write_text(KERNEL, encoding="utf-8")
    other.write_text(INTERPRETER, encoding="utf-8")
    triton: Any = load_file(other, "interpreter_of_kernels")
    with pytest.raises(triton.InterpreterError) as caught:
        triton.run(load_file(path, "mine").kernel, triton)
    told = "raised", "TypeError: 'int' object is not iterable", "mine.py:3: acc = tl.zeros(4, 5)"
    assert explain(caught.value, {path}) == told
    assert "a shape is a list" in hint_for(caught.value, "scores are sums over the dims", {path})


def test_a_call_with_other_arguments_is_not_told_about_results(toy: Chapter) -> None:
    verdict = grade(toy, with_add("return add(a)\n"))["0.1"]
    assert "missing 1 required" in verdict.message and "do not fit the function" in verdict.hint


def test_what_a_tests_code_says_to_a_learners_line_is_told_with_the_line(toy: Chapter, tmp_path: Path) -> None:
    """A kernel's guard, say, or a hook: the test's words, and the line of the learner's that led there."""
    path = tmp_path / "mine.py"
    path.write_text(KERNEL, encoding="utf-8")

    def guard() -> None:
        pytest.fail("the kernel reads memory that is in none of its tensors")

    with pytest.raises(pytest.fail.Exception) as caught:
        load_file(path, "mine").helper(guard)
    told = "failed", "the kernel reads memory that is in none of its tensors", "mine.py:7: return call()"
    assert explain(caught.value, {path}) == told


def test_the_hint_is_kept_when_the_learners_line_raises(toy: Chapter) -> None:
    verdict = grade(toy, with_add("return [1, 2, 3][a + 5]\n"))["0.1"]
    assert verdict.message == "IndexError: list index out of range, in add(a=1, b=0)"
    assert verdict.hint == "Look at the plus." and verdict.where.endswith("return [1, 2, 3][a + 5]")


def test_no_hint_stands_beside_what_says_all_itself(toy: Chapter) -> None:
    assert grade(toy, with_add("return a + c\n"))["0.1"].hint == ""
    assert grade(toy, REFERENCE.replace("def add", "def plus"))["0.1"].hint == ""


def test_a_function_that_forgets_to_return_is_named(toy: Chapter) -> None:
    test = "\n\n@pytest.mark.task('0.2')\ndef test_both(chapter):\n    assert chapter.mul(2, 3).bit_length() == 3\n"
    toy.test_file.write_text(TESTS.partition('@pytest.mark.task("0.2"')[0] + test, encoding="utf-8")
    forgets = REFERENCE.replace("def mul(a, b):", "def mul(a, b) -> int:").replace("return a * b", "c = a * b")
    verdict = grade(toy, forgets)["0.2"]
    assert verdict.message == "AttributeError: 'NoneType' object has no attribute 'bit_length'"
    assert verdict.hint.endswith("In your file mul can end without `return`.")


def test_a_key_that_given_code_does_not_find_is_told_with_the_call_that_led_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "class Cache:\n    def __init__(self):\n        self.tables = {}\n\n"
        "    def block_table(self, seq_id):\n        return self.tables[seq_id]\n\n"
        "    def slots(self, seq_id, start):\n        return self.block_table(seq_id + 1)[start]\n",
        encoding="utf-8",
    )
    mine = load_file(path, "mine_with_tables")
    with pytest.raises(KeyError) as caught:
        mine.Cache().slots(6, 0)
    kind, message, where = explain(caught.value, {path})
    assert (kind, message) == ("raised", "KeyError: 7, in block_table(seq_id=7), called by slots")
    assert where == "mine.py:6: return self.tables[seq_id]"


def test_a_test_that_never_ends_takes_its_time_once_and_hides_no_other_task(toy: Chapter) -> None:
    """The loop swallows what stops it: the process is ended, and the other task judged in a new one."""
    swallows = "import time\nwhile True:\n    try:\n        time.sleep(9)\n    except BaseException:\n        pass\n"
    verdicts = grade(toy, with_add(swallows), limits=Limits(1, 60, 0))
    assert verdicts["0.1"].message.startswith("still running after 1 seconds, and it goes on when it is stopped")
    assert verdicts["0.2"].passed


def asking(toy: Chapter) -> Grade:
    """A grade of a file whose task 0.2 is answered with a number and a text."""
    test = (
        "\n\n@pytest.mark.task('0.2')\ndef test_answer(chapter, record_property):\n    number, text = chapter.mul(2, 3)\n"
        "    record_property('answer', text)\n    record_property('number', number)\n    assert number == 6, 'wrong'\n"
    )
    toy.test_file.write_text(TESTS.partition('@pytest.mark.task("0.2"')[0] + test, encoding="utf-8")
    path = toy.path.parent.parent / "mine.py"
    path.write_text(REFERENCE.replace("return a * b", "return a * b, '[bold] = because both are read'"), encoding="utf-8")
    return grade_file(toy, toy.tasks, path, limits=LIMITS)


def test_an_answer_in_words_is_shown_in_every_report(toy: Chapter, capsys: pytest.CaptureFixture[str]) -> None:
    found = asking(toy)
    assert found.passed
    print_grade(found)
    words = "Answer: 6. [bold] = because both are read"
    assert words in " ".join(capsys.readouterr().out.replace("│", " ").split())
    task = json.loads(json.dumps(as_json(found)))["tasks"][1]
    assert (task["answer"], task["number"]) == ("[bold] = because both are read", 6)
    assert words in as_gradescope(found)["tests"][1]["output"]
    submission = Submission("alice", toy, toy.path, found.snapshot.source)
    row = grade_submission(submission, 0, LIMITS, Processes())
    assert row["answers"] == f"0.2 {words}" and row["points"] == 10


def test_an_answer_that_is_no_text_breaks_no_report(toy: Chapter) -> None:
    found = asking(toy)
    path = found.snapshot.path
    path.write_text(REFERENCE.replace("return a * b", "return object(), {1, 2}"), encoding="utf-8")
    verdict = grade_file(toy, toy.tasks, path, limits=LIMITS).verdicts[1]
    assert verdict.message == "wrong" and verdict.answer["answer"] == "{1, 2}"
