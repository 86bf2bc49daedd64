"""``python -m chapters check``: grades one file, and shows the grade as a table, as JSON, or for Gradescope."""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chapters.course.catalog import Chapter, CourseError, Task, find_chapters, find_tasks
from chapters.course.cli import NOT_PASSED, add_work_argument
from chapters.course.commands.list_ import save_progress
from chapters.course.grading import Grade, Verdict, check_file, describe_answer, describe_lent, grade_file, is_own_fault
from chapters.course.running import Limits
from chapters.course.workspace import Snapshot, own_chapters, own_file, shown, work_folder, write_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``check``."""
    parser.add_argument("targets", nargs="+", metavar="CHAPTER|TASK", help="such as 02, or 2.1; tasks of one chapter")
    parser.add_argument("--file", metavar="PATH", help="check this file (default: the chapter's file in work/)")
    parser.add_argument("--mine", action="store_true", help="import earlier chapters from your files, where you have them")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is random in the tests (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--gradescope", metavar="FILE", help="also write Gradescope's results.json")
    parser.add_argument("-v", "--verbose", action="store_true", help="also show each test, and the tracebacks")
    add_limit_arguments(parser)
    add_work_argument(parser)


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """``--test-timeout``, ``--total-timeout`` and ``--memory``."""
    limits = Limits()
    parser.add_argument(
        "--test-timeout", type=float, default=limits.test_s, metavar="S", help=f"seconds for one test ({limits.test_s:g})"
    )
    parser.add_argument(
        "--total-timeout", type=float, default=limits.total_s, metavar="S", help=f"seconds for a file ({limits.total_s:g})"
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=limits.memory_gb,
        metavar="GB",
        help=f"memory beyond what Python and torch take themselves; 0 for no limit; Linux only ({limits.memory_gb:g})",
    )


def limits_of(args: argparse.Namespace) -> Limits:
    """What the options say. Raises ``CourseError``."""
    if min(args.test_timeout, args.total_timeout) <= 0 or args.memory < 0:
        raise CourseError("--test-timeout and --total-timeout must be above 0, --memory at least 0")
    return Limits(args.test_timeout, args.total_timeout, args.memory)


def run(args: argparse.Namespace) -> int:
    """Check and report. The exit status is 0 only if every chosen task passed."""
    chapter, tasks = _chosen(args.targets)
    limits = limits_of(args)
    work = work_folder(args.work)
    path = Path(args.file).absolute() if args.file else own_file(chapter, work)
    own = own_chapters(work, chapter, all_of_them=args.mine)
    snapshot = check_file(chapter, path)
    if not args.json:
        print_header(chapter, snapshot, own, mine=args.mine)
    with Console(stderr=True).status("running the tests"):  # seen in terminals only
        grade = grade_file(chapter, tasks, path, own=own, seed=args.seed, limits=limits)
    if args.verbose:
        print(describe_tests(grade), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(as_json(grade), indent=2))
    else:
        print_grade(grade)
    if args.gradescope:
        write_file(Path(args.gradescope).absolute(), json.dumps(as_gradescope(grade), indent=2) + "\n")
    if path == own_file(chapter, work) and args.seed == 0:
        passed = {verdict.task.task_id: verdict.passed for verdict in grade.verdicts}
        save_progress(work, chapter, grade.snapshot, passed, own)
    return 0 if grade.passed else NOT_PASSED


def _chosen(targets: Sequence[str]) -> tuple[Chapter, Sequence[Task]]:
    """The chapter and the tasks, in its order, that the targets name."""
    found = [find_tasks(target) for target in targets]
    chapter = found[0][0]
    if any(other != chapter for other, _ in found):
        raise CourseError("one chapter at a time: a check is of one file")
    chosen = {task for _, tasks in found for task in tasks}
    if not chosen:
        raise CourseError(f"chapter {chapter.number} has no tasks")
    return chapter, [task for task in chapter.tasks if task in chosen]


_RESULTS = {"passed": ("passed", "green"), "failed": ("failed", "red"), "todo": ("not done yet", "yellow")}


def print_header(chapter: Chapter, snapshot: Snapshot, own: Mapping[str, Path], *, mine: bool = False) -> None:
    """Say what is about to be checked; ``mine``: earlier chapters were to be the learner's own."""
    console = Console(highlight=False)
    console.print(Text(f"Chapter {chapter.number}: {chapter.title}", style="bold"))
    console.print(Text(f"Checking {snapshot}"), soft_wrap=True)
    if text := _earlier(chapter, own, mine=mine):
        console.print(Text(text), soft_wrap=True)


_LENT = "Lent: the reference's functions stood for yours where those are not done, or where a task does not pass with them."


def print_grade(grade: Grade) -> None:
    """The table of tasks and points, with what each failure means."""
    table = Table(show_lines=True)
    table.add_column("Task", no_wrap=True)
    table.add_column("Points", justify="right", no_wrap=True)
    table.add_column("Result", no_wrap=True)
    table.add_column("What it means", overflow="fold")
    for verdict in grade.verdicts:
        word, style = _RESULTS[verdict.status]
        points = f"{verdict.points}/{verdict.task.points}"
        table.add_row(verdict.task.task_id, points, Text(word, style=style), _meaning(verdict))
    console = Console(highlight=False)
    console.print(table)
    console.print(Text(_total(grade)))
    if any(verdict.lent and not is_own_fault(verdict) for verdict in grade.verdicts):
        console.print(Text(_LENT, style="dim"), soft_wrap=True)


def describe_tests(grade: Grade) -> str:
    """Each test of the runs that decided, and of those that failed the traceback and what they printed.

    If a task failed without a test that did, all that pytest printed.
    """
    lines = []
    for verdict in grade.verdicts:
        if verdict.tests:
            lines.append(f"Task {verdict.task.task_id}: {verdict.num_passed} of {verdict.num_tests} tests pass")
        for record in verdict.tests:
            lines.append(f"  {record['outcome']:7} {_test_name(record):90} {record['seconds']:6.2f} s")
        for record in [record for record in verdict.tests if record.get("report")]:
            lines += ["", f"{f' {_test_name(record)} ':_^100}", "", record["report"]]
        lines += [""] if verdict.tests else []
    unexplained = [
        verdict
        for verdict in grade.verdicts
        if verdict.status == "failed" and not any(record.get("report") for record in verdict.tests)
    ]
    return "\n".join([*lines, *([grade.output] if unexplained else [])])


def _test_name(record: Mapping[str, Any]) -> str:
    """A test's name without the file that it judges: ``test_sums[1]``."""
    name: str = record["nodeid"].rpartition("::")[2]
    return re.sub(rf"-?\b{re.escape(Path(record['file']).stem)}(-lent)?\b-?", "", name).replace("[]", "")


def as_json(grade: Grade) -> dict[str, Any]:
    """Everything that the table says, and a little more."""
    return {
        "chapter": grade.chapter.number,
        "file": str(grade.snapshot.path),
        "modified": grade.snapshot.modified.isoformat(timespec="seconds"),
        "sha256": grade.snapshot.sha256,
        "earlier_chapters": {name: str(path) for name, path in grade.own.items()},
        "seed": grade.seed,
        "passed": grade.passed,
        "points": grade.points,
        "max_points": grade.max_points,
        "seconds": round(grade.seconds, 3),
        "tasks": [
            {
                "task": verdict.task.task_id,
                "summary": verdict.task.summary,
                "status": verdict.status,
                "points": verdict.points,
                "max_points": verdict.task.points,
                "message": verdict.message,
                "where": verdict.where,
                "hint": verdict.hint,
                "lent": list(verdict.lent),
                **verdict.answer,
                "tests": verdict.num_tests,
                "tests_passed": verdict.num_passed,
                "seconds": verdict.seconds,
            }
            for verdict in grade.verdicts
        ],
    }


def as_gradescope(grade: Grade) -> dict[str, Any]:
    """What Gradescope reads from ``/autograder/results/results.json``.

    The format: https://gradescope-autograders.readthedocs.io/en/latest/specs/
    """
    return {
        "execution_time": round(grade.seconds, 3),
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "output": f"Chapter {grade.chapter.number}: {grade.chapter.title}\nChecked {grade.snapshot}\n{_total(grade)}",
        "tests": [
            {
                "number": verdict.task.task_id,
                "name": verdict.task.summary,
                "score": verdict.points,
                "max_score": verdict.task.points,
                "status": "passed" if verdict.passed else "failed",
                "output": _meaning(verdict).plain,
                "visibility": "visible",
            }
            for verdict in grade.verdicts
        ],
    }


def _total(grade: Grade) -> str:
    passed = sum(verdict.passed for verdict in grade.verdicts)
    return (
        f"{grade.points} of {grade.max_points} points: {passed} of {len(grade.verdicts)} tasks pass "
        f"(seed {grade.seed}, {grade.seconds:.1f} s)"
    )


def _meaning(verdict: Verdict) -> Text:
    """What is to be said of a task: the first failure's message, the line it came from, what it usually means."""
    if verdict.passed:
        parts = [Text(verdict.task.summary, style="dim")]
    else:
        parts = [Text(verdict.message)]
    if verdict.where and verdict.status != "todo":
        parts.append(Text(f"in your file, {verdict.where}"))
    if verdict.hint:
        parts.append(Text(f"Hint: {verdict.hint}", style="italic"))
    if verdict.status == "failed" and verdict.num_tests > 1:
        parts.append(Text(f"{verdict.num_passed} of {verdict.num_tests} tests of this task pass", style="dim"))
    if is_own_fault(verdict):
        parts.append(Text(f"judged with the reference's {', '.join(verdict.lent)}: the fault is in this task", style="dim"))
    elif verdict.lent:
        parts.append(Text(describe_lent(verdict), style="dim"))
    if verdict.answer:
        parts.append(Text(describe_answer(verdict), style="italic"))
    return Text("\n").join(parts)


def _earlier(chapter: Chapter, own: Mapping[str, Path], *, mine: bool) -> str:
    """Whose earlier chapters a check uses; empty if there are none."""
    earlier = [other for other in find_chapters() if other.number < chapter.number]
    reference = [other.number for other in earlier if other.name not in own and not other.is_skeleton]
    undone = [other.number for other in earlier if other.name not in own and other.is_skeleton]
    parts = [f"yours for {', '.join(shown(path) for path in own.values())}"] if own else []
    parts += ["none of yours was found (--mine)"] if mine and earlier and not own else []
    parts += [f"the reference for {', '.join(reference)}"] if reference else []
    parts += [f"lent by the reference, since you have no file of it: {', '.join(undone)}"] if undone else []
    return f"Earlier chapters: {'; '.join(parts)}" if parts else ""
