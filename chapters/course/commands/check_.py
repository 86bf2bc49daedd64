"""``python -m chapters check``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from chapters.course.catalog import Chapter, Task, find_tasks
from chapters.course.cli import NOT_PASSED, add_work_argument
from chapters.course.errors import CourseError
from chapters.course.grading import check_file, grade_file
from chapters.course.report import as_gradescope, as_json, print_advice, print_grade, print_header
from chapters.course.running import Limits
from chapters.course.stages import own_chapters
from chapters.course.workspace import own_file, save_progress, work_folder, write_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``check``."""
    parser.add_argument("targets", nargs="+", metavar="CHAPTER|TASK", help="such as 02, or 2.1; tasks of one chapter")
    parser.add_argument("--file", metavar="PATH", help="check this file (default: the chapter's file in work/)")
    parser.add_argument("--mine", action="store_true", help="import earlier chapters from your files, where you have them")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is random in the tests (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--gradescope", metavar="FILE", help="also write Gradescope's results.json")
    parser.add_argument("-v", "--verbose", action="store_true", help="also show all that pytest says")
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
        print(grade.output, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(as_json(grade), indent=2))
    else:
        print_grade(grade)
        print_advice(grade, work)
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
