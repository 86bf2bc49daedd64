"""What students are given holds no answer, and works."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chapters.course.catalog import FOLDER, ROOT, CourseError, find_chapter, find_chapters, open_tasks
from chapters.course.cli import main
from chapters.course.commands import release_ as release_module
from chapters.course.commands.release_ import leaks, release, solution_lines, without_solutions
from chapters.course.skeleton import make_skeleton
from chapters.course.workspace import load_stage


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "students"
    assert main(["release", str(folder), "--chapters", "02,3"]) == 0
    return folder


def in_copy(folder: Path, code: str) -> str:
    """What a program prints that runs in a released folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_chapters_before_are_complete_those_released_are_skeletons_and_later_ones_are_absent(released: Path) -> None:
    names = sorted(path.name for path in released.glob("chapters/ch*.py"))
    assert names == [chapter.path.name for chapter in find_chapters()][:4]
    assert (released / "chapters" / "ch01_naive_kv_cache.py").read_text("utf-8") == find_chapter("01").source
    for number in ("02", "03"):
        chapter = find_chapter(number)
        skeleton = (released / "chapters" / chapter.path.name).read_text("utf-8")
        assert set(open_tasks(skeleton)) == {task.task_id for task in chapter.tasks}
        assert (released / "work" / chapter.path.name).read_text("utf-8") == skeleton
        assert (released / "tests" / "chapters" / f"test_{chapter.name}.py").is_file() == chapter.test_file.is_file()
    assert not list(released.glob("tests/chapters/test_ch04*")) and not list(released.glob("notebooks/0[4-9]*"))


def test_an_aid_is_released_with_the_chapters_that_it_imports(released: Path) -> None:
    names = {path.name for path in released.glob("chapters/aids/*.py")}
    assert {"__init__.py", "fragmentation.py", "prefill.py", "triton_anywhere.py"} <= names
    assert "timeline.py" not in names, "it imports chapter 07"


def test_an_aid_that_needs_a_chapter_through_another_aid_is_released_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_module, "FOLDER", tmp_path)
    (tmp_path / "aids").mkdir()
    (tmp_path / "aids" / "inner.py").write_text("from chapters.ch07_full_speed import Engine\n", encoding="utf-8")
    for line in ("from chapters.aids.inner import Engine", "from chapters.aids import inner"):
        outer = tmp_path / "aids" / "outer.py"
        outer.write_text(f"{line}\n", encoding="utf-8")
        assert release_module._chapters_of(outer) == {"ch07_full_speed"}


def test_no_line_of_a_solution_is_anywhere_that_students_look(released: Path) -> None:
    secret = {line for line in solution_lines([find_chapter("02"), find_chapter("03")])}
    assert "block_ids = [self._free.pop() for _ in range(count)]" in secret
    places = ("chapters/*.py", "chapters/aids/*.py", "work/*", "notebooks/*")
    texts = [path for place in places for path in released.glob(place)]
    assert len(texts) > 8
    public = {"ch00_baseline.py", "ch01_naive_kv_cache.py"}
    for path in texts:
        if path.name not in public:
            assert not [line for line in secret if line in path.read_text("utf-8")], path


SHOW_SOURCE = """
import ast, json
from pathlib import Path
for path in sorted(Path("notebooks").glob("*.ipynb")):
    names = {}
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    for statement in [statement for cell in cells for statement in ast.parse("".join(cell["source"])).body]:
        code = ast.unparse(statement)
        if isinstance(statement, ast.Import | ast.ImportFrom) or "load_stage(" in code:
            exec(code, names)
        elif code.startswith("viz.show_"):
            shown = eval(code, names)
            print(json.dumps([path.stem, code, shown.pieces]))
"""


def test_all_chapters_can_be_released_at_once_and_their_notebooks_show_each_task_that_is_not_done(tmp_path: Path) -> None:
    """Tasks that are not done run on lent functions. What is shown is the student's file, never the lent function."""
    skeletons = release(tmp_path / "all", find_chapters())
    assert [path.name for path in skeletons] == [chapter.path.name for chapter in find_chapters()]
    for chapter in find_chapters():
        assert (tmp_path / "all" / chapter.notebook).is_file() == (ROOT / chapter.notebook).is_file()
    lines = in_copy(tmp_path / "all", SHOW_SOURCE).splitlines()
    shown = [json.loads(line) for line in lines if line.startswith("[")]
    pieces = [piece for _, code, found in shown if "show_task" in code for piece in found]
    assert {name for name, *_ in shown} == {chapter.name.removeprefix("ch") for chapter in find_chapters()}
    assert len(pieces) >= len([task for chapter in find_chapters() for task in chapter.tasks])
    for place, code in pieces:
        file, _, line = place.partition(":")
        written = (tmp_path / "all" / file).read_text("utf-8").splitlines()[int(line) - 1]
        assert file.startswith("work/") and written.strip() == code.splitlines()[0], place
        assert '"""' in code and code.splitlines()[-1].strip() == "...", code


def test_what_a_notebook_draws_from_a_recording_comes_with_it(tmp_path: Path) -> None:
    """A student without a GPU runs the cells again, and they must find what was measured on one."""
    release(tmp_path / "late", [find_chapter("06"), find_chapter("07")])
    recordings = sorted(path.name for path in (tmp_path / "late" / "docs" / "performance").iterdir())
    assert {"kernels.json", "timeline.json"} <= set(recordings)
    assert all((ROOT / "docs" / "performance" / name).is_file() for name in recordings)


def test_what_is_about_wrong_and_other_solutions_is_not_handed_out(released: Path) -> None:
    names = {path.name for path in released.rglob("*")}
    assert not names & {"wrong", "alternatives", "overlay.py", "test_mutants.py", "test_solutions.py", "src", "__pycache__"}
    assert {"README.md", "pyproject.toml", "requirements.txt", "Makefile", "conftest.py", "LICENSE"} <= names
    ignored = (released / ".gitignore").read_text("utf-8").splitlines()
    assert "/work/" not in ignored and "__pycache__/" in ignored
    readme = (released / "README.md").read_text("utf-8")
    assert "`work/ch02_block_table.py`" in readme and "python -m chapters check 2.1" in readme


def test_the_readme_says_which_of_the_two_copies_of_a_chapter_to_edit(released: Path) -> None:
    readme = " ".join((released / "README.md").read_text("utf-8").split())
    assert "Edit the file in `work/` only." in readme
    assert "`chapters/ch02_block_table.py` is the blank copy that `start` copies" in readme


def test_a_copy_works_and_builds_on_the_students_own_earlier_chapter(released: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(released, copy)
    code = """
from pathlib import Path
from chapters.course import load_stage
from chapters.course.cli import main
assert main(["list"]) == 0
mine = Path("work/ch02_block_table.py")
assert load_stage("02").__file__ == str(mine.absolute())
mine.write_text(mine.read_text() + "\\nMINE = 1\\n")
third = load_stage("03")
assert third.__file__.endswith("work/ch03_paged_attention.py")
assert load_stage("02").MINE == 1 and third.PagedCache is load_stage("02").PagedCache
assert main(["check", "03"]) == 1
mine.unlink()
assert load_stage("02").__file__ == str(Path("chapters/ch02_block_table.py").absolute())
assert main(["check", "03"]) == 1
assert main(["release", "again"]) == 2
"""
    said = in_copy(copy, code)
    assert "to do" in said
    assert "yours for work/ch02_block_table.py; the reference for 00, 01" in " ".join(said.split())
    assert "lent by the reference, since you have no file of it: 02" in " ".join(said.split())


def test_in_a_copy_what_is_not_done_is_lent_to_checks_and_notebooks(tmp_path: Path) -> None:
    """Task 2.4 is done, and nothing else of chapter 02; of chapter 03 there is no file."""
    copy = tmp_path / "copy"
    release(copy, [find_chapter("02"), find_chapter("03")])
    (copy / "work" / "ch02_block_table.py").write_text(make_skeleton(find_chapter("02"), done=["2.4"]), encoding="utf-8")
    (copy / "work" / "ch03_paged_attention.py").unlink()
    code = """
from pathlib import Path
from chapters.course import load_stage
from chapters.course.catalog import find_chapter
from chapters.course.cli import main
assert main(["start", "02"]) == 0  # the file is there; nothing is to be done
from tests.support.models import hf_greedy, random_gpt2
load_stage("01")
model = random_gpt2(seed=5)
print("stage 03")
assert load_stage("03").generate(model, [[1, 2, 3]], 3) == [hf_greedy(model, [1, 2, 3], 3, 96)]
print("stage 02")
assert "work" in load_stage("02").__file__
assert main(["check", "2.4"]) == 0
print("other stub")
mine = Path("work/ch02_block_table.py")
done = find_chapter("02").reference.replace("import torch", "import torch\\nfrom chapters import TodoError", 1)
body = "table = torch.tensor(self.block_table(seq_id), "
mine.write_text(done.replace(body, "raise TodoError('x')\\n        " + body))
load_stage("02")
mine.write_text(done)
load_stage("02")
"""
    said, _, last = in_copy(copy, code).partition("other stub\n")
    assert last == (
        "Lent by the reference until you have done them: 2.4\n"
        "Lent by the reference: nothing up to chapter 02, all functions are yours\n"
    )
    start, _, rest = said.partition("stage 03\n")
    assert start.startswith("work/ch02_block_table.py came with this copy, and was left as it is: ")
    start = start.partition("check 02\n")[2]
    third, _, rest = rest.partition("stage 02\n")
    assert start == ""
    assert third == "Lent by the reference until you have done them: 2.1, 2.2, 2.3, 3.1, 3.2, 3.3\n"
    second, _, checked = rest.partition("\n")
    assert second == "Lent by the reference until you have done them: 2.1, 2.2, 2.3"
    assert "with 2.1, 2.2, 2.3 lent" in " ".join(checked.replace("│", " ").split()), checked


def test_where_the_reference_is_complete_a_notebook_gets_the_reference() -> None:
    assert load_stage("00").__file__ == str(FOLDER / "ch00_baseline.py")


def test_a_release_that_would_give_a_line_away_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_module, "make_skeleton", lambda chapter: chapter.source)
    with pytest.raises(CourseError, match="nothing was released: .* lines of solutions"):
        release(tmp_path / "leaky", [find_chapter("00")])
    assert list(tmp_path.iterdir()) == []


def test_notebooks_lose_their_solution_cells_and_nothing_else(tmp_path: Path) -> None:
    shown = {"cell_type": "code", "source": ["1"], "metadata": {}, "outputs": [{"text": ["1\n"]}]}
    hidden = {"cell_type": "code", "source": ["2"], "metadata": {"tags": ["solution"]}, "outputs": []}
    notebook = {"cells": [shown, hidden], "metadata": {"kernelspec": {}, "jupytext": {}}, "nbformat": 4}
    assert without_solutions(notebook) == {"cells": [shown], "metadata": {"kernelspec": {}}, "nbformat": 4}


def test_a_line_in_highlighted_code_of_a_notebook_is_found(tmp_path: Path) -> None:
    page = '<pre><span class="k">return</span> <span>int</span>(logits.argmax())</pre>'
    cell = {"cell_type": "code", "source": [], "outputs": [{"data": {"text/html": page}}]}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_baseline.ipynb").write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    assert leaks(tmp_path, [find_chapter("00")]) == ["notebooks/00_baseline.ipynb: return int(logits.argmax())"]


def test_a_solution_in_the_tests_is_found_and_a_line_that_a_test_needs_itself_is_none(tmp_path: Path) -> None:
    secret = sorted(solution_lines([find_chapter("02")]))
    tests = tmp_path / "tests" / "chapters"
    tests.mkdir(parents=True)
    (tests / "test_one.py").write_text(("\n" * 20).join(secret[:4]), encoding="utf-8")
    (tests / "test_two.py").write_text("def give():\n    " + "\n\n    ".join(secret[:3]), encoding="utf-8")
    found = leaks(tmp_path, [find_chapter("02")])
    assert found == [f"tests/chapters/test_two.py:{2 + 2 * number}: {line}" for number, line in enumerate(secret[:3])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{full}"], "is not empty"),
        (["{full}/file"], "is not empty"),
        ([f"{ROOT}/notebooks/students"], "inside what would be copied"),
        (["{new}", "--chapters", "02,04"], "chapter 03 is missing"),
        (["{new}", "--chapters", ","], "names no chapter"),
        (["{new}", "--chapters", "2x"], "there is no chapter '2x'"),
    ],
)
def test_a_release_is_refused_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    arguments = [option.format(full=tmp_path / "full", new=tmp_path / "new") for option in options]
    assert main(["release", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]
