"""What students hand in is graded, whatever it is and whatever happens meanwhile."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chapters.course.catalog import FOLDER, ROOT, Chapter, CourseError, Task, find_chapter
from chapters.course.cli import main
from chapters.course.commands.grade_ import Table, plain
from chapters.course.grading import Grade, Verdict
from chapters.course.running import Limits, Processes, Run, StoppedError, run_command
from chapters.course.submissions import find_submissions, grade_submission
from chapters.course.workspace import Snapshot

REFERENCE = FOLDER / "ch00_baseline.py"
NAME = REFERENCE.name
SOURCE = REFERENCE.read_text("utf-8")


@pytest.fixture
def handed_in(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


def hand_in(folder: Path, *places: str, source: str = SOURCE) -> None:
    for place in places:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(source, encoding="utf-8")


def rows_of(table: Path) -> dict[str, dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["student"] for row in rows}) == len(rows)
    return {row["student"]: row for row in rows}


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that were graded, in order; all of them pass, and none is run."""
    sources: list[bytes] = []

    def all_pass(chapter: Chapter, tasks: tuple[Task, ...], path: Path, **settings: Any) -> Grade:
        snapshot = Snapshot.take(path)
        sources.append(snapshot.source)
        return Grade(chapter, snapshot, tuple(Verdict(task, "passed") for task in tasks), 0, {}, "", 0.0)

    monkeypatch.setattr("chapters.course.submissions.grade_file", all_pass)
    return sources


def with_verdicts(monkeypatch: pytest.MonkeyPatch, verdicts: Callable[[Path], list[Verdict]]) -> None:
    def judge(chapter: Chapter, tasks: tuple[Task, ...], path: Path, **settings: Any) -> Grade:
        return Grade(chapter, Snapshot.take(path), tuple(verdicts(path)), 0, {}, "", 0.0)

    monkeypatch.setattr("chapters.course.submissions.grade_file", judge)


def test_one_bad_file_does_not_stop_the_grading_of_the_others(
    handed_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hand_in(handed_in, f"alice/{NAME}", f"two/a/{NAME}", f"two/b/{NAME}", f"both/{NAME}", f"both_{NAME}")
    (handed_in / "bob").mkdir()
    (handed_in / "eve").mkdir()
    (handed_in / "eve" / NAME).symlink_to(REFERENCE)
    hand_in(handed_in, f"=carol_{NAME}", source="def f(:")
    (handed_in / f"dave_{NAME}").write_bytes(b"\xff\xfe\x00")
    (handed_in / f"zoe_{NAME}").write_bytes(b"#" * 2_000_000)
    strange = handed_in / os.fsdecode(b"fr\xffd")
    strange.mkdir()
    raises = SOURCE.replace("return int(logits.argmax())", "raise ValueError('=\\ud800\\x1b[31m')")
    (strange / NAME).write_text(raises, encoding="utf-8")
    table = tmp_path / "grades.csv"
    arguments = ["grade", str(handed_in), "--csv", str(table), "--chapter", "00", "--seed", "3", "--jobs", "2"]
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert "not a sandbox" in said.err and "5 files graded with seed 3, 4 not graded" in said.out and "\x1b" not in said.out
    rows = rows_of(table)
    assert {name: row["points"] for name, row in rows.items() if row["points"] != "0"} == {"alice": "12", "fr\\udcffd": "8"}
    assert (rows["alice"]["0.1"], rows["alice"]["0.2"], rows["alice"]["message"]) == ("4", "6", "")
    assert len(rows["alice"]["sha256"]) == 64 and {row["seed"] for row in rows.values()} == {"3"}
    words = {
        "bob": "no file ch00_baseline.py",
        "'=carol": "the file is not Python: SyntaxError",  # once, though it is about both tasks
        "dave": "the file is not Python",
        "eve": "not graded: ch00_baseline.py is a link to the reference itself",
        "two": f"not graded: 2 files of this chapter: two/a/{NAME}, two/b/{NAME}",
        "both": f"not graded: 2 files of this chapter: both/{NAME}, both_{NAME}",
        "zoe": f"not graded: zoe_{NAME} is larger than 1048576 bytes",
        "fr\\udcffd": "ValueError: =\\ud800\\x1b[31m",
    }
    assert set(words) == set(rows) - {"alice"}
    for name, message in words.items():
        assert rows[name]["message"].count(message) == 1, (name, rows[name])
        assert "chapters start" not in rows[name]["message"]
    assert main(arguments) == 2
    assert "is there already: --resume goes on with it" in capsys.readouterr().err
    assert rows_of(table) == rows


def test_whatever_goes_wrong_with_a_file_becomes_its_row(handed_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_in(handed_in, f"alice/{NAME}")
    [submission] = find_submissions(handed_in, None).submissions
    for error, message in (
        (SystemExit(3), "not graded: SystemExit: 3"),
        (RecursionError("deep"), "not graded: RecursionError: deep"),
        (CourseError("was changed"), "not graded: was changed"),
    ):

        def fail(path: Path, error: BaseException = error) -> list[Verdict]:
            raise error

        with_verdicts(monkeypatch, fail)
        row = grade_submission(submission, 0, Limits(), Processes())
        assert (row["message"], row["points"], row["sha256"]) == (message, 0, submission.sha256)


def test_a_file_that_changes_itself_is_not_graded_and_no_temporary_folder_is_named(
    handed_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_tests(chapter: Chapter, path: Path, tasks: list[str], **settings: Any) -> Run:
        path.unlink()
        return Run({task: {"outcome": "passed", "seconds": 0} for task in tasks}, {task: task for task in tasks}, done=True)

    monkeypatch.setattr("chapters.course.grading.run_tests", run_tests)
    hand_in(handed_in, f"alice/{NAME}")
    [submission] = find_submissions(handed_in, None).submissions
    row = grade_submission(submission, 0, Limits(), Processes())
    assert row["message"] == f"not graded: {NAME} was changed while its tests ran: check it again"


def test_one_file_cannot_change_another_before_its_turn(
    handed_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_in(handed_in, f"alice/{NAME}", f"bob/{NAME}")
    seen = []

    def harm(path: Path) -> list[Verdict]:
        seen.append(path.read_text("utf-8"))
        hand_in(handed_in, f"bob/{NAME}", source="nothing")
        return []

    with_verdicts(monkeypatch, harm)
    assert main(["grade", str(handed_in), "--csv", str(tmp_path / "grades.csv")]) == 0
    assert seen == [SOURCE, SOURCE]
    rows = rows_of(tmp_path / "grades.csv")
    assert rows["alice"]["sha256"] == rows["bob"]["sha256"] and rows["bob"]["file"] == str(handed_in / "bob" / NAME)


def test_resume_keeps_the_rows_of_unchanged_files_and_grades_the_rest(
    handed_in: Path, tmp_path: Path, graded: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "grades.csv"
    arguments = ["grade", str(handed_in), "--csv", str(table), "--seed", "5", "--resume"]
    hand_in(handed_in, f"alice/{NAME}", f"bob/{NAME}", "alice/ch01_naive_kv_cache.py", f"gone/{NAME}", f"=x/{NAME}")
    assert main(arguments) == 0 and len(graded) == 5
    first = table.read_text("utf-8")
    table.write_text(first + "cut,00,5,1", encoding="utf-8")
    hand_in(handed_in, f"bob/{NAME}", f"dan/{NAME}", source=SOURCE + "\n")
    shutil.rmtree(handed_in / "gone")
    graded.clear()
    assert main([*arguments, "--chapter", "00"]) == 0
    assert graded == [(SOURCE + "\n").encode()] * 2
    assert f"kept from {table}: 4 rows" in capsys.readouterr().out
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["student"], row["chapter"]) for row in rows) == [
        ("'=x", "00"), ("alice", "00"), ("alice", "01"), ("bob", "00"), ("dan", "00"), ("gone", "00"),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["grades.csv"]


def test_resume_grades_again_what_could_not_be_graded_or_was_not_there(
    handed_in: Path, tmp_path: Path, graded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "grades.csv"
    arguments = ["grade", str(handed_in), "--csv", str(table), "--resume", "--chapter", "00"]
    (handed_in / "bob").mkdir()
    hand_in(handed_in, f"alice/{NAME}")
    with monkeypatch.context() as patch:
        with_verdicts(patch, lambda path: [][1])
        assert main(arguments) == 1
    assert rows_of(table)["alice"]["message"].startswith("not graded: IndexError")
    hand_in(handed_in, f"bob/{NAME}")
    assert main(arguments) == 0 and len(graded) == 2
    assert [row["points"] for row in rows_of(table).values()] == ["12", "12"]


def test_resume_refuses_another_seed_and_what_is_no_table(
    handed_in: Path, tmp_path: Path, graded: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hand_in(handed_in, f"alice/{NAME}")
    table = tmp_path / "grades.csv"
    arguments = ["grade", str(handed_in), "--resume"]
    table.touch()
    assert main([*arguments, "--csv", str(table), "--seed", "5"]) == 0
    before = table.read_text("utf-8")
    capsys.readouterr()
    assert main([*arguments, "--csv", str(table)]) == 2
    assert "--seed 5, not 0" in capsys.readouterr().err and table.read_text("utf-8") == before
    assert main(arguments) == 2
    assert "--resume needs --csv FILE" in capsys.readouterr().err
    table.write_text("name,points\nalice,3\n", encoding="utf-8")
    assert main([*arguments, "--csv", str(table)]) == 2
    assert "has not the columns" in capsys.readouterr().err


def test_ctrl_c_ends_what_runs_and_keeps_what_was_done(
    handed_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hand_in(handed_in, f"alice/{NAME}", f"bob/{NAME}", f"carol/{NAME}", f"dan/{NAME}")
    turns = []
    statuses = []

    def judge(chapter: Chapter, tasks: tuple[Task, ...], path: Path, *, processes: Processes, **settings: Any) -> Grade:
        turns.append(path)
        if len(turns) > 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            command = [sys.executable, "-c", "import time; time.sleep(60)"]
            statuses.append(run_command(command, path.with_name("output"), 60, processes))
        return Grade(chapter, Snapshot.take(path), (), 0, {}, "", 0.0)

    monkeypatch.setattr("chapters.course.submissions.grade_file", judge)
    began = time.monotonic()
    assert main(["grade", str(handed_in), "--csv", str(tmp_path / "grades.csv")]) == 130
    assert time.monotonic() - began < 20
    assert len(turns) == 2 and statuses == []  # a process that was stopped has no result, and none starts after it
    assert list(rows_of(tmp_path / "grades.csv")) == ["alice"]
    assert "interrupted: 1 of 4 files were graded; --resume goes on" in capsys.readouterr().err


def test_a_second_ctrl_c_ends_the_program_at_once() -> None:
    code = """
import os, signal, time
from chapters.course.commands.grade_ import _stopped_by_signals
from chapters.course.running import Processes
with _stopped_by_signals(Processes()) as received:
    for _ in range(2):  # one signal that comes twice
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    assert received == [signal.SIGINT]
    time.sleep(0.4)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT, done.stderr


def test_after_a_stop_no_process_starts() -> None:
    processes = Processes()
    processes.stop()
    with pytest.raises(StoppedError):
        processes.start([sys.executable])


def test_a_reason_that_is_the_same_for_several_tasks_is_given_once(handed_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_in(handed_in, f"alice/{NAME}")
    [submission] = find_submissions(handed_in, None).submissions
    first, second, _ = find_chapter("00").tasks
    cases = {
        ("same", "same"): "same",
        ("one", "two"): "0.1: one | 0.2: two",
        ("", "two"): "0.2: two",
    }
    for messages, expected in cases.items():
        verdicts = [
            Verdict(task, "failed" if message else "passed", message)
            for task, message in zip((first, second), messages, strict=True)
        ]
        with monkeypatch.context() as patch:
            with_verdicts(patch, lambda path: verdicts)  # noqa: B023  (it is called in this turn of the loop)
            assert grade_submission(submission, 0, Limits(), Processes())["message"] == expected


def test_modules_beyond_the_skeletons_have_a_column(handed_in: Path, graded: list[bytes]) -> None:
    hand_in(handed_in, f"alice/{NAME}")
    hand_in(handed_in, f"bob/{NAME}", source=SOURCE + "\nimport sys, inspect\nfrom pytest import hookimpl\n")
    found = find_submissions(handed_in, None).submissions
    assert [grade_submission(one, 0, Limits(), Processes())["imports"] for one in found] == ["", "inspect pytest sys"]


def test_without_a_chapter_what_is_there_is_graded(tmp_path: Path) -> None:
    folder = tmp_path / "old" / "in"  # that name means something inside a student's folder only
    hand_in(folder, "alice/ch02_block_table.py", "alice/old/ch02_block_table.py", f"bob_smith_{NAME}", f"old/{NAME}")
    found = find_submissions(folder, None)
    assert [(one.student, one.chapter.number) for one in found.submissions] == [
        ("bob_smith", "00"), ("old", "00"), ("alice", "02"),
    ]  # fmt: skip
    assert found.unknown == []


def test_entries_that_are_not_understood_are_listed(
    handed_in: Path, graded: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hand_in(
        handed_in, f"alice/{NAME}", "alice/ch02_block_table-1.py", "alice/deep/CH03_PAGED_ATTENTION.PY", "alice/deep/x.py"
    )
    hand_in(handed_in, "bob_ch02_block_table-2.py", f"_x/{NAME}", "readme.txt", NAME, f"_{NAME}")
    hand_in(handed_in, f"__MACOSX/alice/._{NAME}", ".DS_Store", "alice/.DS_Store", f"alice/__MACOSX/{NAME}")
    (handed_in / "nothing").mkdir()
    assert main(["grade", str(handed_in), "--csv"]) == 0
    said = capsys.readouterr().err
    assert len(graded) == 1
    listed = said.partition("8 entries were not understood: ")[2].partition("\n")[0].split(", ")
    assert sorted(listed) == sorted(
        [
            *("alice/ch02_block_table-1.py", "alice/deep/CH03_PAGED_ATTENTION.PY", "bob_ch02_block_table-2.py"),
            *("_x/", "readme.txt", NAME, f"_{NAME}", "nothing/"),
        ]
    )
    (handed_in / "empty").mkdir()
    with pytest.raises(CourseError, match="holds no files"):
        find_submissions(handed_in / "empty", None)
    hand_in(handed_in, "empty/block_table.py")
    with pytest.raises(CourseError, match=r"holds no files .*; it holds block_table.py$"):
        find_submissions(handed_in / "empty", None)


def test_the_sum_of_several_tables_is_as_the_pages_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "instructors.md").read_text("utf-8")
    [code] = re.findall(r"^```python\n(import collections.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    for number, points in (("00", 10), ("02", 24)):
        with (tmp_path / f"grades-{number}.csv").open("w", encoding="utf-8", newline="") as file:
            table = Table(file, [find_chapter(number)])
            table.add({"student": "Smith, A", "chapter": number, "points": points})
            table.add({"student": "bob", "chapter": number, "points": 1})
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == "34\tSmith, A\n2\tbob\n"


def test_a_text_of_a_student_is_one_harmless_line() -> None:
    assert plain("=1+1\nx\r\x00\udcff ü") == "'=1+1 x \\x00\\udcff ü"
    assert len(plain("x" * 1_000_000)) < 10_000 and plain(plain("@ \x1b")) == plain("@ \x1b")
