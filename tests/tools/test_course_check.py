"""Whatever is in a learner's file, a check ends with a clear verdict for each task. The toy course needs no torch."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from chapters.course import running
from chapters.course.catalog import ROOT, Chapter, CourseError, find_chapter
from chapters.course.commands.check_ import as_gradescope, as_json, describe_tests, print_grade
from chapters.course.commands.list_ import save_progress, task_states
from chapters.course.grading import grade_file, judge_run
from chapters.course.running import Limits, read_report
from chapters.course.skeleton import make_skeleton, unfinished_tasks, untouched_tasks
from chapters.course.workspace import Snapshot
from tests.tools.toy_course import LIMITS, REFERENCE, TESTS, grade, with_add
from tests.tools.toy_course import toy as toy

MISTAKES = {
    "right": ("return a + b\n", "passed", "", ""),
    "wrong": ("return a - b\n", "failed", "add(-1, -1) must be -2", ""),
    "raises": ("return [][a]\n", "failed", "IndexError: list index out of range", "return [][a]"),
    "endless": ("while True:\n    a = a\n", "failed", "still running after 1.5 seconds", "endless.py:1"),
    "exits": ("raise SystemExit(0)\n", "failed", "SystemExit: the program was ended with status 0", "raise SystemExit(0)"),
    "skips": ("import pytest\npytest.skip('no')\n", "failed", "3 of 3 tests did not run: no", ""),
    "no_memory": ("raise MemoryError\n", "failed", "MemoryError", "raise MemoryError"),
    "own_assertion": ("assert a == 77, 'mine'\n", "failed", "AssertionError: mine", "assert a == 77"),
    "todo_below": (
        "from chapters import TodoError\na = a\nraise TodoError('Task 0.1 (4 points)')\n",
        "todo",
        "Task 0.1",
        "",
    ),
    "wrapped": (
        "try:\n    {}[a]\nexcept KeyError as e:\n    raise ValueError('bad') from e\n",
        "failed",
        "bad",
        "raise Value",
    ),
}


def test_each_kind_of_mistake_has_its_own_words_and_the_line_in_the_learners_file(
    toy: Chapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them in one process, as many wrong solutions are judged."""
    sources = {name: with_add(body) for name, (body, *_) in MISTAKES.items()}
    sources["missing"] = REFERENCE.replace("def add", "def plus")
    sources["no_import"] = REFERENCE + "\nnothing_of_that_name\n"
    sources["exits_at_import"] = REFERENCE + "\nraise SystemExit\n"
    sources["no_python"] = REFERENCE + "\ndef f(:\n"
    command = [sys.executable, "-m", "pytest", *running.PLUGINS, "-q", "-p", "no:cacheprovider", "-s"]
    command += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", str(toy.test_file)]
    command += ["--chapter-report", f"{tmp_path}/report", "--chapter-timeout", "1.5", "--seed", "0"]
    for name, source in sources.items():
        path = tmp_path / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        command += ["--chapter-file", f"00={path}"]
    assert running.run_command(command, tmp_path / "output", 60) == 1, (tmp_path / "output").read_text("utf-8")
    run = read_report(tmp_path / "report")
    assert run.done
    seen = {}
    for name in sources:
        run_of_file = read_report(tmp_path / "report")
        run_of_file.plan = {test: task for test, task in run.plan.items() if re.search(rf"\[{name}(-\d)?\]", test)}
        assert len(run_of_file.plan) == 4
        seen[name] = {task.task_id: judge_run(task, run_of_file, LIMITS) for task in toy.tasks}
    for name, (_, status, message, where) in MISTAKES.items():
        verdict = seen[name]["0.1"]
        assert (verdict.status, verdict.num_tests) == (status, 3), (name, verdict)
        assert message in verdict.message and where in verdict.where, (name, verdict)
        assert not where or verdict.where.startswith(f"{name}.py:")
        assert seen[name]["0.2"].passed, name
    assert seen["wrong"]["0.1"].hint == "Look at the minus." and seen["wrong"]["0.1"].num_passed == 2
    assert seen["missing"]["0.1"].message == "the file defines no add" and seen["missing"]["0.2"].passed
    for name, words in (("no_import", "NameError"), ("exits_at_import", "SystemExit"), ("no_python", "SyntaxError")):
        for verdict in seen[name].values():
            assert verdict.message.startswith("the file cannot be imported: ") and words in verdict.message
            assert verdict.status == "failed" and verdict.where.startswith(f"{name}.py:") and verdict.hint == ""


def test_a_process_that_ends_in_mid_test_costs_its_task_and_no_other(toy: Chapter) -> None:
    verdicts = grade(toy, with_add("import os\nos._exit(0)\n"))
    assert verdicts["0.1"].status == "failed" and "in the middle of test_sums (exit status 0)" in verdicts["0.1"].message
    assert verdicts["0.2"].passed


def test_a_file_that_ends_the_process_when_imported_fails_every_task(toy: Chapter) -> None:
    verdicts = grade(toy, REFERENCE + "\nimport os\nos._exit(5)\n")
    assert all("exit status 5" in verdict.message for verdict in verdicts.values())


def test_a_loop_that_nothing_interrupts_is_stopped_and_so_is_what_it_started(toy: Chapter) -> None:
    child = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    stubborn = child + "while True:\n    try:\n        time.sleep(9)\n    except BaseException:\n        pass\n"
    began = time.monotonic()
    verdicts = grade(toy, with_add(stubborn), limits=Limits(1, 60, 0))
    assert time.monotonic() - began < 25
    assert verdicts["0.1"].message.startswith("still running after 1 seconds, and it goes on when it is stopped")
    assert verdicts["0.2"].passed


def test_all_tests_together_have_a_limit_too(toy: Chapter) -> None:
    verdicts = grade(toy, with_add("import time\ntime.sleep(20)\n"), limits=Limits(19, 3, 0))
    assert "after 3 seconds for all tests together" in verdicts["0.1"].message


def test_a_task_without_tests_does_not_pass(toy: Chapter) -> None:
    toy.test_file.write_text(TESTS.partition('@pytest.mark.task("0.2"')[0], encoding="utf-8")
    verdicts = grade(toy, REFERENCE)
    assert verdicts["0.1"].passed
    assert not verdicts["0.2"].passed and "no tests" in verdicts["0.2"].message


def test_the_seed_reaches_the_tests(toy: Chapter) -> None:
    verdicts = grade(toy, with_add("return a + b if b != 41 else 0\n"), seed=41)
    assert "add(1, 41) is 0, expected 42" in verdicts["0.1"].message


def test_a_test_without_a_task_is_refused(toy: Chapter) -> None:
    toy.test_file.write_text(TESTS.replace('@pytest.mark.task("0.2", hint="Look at the times.")', ""), encoding="utf-8")
    verdicts = grade(toy, REFERENCE)
    for verdict in verdicts.values():
        assert "needs exactly one @pytest.mark.task" in verdict.message


def test_tests_that_cannot_be_imported_fail_every_task_and_say_where(toy: Chapter) -> None:
    toy.test_file.write_text("nothing\n" + TESTS, encoding="utf-8")
    for verdict in grade(toy, REFERENCE).values():
        assert verdict.message.startswith("the tests could not be run: ")
        assert verdict.message.endswith("test_ch00_toy.py:1: NameError: name 'nothing' is not defined")


def test_a_fresh_skeleton_is_told_apart_without_running_anything(toy: Chapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chapters.course.grading.run_tests", None)
    verdicts = grade(toy, make_skeleton(toy))
    assert [verdict.status for verdict in verdicts.values()] == ["todo", "todo"]
    assert verdicts["0.1"].message == (
        "Task 0.1 (4 points), add: the sum of both. Read: notebooks/00_toy.ipynb, 'Exercise 0.1'."
    )


def test_a_stub_with_other_words_is_a_stub_too(toy: Chapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chapters.course.grading.run_tests", None)
    source = make_skeleton(toy, done=["0.2"])
    begin, end = source.index("raise TodoError("), source.index("def mul")
    for other in ("raise TodoError('later')", "raise TodoError", "raise chapters.TodoError()"):
        changed = f"{source[:begin]}{other}\n\n\n{source[end:]}"
        assert untouched_tasks(changed, toy).keys() == unfinished_tasks(changed, toy) == {"0.1"}, other
    assert unfinished_tasks(source[:begin] + "return a + b\n\n\n" + source[end:], toy) == set()


def test_verbose_shows_each_test_once_and_counts_as_the_table_does(toy: Chapter) -> None:
    """A task that fails in both forms, plain and with the other task lent, and a test that prints."""
    path = toy.path.parent.parent / "wrong.py"
    path.write_text(with_add("print('printed', a)\nreturn a - b\n"), encoding="utf-8")
    found = grade_file(toy, toy.tasks, path, seed=3, limits=LIMITS)
    said = describe_tests(found)
    assert found.output.count("test_negative_sums[") > 2, "the test ran in one form only"
    assert [verdict.num_passed for verdict in found.verdicts] == [0, 1]
    assert "Task 0.1: 0 of 3 tests pass" in said and "Task 0.2: 1 of 1 tests pass" in said
    for name in ("test_sums[1]", "test_sums[2]", "test_negative_sums"):
        assert said.count(f"  failed  {name} ") == said.count(f"_ {name} _") == 1
    assert said.count("add(-1, -1) must be -2") == found.verdicts[0].tests[2]["report"].count("add(-1, -1) must be -2")
    assert said.count("printed -1") == 1


def test_verbose_shows_what_pytest_says_if_no_test_explains_a_failure(toy: Chapter) -> None:
    toy.test_file.write_text("nothing\n" + TESTS, encoding="utf-8")
    path = toy.path.parent.parent / "right.py"
    path.write_text(REFERENCE, encoding="utf-8")
    assert "NameError: name 'nothing' is not defined" in describe_tests(grade_file(toy, toy.tasks, path, limits=LIMITS))


def test_a_file_that_is_no_python_or_imports_what_it_must_not_is_never_run(
    toy: Chapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chapters.course.grading.run_tests", None)
    verdict = grade(toy, REFERENCE + "\ndef f(:\n")["0.2"]
    assert "not Python: SyntaxError" in verdict.message and verdict.where.endswith(": def f(:")
    assert "null bytes" in grade(toy, REFERENCE + "\0")["0.1"].message
    verdict = grade(toy, REFERENCE + "\nfrom pagebrain.attention import paged_attention\n")["0.1"]
    assert "line 30: `from pagebrain.attention import paged_attention` is not allowed" in verdict.message


@pytest.mark.parametrize("way", ["same", "symlink", "hard link"])
def test_the_reference_by_another_name_is_not_graded(toy: Chapter, tmp_path: Path, way: str) -> None:
    path = toy.path if way == "same" else tmp_path / "mine.py"
    if way == "symlink":
        path.symlink_to(toy.path)
    elif way == "hard link":
        os.link(toy.path, path)
    with pytest.raises(CourseError, match="itself"):
        grade_file(toy, toy.tasks, path)


def test_a_missing_file_is_an_error_that_says_what_to_do(toy: Chapter, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="python -m chapters start 00"):
        grade_file(toy, toy.tasks, tmp_path / "no.py")


def test_reports_say_which_file_was_graded_and_give_gradescope_what_it_reads(
    toy: Chapter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy.path.parent.parent / "mine.py"
    path.write_text(make_skeleton(toy).replace("raise TodoError(", "return 0  # (", 1), encoding="utf-8")
    path.write_text(REFERENCE + "\nimport importlib  # [bold]\n", encoding="utf-8")
    found = grade_file(toy, toy.tasks, path, seed=7)
    everything = json.loads(json.dumps(as_json(found)))
    assert everything["sha256"] == found.snapshot.sha256 and everything["file"] == str(path) and everything["seed"] == 7
    assert (everything["points"], everything["max_points"], everything["passed"]) == (0, 10, False)
    assert [task["task"] for task in everything["tasks"]] == ["0.1", "0.2"]
    results = json.loads(json.dumps(as_gradescope(found)))
    assert "mine.py, modified " in results["output"] and found.snapshot.sha256[:12] in results["output"]
    assert sum(test["max_score"] for test in results["tests"]) == 10
    for test in results["tests"]:
        assert set(test) == {"number", "name", "score", "max_score", "status", "output", "visibility"}
        assert test["score"] == 0 and test["status"] == "failed" and "importlib" in test["output"]
    print_grade(found)
    assert "0 of 10 points: 0 of 2 tasks pass (seed 7" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_memory_is_limited_beyond_what_the_process_has(tmp_path: Path) -> None:
    code = (
        "from chapters.course.plugin import limit_memory as limit; assert limit(0.2); bytearray(1 << 26); bytearray(1 << 28)"
    )
    status = running.run_command([sys.executable, "-c", code], tmp_path / "output", 30)
    assert status == 1 and "MemoryError" in (tmp_path / "output").read_text("utf-8")


def test_a_graded_process_sees_no_secrets_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_API_TOKEN", "s3cret")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")
    code = "import os; print(sorted(os.environ))"
    running.run_command([sys.executable, "-c", code], tmp_path / "output", 30)
    printed = (tmp_path / "output").read_text("utf-8")
    assert "PATH" in printed and "TOKEN" not in printed and "ADDOPTS" not in printed


def test_a_verdict_is_forgotten_when_an_own_earlier_chapter_changes(tmp_path: Path) -> None:
    chapter = find_chapter("02")
    own, earlier = tmp_path / f"{chapter.name}.py", tmp_path / "ch01_naive_kv_cache.py"
    own.write_text("x = 1\n", encoding="utf-8")
    earlier.write_text("y = 1\n", encoding="utf-8")
    save_progress(tmp_path, chapter, Snapshot.take(own), {"2.1": True}, {"ch01_naive_kv_cache": earlier})
    assert task_states(tmp_path, chapter)["2.1"] == "passed"
    earlier.write_text("y = 2\n", encoding="utf-8")
    assert task_states(tmp_path, chapter)["2.1"] == "not checked"
