"""From a file to a verdict per task: the import rule first, then the chapter's tests, then what they mean.

A task is judged on the file as it is, in which tasks that are not begun are lent by the reference. If it fails, it is judged
again with the functions of all other tasks lent. If it still fails and earlier chapters are the learner's own files, the
reference of those chapters is taken too. The task passes if it passes in one of these forms: a mistake costs one task.
"""

import re
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chapters.course.catalog import Chapter, CourseError, Task, find_chapters, in_order, is_given
from chapters.course.imports_guard import forbidden_imports
from chapters.course.running import AGAIN_TIMEOUT_S, Limits, Processes, Run, run_tests
from chapters.course.skeleton import make_skeleton, untouched_tasks
from chapters.course.workspace import Snapshot, lent_from_the_start, shown


@dataclass(frozen=True)
class Verdict:
    """The result of one task.

    Attributes:
        status: ``passed``, ``failed`` or ``todo``.
        lent: what the reference lent to the tests that decided: tasks such as ``1.1``, or ``chapter 00``.
        answer: of a task that asks for one, the learner's ``answer``, a text, and the ``number``.
        tests: what the plugin wrote about each test of the run that decided.
        blames_lent: whether what failed was raised by lent code, which a learner cannot see.
        alone: whether the functions of all other tasks were lent, so that a failure is this task's own.
    """

    task: Task
    status: str
    message: str = ""
    where: str = ""
    hint: str = ""
    num_tests: int = 0
    num_passed: int = 0
    seconds: float = 0.0
    lent: tuple[str, ...] = ()
    answer: Mapping[str, Any] = field(default_factory=dict)
    tests: tuple[Mapping[str, Any], ...] = ()
    blames_lent: bool = False
    alone: bool = False

    @property
    def passed(self) -> bool:
        """Whether all tests of the task passed."""
        return self.status == "passed"

    @property
    def points(self) -> int:
        """The task's points, or none."""
        return self.task.points if self.passed else 0


@dataclass(frozen=True)
class Grade:
    """What a check found. ``output`` is pytest's, ``own`` the learner's files that stood for earlier chapters."""

    chapter: Chapter
    snapshot: Snapshot
    verdicts: tuple[Verdict, ...]
    seed: int
    own: Mapping[str, Path]
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all tasks that were checked passed."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    @property
    def points(self) -> int:
        """Points reached."""
        return sum(verdict.points for verdict in self.verdicts)

    @property
    def max_points(self) -> int:
        """Points of the tasks that were checked."""
        return sum(verdict.task.points for verdict in self.verdicts)


def describe_lent(verdict: Verdict) -> str:
    """``with 1.1, 1.2 lent``."""
    return f"with {', '.join(verdict.lent)} lent"


def is_own_fault(verdict: Verdict) -> bool:
    """Whether a task fails where all that it needs of other tasks is the reference's: the fault is in this task."""
    return verdict.alone and not verdict.passed and bool(verdict.lent)


def describe_answer(verdict: Verdict) -> str:
    """The learner's text of a task that asks for one, and the number."""
    text, number = verdict.answer.get("answer", ""), verdict.answer.get("number")
    return f"Answer: {text}" if number is None else f"Answer: {number}. {text}"


def check_file(chapter: Chapter, path: Path) -> Snapshot:
    """The file as it is now. Raises ``CourseError`` if there is none, or if it is the reference by another name."""
    if not path.exists() and is_given(chapter):
        raise CourseError(f"chapter {chapter.number} came complete with this copy: there is no file {shown(path)} to check")
    if not path.exists():
        raise CourseError(f"there is no file {shown(path)}: python -m chapters start {chapter.number} makes one")
    if not path.is_file():
        raise CourseError(f"{shown(path)} is not a file")
    if path.samefile(chapter.path):
        raise CourseError(f"{shown(path)} is {shown(chapter.path)} itself: a check is of your own file")
    return Snapshot.take(path)


def grade_file(
    chapter: Chapter,
    tasks: Sequence[Task],
    path: Path,
    *,
    own: Mapping[str, Path] | None = None,
    seed: int = 0,
    limits: Limits | None = None,
    processes: Processes | None = None,
) -> Grade:
    """Grade a learner's file. The result has a verdict for each task, for any content of the file.

    Raises ``CourseError``, and ``StoppedError`` if ``processes`` are stopped meanwhile.
    """
    if not chapter.test_file.is_file():
        raise CourseError(f"chapter {chapter.number} has no tests: {shown(chapter.test_file)} is missing")
    own, limits = own or {}, limits or Limits()
    started = time.monotonic()
    snapshot = check_file(chapter, path)
    verdicts: Sequence[Verdict]
    output = ""
    problem = _unreadable(snapshot, chapter)
    if problem is not None:
        verdicts = [Verdict(task, "failed", *problem) for task in tasks]
    else:
        untouched = untouched_tasks(snapshot.source, chapter)
        begun = [task for task in tasks if task.task_id not in untouched]
        judge = _Judge(chapter, path.absolute(), seed, limits, processes)
        by_id = judge.verdicts(begun, own, untouched.keys())
        failed = [task for task in begun if not by_id[task.task_id].passed]
        if failed and own:
            again = judge.verdicts(failed, {}, untouched.keys())
            names = tuple(f"chapter {other.number}" for other in find_chapters() if other.name in own)
            by_id |= {task_id: replace(verdict, lent=(*names, *verdict.lent)) for task_id, verdict in again.items()}
        verdicts = [by_id.get(task.task_id) or _not_begun(task, untouched[task.task_id]) for task in tasks]
        output = "\n".join(judge.outputs)
        if not _is_still(path, snapshot):
            raise CourseError(f"{shown(path)} was changed while its tests ran: check it again")
    return Grade(chapter, snapshot, tuple(verdicts), seed, own, output, time.monotonic() - started)


def _is_still(path: Path, snapshot: Snapshot) -> bool:
    try:
        return path.read_bytes() == snapshot.source
    except OSError:
        return False


def _unreadable(snapshot: Snapshot, chapter: Chapter) -> tuple[str, str] | None:
    """``(message, where)`` if the file is not Python or has a forbidden import."""
    try:
        violations = forbidden_imports(snapshot.source, make_skeleton(chapter))
    except SyntaxError as error:
        where = f"{snapshot.path.name}:{error.lineno}: {(error.text or '').strip()}"
        return f"the file is not Python: {type(error).__name__}: {error.msg}", where if error.lineno else ""
    except (ValueError, RecursionError, MemoryError) as error:
        return f"the file is not Python: {type(error).__name__}: {error}", ""
    return ("\n".join(violations), "") if violations else None


@dataclass
class _Judge:
    """The runs of one check, which share its time. ``outputs`` is what pytest printed in each."""

    chapter: Chapter
    path: Path
    seed: int
    limits: Limits
    processes: Processes | None
    outputs: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def verdicts(self, tasks: Sequence[Task], own: Mapping[str, Path], untouched: Collection[str]) -> dict[str, Verdict]:
        """Run the tests; if one takes the process down, run those of the tasks that are not settled again, without it."""
        folder = self.chapter.path.parent
        before = [other for other in find_chapters(folder) if other.number < self.chapter.number]
        files = {**{other.name: other.path for other in before if other.is_skeleton}, **own}
        lend = in_order({*untouched, *lent_from_the_start(files, folder)})
        limits = self.limits
        first: dict[str, Verdict] = {}  # on the file as it is
        second: dict[str, Verdict] = {}  # with the other tasks lent
        while missing := [task for task in tasks if not _is_settled(task, first, second)]:
            run = run_tests(
                self.chapter,
                self.path,
                [task.task_id for task in missing],
                own=files,
                lend=lend,
                failed=[task.task_id for task in missing if task.task_id in first],
                seed=self.seed,
                limits=limits,
                seconds_left=max(self.limits.total_s - (time.monotonic() - self._began), 1.0),
                processes=self.processes,
            )
            self.outputs.append(run.output)
            for task in missing:
                settle(task, run, limits, first, second)
            if run.ended_early and (run.guilty is None or not run.loaded or run.status is None):
                break  # it would go the same way again
            if run.stuck and run.guilty in first:
                others = {task.task_id for task in self.chapter.tasks} - {run.guilty, *untouched}
                if all(task_id in first and first[task_id].passed for task_id in others):
                    second.setdefault(run.guilty, first[run.guilty])  # no other task is to blame for the time
                limits = replace(limits, test_s=min(limits.test_s, AGAIN_TIMEOUT_S))
        for task in missing:
            first.setdefault(task.task_id, judge_run(task, run, limits))
        return {task.task_id: better(first[task.task_id], second.get(task.task_id)) for task in tasks}


def _is_settled(task: Task, first: Mapping[str, Verdict], second: Mapping[str, Verdict]) -> bool:
    found = first.get(task.task_id)
    return found is not None and (found.passed or task.task_id in second)


def settle(task: Task, run: Run, limits: Limits, first: dict[str, Verdict], second: dict[str, Verdict]) -> None:
    """Note what a run says about a task in its first form, and if it fails there, in its second."""
    for plan, found in ((run.plan, first), (run.again, second)):
        tests = [test for test, owner in plan.items() if owner == task.task_id]
        is_complete = all(test in run.records for test in tests)
        if task.task_id not in found and (not run.ended_early or (is_complete and run.guilty) or run.running in tests):
            has_run = found is first or run.running in tests or any(test in run.records for test in tests)
            found[task.task_id] = judge_run(task, run, limits, plan) if has_run else first[task.task_id]
        if task.task_id not in found or found[task.task_id].passed:
            return


def better(first: Verdict, second: Verdict | None) -> Verdict:
    """A task's verdict. If both forms fail, the second's message is the better one: it is about this task alone."""
    if first.passed or second is None:
        return first
    is_second_hand = second.blames_lent or _GOES_ON in second.message
    return first if is_second_hand and not second.passed else replace(second, alone=True)


def judge_run(task: Task, run: Run, limits: Limits, plan: Mapping[str, str] | None = None) -> Verdict:
    """What a run of tests says about one task: it passes if it has tests, and all of them ran and passed.

    ``plan``: which tests count, those of the file as it is unless given.
    """
    tests = [test for test, owner in (run.plan if plan is None else plan).items() if owner == task.task_id]
    records = [run.records[test] for test in tests if test in run.records]
    passed = [record for record in records if record["outcome"] == "passed"]
    counts: dict[str, Any] = {
        "num_tests": len(tests),
        "num_passed": len(passed),
        "tests": tuple(records),
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "lent": tuple(in_order({lent for record in records for lent in record.get("lent", ())})),
        "answer": {name: value for record in records for name, value in record.get("answer", {}).items()},
    }
    if tests and len(passed) == len(tests):
        return Verdict(task, "passed", **counts)
    failures = [record for record in records if record["outcome"] not in ("passed", "skipped")]
    if failures:
        return _failure(task, failures[0], counts)
    if run.ended_early:
        return Verdict(task, "failed", _early_end(run, task, limits), **counts)
    if not tests:
        return Verdict(task, "failed", "no tests of this task were found: nothing was checked", **counts)
    skipped = [record for record in records if record["outcome"] == "skipped"]
    reason = f": {skipped[0]['message'].removeprefix('Skipped: ')}" if skipped and skipped[0]["message"] else ""
    return Verdict(task, "failed", f"{len(tests) - len(passed)} of {len(tests)} tests did not run{reason}", **counts)


def _failure(task: Task, record: Mapping[str, Any], counts: Mapping[str, Any]) -> Verdict:
    """The verdict that the first failure of a task stands for."""
    message, where, hint = record["message"], record["where"], record["hint"]
    if record["kind"] != "todo":
        return Verdict(task, "failed", message, where, hint, blames_lent=record["in_lent"], **counts)
    other = re.match(r"Task (\d+\.\d+)", message)
    if other and other[1] != task.task_id:
        return Verdict(task, "todo", f"not done yet: its tests need task {other[1]}, which is not done", where, **counts)
    return _not_begun(task, message, **counts)


def _not_begun(task: Task, stub: str, **counts: Any) -> Verdict:
    """The verdict on a task whose stub is still there; the command that checks it has just been given."""
    return Verdict(task, "todo", stub.partition(" Check:")[0], **counts)


_GOES_ON = "and it goes on when it is stopped: does a loop catch every exception, or asyncio.CancelledError?"


def _early_end(run: Run, task: Task, limits: Limits) -> str:
    """Why the tests of a task have no result although pytest was started."""
    if run.guilty is None:
        return f"the tests could not be run: {_why_not(run.output)}"
    name = run.running.rpartition("::")[2].partition("[")[0]
    ran = f"in the middle of {name}" if run.guilty == task.task_id else f"before this task's tests, in {name}"
    if run.status is None:
        return f"stopped {ran} after {limits.total_s:g} seconds for all tests together: does a loop never end?"
    if run.stuck and (run.guilty == task.task_id or not run.loaded):
        return f"still running after {limits.test_s:g} seconds, {_GOES_ON}"
    if "+++ Timeout +++" in run.output:
        return f"stopped {ran}, which was still running after {limits.test_s:g} seconds: does a loop never end?"
    if run.status is not None and run.status < 0:
        name = signal.Signals(-run.status).name if -run.status in set(signal.Signals) else f"signal {-run.status}"
        reason = "; was there no memory left?" if name == "SIGKILL" else ""
        return f"the process was killed by {name} {ran}{reason}"
    return f"the program ended {ran} (exit status {run.status}): something in the file ends it, such as os._exit or sys.exit"


def _why_not(output: str) -> str:
    """What pytest says when it cannot collect tests: an earlier chapter of the learner's own may fail to be imported."""
    errors = [line[1:].strip() for line in output.splitlines() if line.startswith("E ")]
    places = re.findall(r"^(\S+\.py:\d+): in ", output, re.MULTILINE)
    if errors:
        return f"{places[-1]}: {errors[0]}" if places else errors[0]
    return " | ".join([line for line in output.splitlines() if line.strip(" =!")][-3:])
