"""Skeletons are made from the chapters, give nothing away, and every task on them fails; over all chapters there are."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chapters.course.catalog import ROOT, Chapter, CourseError, find_chapters, open_tasks
from chapters.course.commands.diff_ import ROLES, compare, definitions, used_definitions
from chapters.course.commands.release_ import solution_lines
from chapters.course.grading import judge_run
from chapters.course.imports_guard import forbidden_imports
from chapters.course.running import PLUGINS, Limits, read_report
from chapters.course.skeleton import make_skeleton, solution_regions, stub_text
from chapters.course.workspace import load_file

CHAPTERS = find_chapters()


@pytest.fixture(params=CHAPTERS, ids=[chapter.number for chapter in CHAPTERS])
def chapter(request: pytest.FixtureRequest) -> Chapter:
    found: Chapter = request.param
    return found


def test_the_docstring_lists_every_task_with_points_that_add_up(chapter: Chapter) -> None:
    assert chapter.tasks
    assert [task.task_id for task in chapter.tasks] == [f"{int(chapter.number)}.{i + 1}" for i in range(len(chapter.tasks))]
    assert {region.task_id for region in solution_regions(chapter)} == {task.task_id for task in chapter.tasks}
    total = re.search(r"Tasks \((\d+) points, about ", chapter.docstring)
    assert total is not None and int(total[1]) == chapter.points


def test_a_skeleton_has_a_stub_for_each_solution_and_none_of_its_lines(chapter: Chapter) -> None:
    skeleton = make_skeleton(chapter)
    assert open_tasks(skeleton) == sorted(region.task_id for region in solution_regions(chapter))
    assert "SOLUTION" not in skeleton
    secret = solution_lines([chapter])
    assert len(secret) > len(chapter.tasks)
    assert not secret & {line.strip() for line in skeleton.splitlines()}


def test_outside_the_solutions_a_skeleton_is_the_reference_line_by_line(chapter: Chapter) -> None:
    inside = {number for region in solution_regions(chapter) for number in range(region.first, region.last + 1)}
    kept = [line for number, line in enumerate(chapter.source.splitlines(), 1) if number not in inside]
    lines = iter(make_skeleton(chapter).splitlines())
    assert all(line in lines for line in kept)


def test_signatures_of_skeleton_and_reference_are_the_same(chapter: Chapter, tmp_path: Path) -> None:
    def signatures(source: str) -> Iterator[tuple[str, ...]]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                returns = ast.dump(node.returns) if node.returns else ""
                yield type(node).__name__, node.name, ast.dump(node.args), returns, *map(ast.dump, node.decorator_list)
            if isinstance(node, ast.ClassDef):
                yield "class", node.name, *map(ast.dump, [*node.bases, *node.decorator_list])

    assert list(signatures(make_skeleton(chapter))) == list(signatures(chapter.source))


def test_a_skeleton_imports_and_its_generators_are_still_generators(chapter: Chapter, tmp_path: Path) -> None:
    path = tmp_path / chapter.path.name
    path.write_text(make_skeleton(chapter), encoding="utf-8")
    skeleton = load_file(path, f"skeleton_{chapter.name}")
    reference = load_file(chapter.path, f"reference_{chapter.name}")
    for region in solution_regions(chapter):
        names = region.qualname.split(".")
        mine, theirs = skeleton, reference
        for name in names:
            mine, theirs = getattr(mine, name), getattr(theirs, name)
        for kind in (inspect.isgeneratorfunction, inspect.isasyncgenfunction, inspect.iscoroutinefunction):
            assert kind(mine) == kind(theirs), region.qualname


def test_a_stub_says_which_task_what_to_do_where_to_read_and_how_to_check(chapter: Chapter) -> None:
    skeleton = make_skeleton(chapter)
    values = {node.value for node in ast.walk(ast.parse(skeleton)) if isinstance(node, ast.Constant)}
    for region in solution_regions(chapter):
        text = stub_text(chapter, region)
        assert text in values
        points = next(task.points for task in chapter.tasks if task.task_id == region.task_id)
        assert text.startswith(f"Task {region.task_id} ({points} points), {region.qualname}: ")
        assert f"notebooks/{chapter.name[2:]}.ipynb, 'Exercise {region.task_id}'" in text
        assert f"python -m chapters check {region.task_id}" in text
        assert "?." not in text, "a title that is a question ends with its question mark"


def test_no_docstring_has_quotes_of_a_string_that_was_cut(chapter: Chapter) -> None:
    nodes = [node for node in ast.walk(ast.parse(chapter.source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in nodes:
        assert not re.search(r'\s"\s*\n\s*"', ast.get_docstring(node) or ""), node.name


def test_every_line_of_a_skeleton_fits_the_style(chapter: Chapter) -> None:
    assert all(len(line) <= 125 and line == line.rstrip() for line in make_skeleton(chapter).splitlines())


def test_a_reference_imports_nothing_that_its_skeleton_does_not(chapter: Chapter) -> None:
    assert forbidden_imports(chapter.source, make_skeleton(chapter)) == []


def test_a_chapter_and_its_tests_need_nothing_from_a_later_chapter(chapter: Chapter) -> None:
    later = [other.name for other in CHAPTERS if other.number > chapter.number]
    sources = [chapter.source] + ([chapter.test_file.read_text(encoding="utf-8")] if chapter.test_file.is_file() else [])
    for source in sources:
        imported = {
            name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            for name in f"{getattr(node, 'module', '')}.{alias.name}".split(".")
        }
        assert not imported & set(later)


def test_a_chapters_tests_reach_it_through_the_fixture_only(chapter: Chapter) -> None:
    if not chapter.test_file.is_file():
        pytest.skip("no tests yet")
    source = chapter.test_file.read_text(encoding="utf-8")
    assert f'CHAPTER = "{chapter.number}"' in source
    modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert f"chapters.{chapter.name}" not in modules and not re.search(rf"import .*\b{chapter.name}\b", source)


def test_every_task_of_every_skeleton_fails_with_its_own_todo_error(tmp_path: Path) -> None:
    tested = [chapter for chapter in CHAPTERS if chapter.test_file.is_file()]
    assert tested
    command = [sys.executable, "-m", "pytest", *PLUGINS, "-q", "--tb=no", "-p", "no:cacheprovider"]
    command += ["--chapter-report", f"{tmp_path}/report"]
    for chapter in tested:
        path = tmp_path / chapter.path.name
        path.write_text(make_skeleton(chapter), encoding="utf-8")
        command += ["--chapter-file", f"{chapter.number}={path}", str(chapter.test_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    run = read_report(tmp_path / "report")
    for chapter in tested:
        for task in chapter.tasks:
            verdict = judge_run(task, run, Limits())
            assert verdict.status == "todo", (task.task_id, verdict)
            own = [
                record
                for record in run.records.values()
                if record["task"] == task.task_id and record["message"].startswith(f"Task {task.task_id} ")
            ]
            assert own and all(record["kind"] == "todo" for record in own), task.task_id


def test_the_table_of_roles_names_every_public_definition_and_no_other(chapter: Chapter) -> None:
    assert list(ROLES.get(chapter.number, {})) and set(ROLES[chapter.number]) == set(definitions(chapter))


def test_what_the_table_says_is_replaced_exists_earlier_and_is_not_used_any_more(chapter: Chapter) -> None:
    for entry in ROLES[chapter.number].values():
        for name in entry.replaces:
            number, _, definition = name.partition(".")
            assert number < chapter.number and definition in ROLES[number]
            assert name not in used_definitions(chapter)
            assert ROLES[number][definition].role == entry.role


def test_a_comparison_tells_kept_replaced_and_new_apart() -> None:
    by_number = {chapter.number: chapter for chapter in CHAPTERS}
    changes = {change.name: change for change in compare(by_number["01"], by_number["02"])}
    assert changes["01.forward"].kind == "kept"
    assert changes["02.PagedCache"].replaced == ("01.ReservedCache",)
    assert changes["02.BlockManager"].kind == "new"
    far = {change.name: change for change in compare(by_number["00"], by_number["03"])}
    assert far["01.Attend" if "01.Attend" in far else "02.PagedCache"].kind == "new"
    with pytest.raises(CourseError, match="earlier"):
        compare(by_number["02"], by_number["01"])


def test_markers_that_do_not_pair_up_are_an_error(tmp_path: Path) -> None:
    for number, body in enumerate(
        ["# BEGIN SOLUTION 0.1", "# END SOLUTION", "# BEGIN SOLUTION 0.1\n    # BEGIN SOLUTION 0.2", "# BEGIN SOLUTION one"]
    ):
        path = tmp_path / f"ch{number:02}_broken.py"
        path.write_text(f"def f():\n    {body}\n    return 1\n", encoding="utf-8")
        with pytest.raises(CourseError, match=f"{path.name}:[23]"):
            solution_regions(Chapter(f"{number:02}", path.stem, path))
