"""The notebooks: in step with their sources, executed, checked where they can be, and complete for every task."""

import re
from pathlib import Path
from typing import Any

import jupytext
import jupytext.config
import jupytext.paired_paths
import nbformat
import pytest

from chapters.course import load_stage
from chapters.course.catalog import ROOT, Chapter, find_chapters
from pagebrain import viz
from pagebrain.kernels.version import available
from tools.notebooks import NOTEBOOKS, SOURCES, differences, notebook_path, source_paths, tags

CHAPTERS = find_chapters()
CHECKED = "nbval-check-output"
PRIVATE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users)/\w")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.fixture(params=source_paths(), ids=lambda path: path.stem)
def source(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def notebook(source: Path) -> Any:
    return read(notebook_path(source))


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_chapter_has_a_notebook_and_no_notebook_is_without_a_source() -> None:
    names = [chapter.name.removeprefix("ch") for chapter in CHAPTERS]
    assert [path.stem for path in source_paths()] == names
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == names
    assert sorted(path.stem for path in SOURCES.glob("*.py")) == names


def test_jupyter_knows_which_source_belongs_to_which_notebook(source: Path) -> None:
    configuration = jupytext.config.load_jupytext_config(str(notebook_path(source)))
    formats = configuration.default_formats(str(notebook_path(source)))
    paired = {
        Path(path).resolve() for path, _ in jupytext.paired_paths.paired_paths(str(notebook_path(source)), "ipynb", formats)
    }
    assert paired == {source.resolve(), notebook_path(source).resolve()}


def test_source_and_notebook_are_in_step(source: Path) -> None:
    assert differences(source) == []


def test_a_notebook_was_executed_from_top_to_bottom_without_an_error(notebook: Any) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def test_cells_whose_output_is_checked_have_one(notebook: Any) -> None:
    """nbval compares nothing, and says nothing, where no output is stored."""
    checked = [cell for cell in code_cells(notebook) if CHECKED in tags(cell)]
    assert len(checked) >= 3
    assert [cell.source for cell in checked if not cell.outputs] == []


def test_code_that_compares_with_hugging_face_asserts_it(notebook: Any) -> None:
    assert any(cell.source.count("assert ") for cell in code_cells(notebook))


def test_pictures_have_an_alt_text(notebook: Any) -> None:
    pictures = [out for cell in code_cells(notebook) for out in cell.outputs if "image/png" in out.get("data", {})]
    assert pictures
    for picture in pictures:
        assert len(picture.metadata["image/png"]["alt"]) > 40


def test_solution_cells_are_folded(notebook: Any) -> None:
    for cell in notebook.cells:
        if "solution" in tags(cell):
            assert "hide-cell" in tags(cell)
            assert cell.cell_type == "markdown" or cell.metadata.jupyter == {"source_hidden": True, "outputs_hidden": True}


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_every_task_has_an_exercise_and_its_solution_follows(chapter: Chapter) -> None:
    cells = read(NOTEBOOKS / f"{chapter.name.removeprefix('ch')}.ipynb").cells
    headings: dict[str, int] = {}
    for number, cell in enumerate(cells):
        found = re.search(r"^### Exercise (\d+\.\d+): .+ \((\d+) points\)$", cell.source, flags=re.MULTILINE)
        if found:
            [points] = [task.points for task in chapter.tasks if task.task_id == found[1]]
            assert int(found[2]) == points
            headings[found[1]] = number
    assert list(headings) == [task.task_id for task in chapter.tasks]
    ends = [*list(headings.values())[1:], len(cells)]
    for start, end in zip(headings.values(), ends, strict=True):
        assert any("solution" in tags(cell) for cell in cells[start:end])
    assert f"python -m chapters start {chapter.number}" in "".join(cell.source for cell in cells)


def test_readers_predict_before_they_run(notebook: Any) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert text.count("**Predict.**") >= 2
    assert text.count("<details>") >= 2 and text.count("<details>") == text.count("</details>")


def test_code_is_shown_from_the_live_module_and_never_pasted(notebook: Any) -> None:
    names = {name for chapter in CHAPTERS for name in re.findall(r"^(?:async )?(?:def|class) (\w+)", chapter.source, re.M)}
    for cell in code_cells(notebook):
        assert not names & set(re.findall(r"^(?:async )?(?:def|class) (\w+)", cell.source, re.M))


def test_no_output_holds_a_path_of_the_machine(notebook: Any) -> None:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            shown = "".join(str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))
            assert not PRIVATE_PATH.search(shown + str(output.get("text", ""))), cell.source


def test_a_notebook_is_small_enough_for_a_code_host(source: Path) -> None:
    assert notebook_path(source).stat().st_size < 1_500_000


def test_the_code_that_is_shown_is_the_code_that_is_there(notebook: Any) -> None:
    """A chapter that changes after its notebook was executed leaves old code, or old line numbers, in the page."""
    stages = [chapter.number for chapter in CHAPTERS if chapter.number != "06" or available()]  # 06 needs Triton
    names: dict[str, Any] = {f"ch{number}": load_stage(number) for number in stages}
    shown = [cell for cell in code_cells(notebook) if re.fullmatch(r"viz\.show_(source|task)\(.*\)", cell.source, re.DOTALL)]
    assert shown
    if "ch06" not in names and "(ch06." in shown[0].source:
        pytest.skip("there is no Triton here")
    for cell in shown:
        [output] = cell.outputs
        there = eval(cell.source, {"viz": viz, **names})._repr_mimebundle_()
        assert output.data["text/markdown"] == there["text/markdown"], f"{cell.source}: run make notebooks"


def test_what_chapter_02_says_about_the_papers_comparison_agrees_with_its_table() -> None:
    notebook = read(NOTEBOOKS / "02_block_table.ipynb")
    [table] = [
        output.text
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream" and output.text.startswith("percent of slots")
    ]
    rows = [re.split(r"  +", line.strip()) for line in table.splitlines()[1:-1]]
    ours, theirs = ([[float(number) for number in row[1:] if number != "-"] for row in rows[start::2]] for start in (0, 1))
    apart = [max(abs(a - b) for a, b in zip(mine[:4], paper[:4])) for mine, paper in zip(ours[:3], theirs[:3])]
    (max_, pow2, oracle), text = apart, " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    words = " ".join(text.split())
    assert (
        f"Max and Oracle are within {max(max_, oracle):.1f} points of the paper's, and those of Pow2 within {pow2:.1f}."
        in words
    )
    assert f"Pow2's external share is {theirs[1][3] - ours[1][3]:.1f} points smaller" in words
    assert f"share of the paged system than {theirs[3][0]} %; ours is {ours[3][0]} %" in words
    assert [mine[4] for mine in ours[:2]] == [paper[4] for paper in theirs[:2]], "the text says that as many run"
    assert f"With Oracle {ours[2][4]} run, in the paper {theirs[2][4]}; with paging {ours[3][4]} run, in the paper" in words
    assert f"in the paper {theirs[3][-1]}." in words
    assert f"too small for a label: {ours[3][1]} % reserved and {ours[3][3]} % external" in words
    assert f"1,392 slots remain, which are {ours[0][3]} %" in words


@pytest.mark.parametrize("file", ["Makefile", "docs/start.md", "chapters/course/commands/release_.py"])
def test_jupyterlab_opens_the_notebooks_and_reaches_the_students_own_files(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder named without an option would be JupyterLab's root, and ``work/`` lies beside it."""
    from jupyter_server.serverapp import ServerApp

    (options,) = re.findall(r"\bjupyter lab (-[^`\n]+)", (ROOT / file).read_text("utf-8"))
    monkeypatch.chdir(ROOT)
    server = ServerApp()
    server.initialize(options.split(), find_extensions=False, new_httpserver=False)
    assert Path(server.root_dir) == ROOT and server.contents_manager.preferred_dir == "notebooks"
