"""One mistake costs one task, and a task can be done before those that it builds on: what is missing is lent."""

import asyncio
import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chapters.course.catalog import ROOT, Chapter, CourseError, Task, find_chapter, find_chapters, pack
from chapters.course.cli import main
from chapters.course.commands.check_ import print_grade
from chapters.course.grading import Verdict, better, grade_file, settle
from chapters.course.lending import USED, lent_name
from chapters.course.running import PLUGINS, QUICK, Limits, Run, read_report
from chapters.course.skeleton import make_skeleton, solution_regions
from chapters.course.workspace import load_file
from tests.chapters.test_solutions import WRONG, number_of
from tests.support.kernels import require_kernels
from tests.support.models import hf_greedy, random_gpt2
from tests.support.overlay import compose
from tests.tools.toy_course import REFERENCE, TESTS, grade, graded, with_add
from tests.tools.toy_course import toy as toy

QUICK_CHAPTERS = [chapter for chapter in find_chapters() if chapter.number < "06"]
"""The chapters without kernels, which the interpreter runs too slowly to be judged here once more."""


def judge(folder: Path, files: Mapping[Path, tuple[Chapter, str | None]]) -> dict[Path, dict[str, Verdict]]:
    """What the tests say of each file's task, or of all of its chapter's, in one process for all files."""
    only = folder / "tasks.json"
    only.write_text(json.dumps({str(path): task for path, (_, task) in files.items()}), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", *PLUGINS, "-q", "--tb=no", "-rN", "-p", "no:cacheprovider"]
    command += ["--chapter-report", f"{folder}/report", "--lend-others", "-p", "tests.support.own_tasks"]
    command += [f"--chapter-file={chapter.number}={path}" for path, (chapter, _) in files.items()]
    command += sorted({str(chapter.test_file) for chapter, _ in files.values()})
    environment = os.environ | QUICK | {"OMP_NUM_THREADS": "1", "PAGEBRAIN_OWN_TASKS": str(only)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    everything = read_report(folder / "report")
    assert everything.done
    found = {}
    for path, (chapter, only_task) in files.items():
        plans = (
            {test: task for test, task in plan.items() if f"[{path.stem}{form}]" in test or f"[{path.stem}{form}-" in test}
            for plan, form in ((everything.plan, ""), (everything.again, "-lent"))
        )
        run = Run(everything.records, next(plans), loaded=True, done=True, again=next(plans))
        tasks = [task for task in chapter.tasks if only_task in (None, task.task_id)]
        found[path] = {task.task_id: verdict_of(task, run) for task in tasks}
    return found


def verdict_of(task: Task, run: Run) -> Verdict:
    first: dict[str, Verdict] = {}
    second: dict[str, Verdict] = {}
    settle(task, run, Limits(), first, second)
    return better(first[task.task_id], second.get(task.task_id))


MOST_USED = ("0.1", "1.1", "2.1", "3.1", "4.3", "5.1")
"""In each chapter the task that most of the others build on."""


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Verdict]]:
    """``only_2_1``: the skeleton with task 2.1 done, judged on that task. ``wrong_2_1``: the reference with a mistake in
    task 2.1, judged on all tasks."""
    folder = tmp_path_factory.mktemp("judged")
    files: dict[Path, tuple[Chapter, str | None]] = {}
    for chapter in QUICK_CHAPTERS:
        for task in chapter.tasks:
            path = folder / f"only_{task.task_id.replace('.', '_')}.py"
            path.write_text(make_skeleton(chapter, done=[task.task_id]), encoding="utf-8")
            files[path] = chapter, task.task_id
    overlays = {overlay.task: overlay for overlay in reversed(WRONG)}
    for task_id in MOST_USED:
        path = folder / f"wrong_{task_id.replace('.', '_')}.py"
        chapter = find_chapter(number_of(overlays[task_id]))
        path.write_text(compose(chapter.source, overlays[task_id].source), encoding="utf-8")
        files[path] = chapter, None
    return {path.stem: verdicts for path, verdicts in judge(folder, files).items()}


def test_each_task_can_be_done_alone_while_all_others_are_stubs(judged: dict[str, dict[str, Verdict]]) -> None:
    verdicts = {task_id: found[task_id] for name, found in judged.items() if name.startswith("only") for task_id in found}
    assert verdicts.keys() == {task.task_id for chapter in QUICK_CHAPTERS for task in chapter.tasks}
    assert [verdict for verdict in verdicts.values() if not verdict.passed] == []
    assert all(task_id not in verdict.lent for task_id, verdict in verdicts.items())
    assert verdicts["2.4"].lent == ("2.1", "2.2", "2.3")
    assert verdicts["1.1"].lent == (), "what its tests do not use is not said to be lent"


@pytest.mark.parametrize("task_id", MOST_USED)
def test_a_mistake_in_one_task_costs_no_other(task_id: str, judged: dict[str, dict[str, Verdict]]) -> None:
    verdicts = judged[f"wrong_{task_id.replace('.', '_')}"]
    assert [other for other, verdict in verdicts.items() if not verdict.passed] == [task_id], verdicts


CLASSES = '''\
"""Chapter 00: classes.

Tasks (10 points, about 1 hour):

- 0.1 (4 points) ``Shelf.put``: in.
- 0.2 (6 points) ``Shelf.get``, ``Box.open``: out.
"""

import math

from chapters import TodoError


class Shelf:
    def __init__(self) -> None:
        self.things = []

    def put(self, thing):
        """Task 0.1: in."""
        # BEGIN SOLUTION 0.1
        self.things.append(math.floor(thing))
        # END SOLUTION

    @property
    def get(self):
        """Task 0.2: out."""
        # BEGIN SOLUTION 0.2
        return self.things[0]
        # END SOLUTION


class Box(Shelf):
    def __init__(self) -> None:
        super().__init__()
        self.is_open = False

    async def open(self):
        """Task 0.2: out."""
        # BEGIN SOLUTION 0.2
        self.is_open = True
        return [thing async for thing in self.each()]
        # END SOLUTION

    async def each(self):
        for thing in self.things:
            yield thing
'''


def loaded(tmp_path: Path, source: str, lent: set[str], reference: str = CLASSES) -> Any:
    """A learner's module, with tasks lent by ``reference``."""
    folder = tmp_path / "chapters"
    folder.mkdir(exist_ok=True)
    (folder / "ch00_toy.py").write_text(reference, encoding="utf-8")
    own = tmp_path / "ch00_toy.py"
    own.write_text(source, encoding="utf-8")
    USED.clear()
    return load_file(own, f"lent_{len(source)}_{len(lent)}", Chapter("00", "ch00_toy", folder / "ch00_toy.py"), lent)


def test_methods_properties_and_coroutines_are_lent_in_their_place(tmp_path: Path) -> None:
    mine = loaded(
        tmp_path, CLASSES.replace("self.things[0]", "1 / 0").replace("return [thing async", "return [0 async"), {"0.2"}
    )
    box = mine.Box()
    box.put(7.5)
    assert USED == set()
    assert box.get == 7 and asyncio.run(box.open()) == [7] and box.is_open
    assert USED == {"0.2"}


def test_a_function_that_the_file_lacks_and_an_import_that_an_editor_removed_are_lent_too(tmp_path: Path) -> None:
    source = CLASSES.replace("def put", "def putt").replace("import math\n", "").replace("class Box", "class Bax")
    shelf = loaded(tmp_path, source, {"0.1"}).Shelf()
    shelf.put(7.5)
    assert shelf.get == 7
    everything = loaded(tmp_path, source, {"0.1", "0.2"})
    assert asyncio.run(everything.Box().open()) == []


def test_a_class_all_of_which_is_lent_gets_the_state_that_lent_functions_expect(tmp_path: Path) -> None:
    """Other data structures are right answers; the functions of the reference do not know them."""
    source = CLASSES.replace("self.things = []", "self.rows = {}").replace(
        "self.things.append(math.floor(thing))", "self.rows = 1 / 0"
    )
    shelf = loaded(tmp_path, source, {"0.1", "0.2"}).Shelf()
    shelf.put(7.5)
    assert shelf.get == 7
    with pytest.raises(AttributeError, match="things"):
        loaded(tmp_path, source, {"0.1"}).Shelf().put(7.5)


def test_lines_in_messages_are_those_of_the_learners_file_and_no_lent_line_is_shown(tmp_path: Path) -> None:
    source = "# one line more\n" + CLASSES.replace("math.floor(thing)", "math.floor(thing) / 0")
    mine = loaded(tmp_path, source, {"0.2"})
    number = source[: source.index(" / 0")].count("\n") + 1
    with pytest.raises(ZeroDivisionError) as caught:
        mine.Shelf().put(7.5)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == (str(tmp_path / "ch00_toy.py"), number)
    assert "/ 0" in str(last.line)
    with pytest.raises(IndexError) as unseen:
        print(mine.Shelf().get)
    last = traceback.extract_tb(unseen.value.__traceback__)[-1]
    number = CLASSES[: CLASSES.index("self.things[0]")].count("\n") + 1
    assert (last.filename, last.lineno, last.line) == ("<lent: ch00_toy.py>", number, "")


@pytest.mark.parametrize("chapter", find_chapters(), ids=lambda chapter: chapter.number)
def test_all_functions_of_a_chapter_can_be_lent_to_its_skeleton(chapter: Chapter, tmp_path: Path) -> None:
    if chapter.number == "06":
        require_kernels("cpu")
    path = tmp_path / chapter.path.name
    path.write_text(make_skeleton(chapter), encoding="utf-8")
    mine = load_file(path, f"all_lent_{chapter.name}", chapter, {task.task_id for task in chapter.tasks})
    for region in solution_regions(chapter):
        found: Any = mine
        for name in region.qualname.split("."):
            found = getattr(found, name)
        function = getattr(found, "fn", found)  # of a kernel
        assert inspect.unwrap(function).__code__.co_filename == lent_name(chapter), region.qualname
    model = random_gpt2(seed=5)
    assert mine.generate(model, [[1, 2, 3]], 3) == [hf_greedy(model, [1, 2, 3], 3, 96)]


def test_the_verdict_says_what_was_lent(toy: Chapter) -> None:
    """Task 0.2 has a test that adds; task 0.1 is wrong, or not begun."""
    test = (
        "\n\n@pytest.mark.task('0.2')\ndef test_both(chapter):\n    assert chapter.mul(chapter.add(1, 2), 2) == 6, 'both'\n"
    )
    toy.test_file.write_text(toy.test_file.read_text("utf-8") + test, encoding="utf-8")
    for source in (with_add("return a - b\n"), make_skeleton(toy, done=["0.2"]), with_add("raise SystemExit\n")):
        verdicts = grade(toy, source)
        assert not verdicts["0.1"].passed and verdicts["0.1"].lent == ()
        assert verdicts["0.2"].passed and verdicts["0.2"].lent == ("0.1",)
    assert grade(toy, REFERENCE)["0.2"].lent == ()
    both = grade(toy, with_add("return a - b\n").replace("return a * b", "return a + b"))
    assert [verdict.message for verdict in both.values()] == ["add(-1, -1) must be -2", "mul(2, 3) must be 6"]


def test_a_task_that_fails_also_with_the_reference_is_told_that_the_fault_is_its_own(
    toy: Chapter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner whose other tasks pass would doubt them on reading only that they were lent."""
    monkeypatch.setenv("COLUMNS", "200")
    test = (
        "\n\n@pytest.mark.task('0.2')\ndef test_both(chapter):\n    assert chapter.mul(chapter.add(1, 2), 2) == 6, 'both'\n"
    )
    toy.test_file.write_text(TESTS.partition('@pytest.mark.task("0.2"')[0] + test, encoding="utf-8")
    own = graded(toy, REFERENCE.replace("return a * b", "return a + b"))
    print_grade(own)
    said = capsys.readouterr().out
    assert "judged with the reference's 0.1: the fault is in this task" in said and "lent" not in said.lower()
    not_begun = with_add('raise TodoError("0.1")\n').replace("return a * b", "return a + b")
    print_grade(graded(toy, not_begun))
    said = capsys.readouterr().out
    assert "judged with the reference's 0.1: the fault is in this task" in said and "also" not in said
    print_grade(graded(toy, with_add("return a - b\n")))
    said = capsys.readouterr().out
    assert "with 0.1 lent" in said and "Lent: " in said and "the fault is in this task" not in said


def test_an_empty_file_is_told_what_is_missing_and_not_that_lent_code_fails(tmp_path: Path) -> None:
    """In chapter 02, the class that is lent names in its signatures a class that is not."""
    path = tmp_path / "ch02_block_table.py"
    path.write_text("# nothing yet\n", encoding="utf-8")
    chapter = find_chapter("02")
    verdict = grade_file(chapter, chapter.tasks[:1], path).verdicts[0]
    assert verdict.message == "the file defines no BlockManager"


def test_a_failure_in_lent_code_is_not_what_a_learner_is_told(toy: Chapter) -> None:
    """The learner's own ``add`` fails in a way of its own; the lent one raises where no line is shown."""
    test = (
        "\n\n@pytest.mark.task('0.2')\ndef test_both(chapter):\n    assert chapter.add(chapter.mul(2, 3), 2) == 8, 'both'\n"
    )
    toy.test_file.write_text(TESTS.partition('@pytest.mark.task("0.2"')[0] + test, encoding="utf-8")
    verdict = grade(toy, REFERENCE.replace("return a * b", "return None").replace("return a + b", "return (a or 0) + b"))[
        "0.2"
    ]
    assert verdict.message == "both" and not verdict.passed


def test_a_mistake_in_an_own_earlier_chapter_costs_nothing_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PAGEBRAIN_WORK", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    earlier, chapter = find_chapter("00"), find_chapter("01")
    wrong = earlier.source.replace("return int(logits.argmax())", "return int(logits.argmin())")
    assert wrong != earlier.source
    (tmp_path / earlier.path.name).write_text(wrong, encoding="utf-8")
    (tmp_path / chapter.path.name).write_text(chapter.source, encoding="utf-8")
    assert main(["check", "1.3", "--mine"]) == 0
    assert "with chapter 00 lent" in capsys.readouterr().out
    (tmp_path / earlier.path.name).write_text(make_skeleton(earlier), encoding="utf-8")
    assert main(["check", "1.3", "--mine", "--json"]) == 0
    said = capsys.readouterr().out
    assert json.loads(said)["tasks"][0]["lent"] == ["0.1"]


def test_a_packed_reference_is_the_reference_and_shows_no_line_of_it(tmp_path: Path) -> None:
    chapter = find_chapter("02")
    copy = Chapter("02", chapter.name, tmp_path / chapter.path.name)
    copy.path.write_text(make_skeleton(chapter), encoding="utf-8")
    assert copy.reference == copy.source
    copy.lent_file.parent.mkdir()
    copy.lent_file.write_text(pack(chapter), encoding="ascii")
    again = Chapter("02", chapter.name, copy.path)
    assert again.reference == chapter.source
    first, *lines = pack(chapter).splitlines()
    assert "solutions" in first and "spoils" in first and all(line.strip() not in chapter.source for line in lines)
    copy.lent_file.write_text(pack(chapter)[:-300], encoding="ascii")
    with pytest.raises(CourseError, match="copy it again, or delete it"):
        _ = Chapter("02", chapter.name, copy.path).reference
