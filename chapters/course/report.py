"""A grade for people (a table), for programs (JSON) and for Gradescope (its results.json)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chapters.course.catalog import Chapter, find_chapters
from chapters.course.grading import Grade, Verdict
from chapters.course.workspace import Snapshot, shown, task_states

_RESULTS = {"passed": ("passed", "green"), "failed": ("failed", "red"), "todo": ("not done yet", "yellow")}


def print_header(chapter: Chapter, snapshot: Snapshot, own: Mapping[str, Path], *, mine: bool = False) -> None:
    """Say what is about to be checked; ``mine``: earlier chapters were to be the learner's own."""
    console = Console(highlight=False)
    console.print(Text(f"Chapter {chapter.number}: {chapter.title}", style="bold"))
    console.print(Text(f"Checking {snapshot}"), soft_wrap=True)
    if text := _earlier(chapter, own, mine=mine):
        console.print(Text(text), soft_wrap=True)


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


def print_advice(grade: Grade, work: Path) -> None:
    """If a task failed and earlier chapters are the learner's own: which of those are not known to be right."""
    if grade.passed or not grade.own:
        return
    doubtful = []
    for chapter in find_chapters():
        if chapter.name in grade.own:
            states = task_states(work, chapter)
            open_tasks = [f"{task} {state}" for task, state in states.items() if state != "passed"]
            doubtful += [f"chapter {chapter.number} ({', '.join(open_tasks)})"] if open_tasks else []
    if doubtful:
        text = f"This builds on your own {'; '.join(doubtful)}. A mistake there can show here: check that first."
        Console(highlight=False).print(Text(text, style="yellow"), soft_wrap=True)


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
        return Text(verdict.task.summary, style="dim")
    parts = [Text(verdict.message)]
    if verdict.where and verdict.status != "todo":
        parts.append(Text(f"in your file, {verdict.where}"))
    if verdict.hint:
        parts.append(Text(f"Hint: {verdict.hint}", style="italic"))
    if verdict.status != "todo" and verdict.num_tests > 1:
        parts.append(Text(f"{verdict.num_passed} of {verdict.num_tests} tests of this task pass", style="dim"))
    return Text("\n").join(parts)


def _earlier(chapter: Chapter, own: Mapping[str, Path], *, mine: bool) -> str:
    """Whose earlier chapters a check uses; empty if there are none."""
    earlier = [other for other in find_chapters() if other.number < chapter.number]
    reference = [other.number for other in earlier if other.name not in own and not other.is_skeleton]
    undone = [other.number for other in earlier if other.name not in own and other.is_skeleton]
    parts = [f"yours for {', '.join(shown(path) for path in own.values())}"] if own else []
    parts += ["none of yours was found (--mine)"] if mine and earlier and not own else []
    parts += [f"the reference for {', '.join(reference)}"] if reference else []
    parts += [f"skeletons, with nothing done, for {', '.join(undone)}"] if undone else []
    return f"Earlier chapters: {'; '.join(parts)}" if parts else ""
