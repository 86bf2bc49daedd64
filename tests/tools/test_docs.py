"""What the site's pages say agrees with the code. The site itself is built by `make docs`, which follows every link."""

import functools
import importlib
import re
from pathlib import Path

import pytest

from chapters.course import cli
from chapters.course.catalog import Chapter, find_chapters

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not any(part.startswith("_") for part in path.relative_to(DOCS).parts))
CHAPTERS = {chapter.name: chapter for chapter in find_chapters()}

FIXED_TERMS = (
    *("request", "sequence", "sequence group", "SequenceGroup", "part", "async scheduling"),
    *("block", "page", "physical block", "logical block", "block table", "slot", "slot mapping", "batch row"),
    *("prefill", "decode", "chunk", "context length", "query length", "worker", "rank", "engine process"),
)
"""The words that mean the same everywhere."""


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def table_rows(text: str) -> list[list[str]]:
    """The cells of all table rows, header and rule included."""
    lines = text.replace("\N{NO-BREAK SPACE}", " ").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def resolve(name: str) -> object:
    """The object of a dotted name."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:size]))
        except ImportError as error:
            if not isinstance(error, ModuleNotFoundError):
                pytest.skip(str(error))  # there is no Triton here
            continue
        return functools.reduce(getattr, parts[size:], module)
    raise AttributeError(name)


def modules_of(package: str) -> set[str]:
    """Dotted names of a package's public modules, those without any content left out."""
    paths = (path for path in (ROOT / package).rglob("*.py") if path.read_text(encoding="utf-8").strip())
    dotted = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name for name in dotted if not any(part.startswith("_") for part in name.split("."))}


def in_reference() -> list[str]:
    return [
        name for path in (DOCS / "api").glob("*.md") for name in re.findall(r"automodule:: (\S+)", path.read_text("utf-8"))
    ]


@pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=lambda chapter: chapter.name)
def test_the_instructors_table_says_what_the_docstring_says(chapter: Chapter) -> None:
    table = read("instructors.md").partition("<!-- points: begin -->")[2].partition("<!-- points: end -->")[0]
    [row] = [cells for cells in table_rows(table) if f"`{chapter.name}`" in cells]
    tasks = ", ".join(f"{task.task_id} ({task.points})" for task in chapter.tasks)
    hours = re.findall(r"[\d.]+", chapter.effort)
    assert row[3:] == [tasks, str(chapter.points), *hours]
    [needs] = re.findall(r"^Know first: (.+?)\.$", chapter.docstring, flags=re.MULTILINE | re.DOTALL)
    assert row[2].replace("`", "") == " ".join(needs.replace("`", "").split())


def test_the_sums_for_instructors_are_those_of_the_chapters() -> None:
    points = sum(chapter.points for chapter in CHAPTERS.values())
    hours = sum(float(number) for chapter in CHAPTERS.values() for number in re.findall(r"[\d.]+", chapter.effort))
    assert f"That is {points} points and about {hours:g} hours of work." in read("instructors.md")
    assert all(f"### Chapter {chapter.number}\n" in read("instructors.md") for chapter in CHAPTERS.values())


def test_every_command_of_the_course_tool_is_described_and_no_other() -> None:
    named = re.findall(r"^\| `python -m chapters (\w+)", read("instructors.md"), flags=re.MULTILINE)
    assert named == list(cli.COMMANDS)
    everywhere = {name for page in PAGES for name in re.findall(r"python -m chapters ([a-z]+)", page.read_text("utf-8"))}
    assert everywhere <= set(cli.COMMANDS)


@pytest.mark.parametrize("command", ["check", "grade", "release", "start"])
def test_options_that_the_pages_name_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = read("instructors.md")
    lines = re.findall(rf"(?:chapters |^`){command}\b[^\n]*", text, flags=re.MULTILINE)
    named = set(re.findall(r"--[a-z][a-z-]*", " ".join(lines)))
    if command == "check":
        options = text.partition("Its options:")[2].partition("\n\n")[2].partition("\n\n")[0]
        named |= set(re.findall(r"--[a-z][a-z-]*", options))
    assert cli.main([command, "--help"]) == 0
    assert named <= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


def test_every_public_module_is_in_the_reference_once() -> None:
    listed = in_reference()
    course = {name for name in modules_of("chapters") if name.startswith("chapters.course")}
    public = modules_of("pagebrain") | modules_of("chapters") - course - {"chapters", "chapters.__main__"}
    assert sorted(listed) == sorted(set(listed))
    assert public - set(listed) == set(), "add these to a page of docs/api"
    assert set(listed) - public == set(), "docs/api names modules that do not exist"


def test_the_fixed_terms_are_in_the_glossary() -> None:
    blocks = re.findall(r"^```\{glossary\}\n(.*?)^```", read("glossary.md"), flags=re.MULTILINE | re.DOTALL)
    terms = [line for block in blocks for line in block.splitlines() if line and not line.startswith(" ")]
    assert len(terms) == len(set(terms))
    assert set(FIXED_TERMS) <= set(terms)


def test_the_map_to_vllm_has_a_row_for_each_task_that_names_its_function() -> None:
    rows = {cells[0]: cells for cells in table_rows(read("vllm.md")) if re.fullmatch(r"\d\.\d+", cells[0])}
    tasks = {task.task_id: chapter for chapter in CHAPTERS.values() for task in chapter.tasks}
    assert list(rows) == list(tasks)
    for task_id, chapter in tasks.items():
        names = re.findall(r"`~([\w.]+)`", rows[task_id][1])
        assert names and all(name.startswith(f"chapters.{chapter.name}.") for name in names)
        for name in names:
            found = resolve(name)
            assert f"Task {task_id}:" in (getattr(found, "fn", found).__doc__ or ""), name  # of a kernel: its function


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_names_and_files_that_a_page_refers_to_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\{(?:class|func|meth|mod|exc|attr|data)\}`(?:[^`<]*<)?~?([\w.]+)>?`", text):
        resolve(target)
    for target in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"^```\{include\} (\S+)", text, flags=re.MULTILINE):
        assert (page.parent / target).is_file(), target
    labels = {
        label for other in PAGES for label in re.findall(r"^\(([\w-]+)\)=$", other.read_text("utf-8"), flags=re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= labels


def test_make_commands_that_the_pages_name_exist() -> None:
    named = {
        name for page in ("index.md", "start.md") for name in re.findall(r"^make ([\w-]+)$", read(page), flags=re.MULTILINE)
    }
    named |= {name for page in ("index.md", "start.md") for name in re.findall(r"`make ([\w-]+)`", read(page))}
    targets = set(re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named <= targets


def test_nothing_on_the_site_comes_from_elsewhere() -> None:
    assert not re.search(r"https?://", read("_static/site.css") + read("conf.py"))
    for page in PAGES:
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(?:script|link|iframe|img)\b", page.read_text(encoding="utf-8")), page
