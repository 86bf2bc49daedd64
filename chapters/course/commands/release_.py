"""``python -m chapters release``: a folder for students, in which the chapters that are theirs to write are skeletons.

Chapters before those are complete, later ones are absent. Everything is made in a temporary folder beside the wanted one,
searched for lines of the solutions, and only then given its name. So there is never half a release, and never one with a
solution in its chapters, tests or notebooks. ``pagebrain/`` is complete in it on purpose: the engine is the chapters' fuller
sibling, there to be read and to run the students' parts in.
"""

import argparse
import ast
import html
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from chapters.course.catalog import FOLDER, ROOT, Chapter, CourseError, find_chapter, find_chapters, pack
from chapters.course.parsing import parse
from chapters.course.skeleton import make_skeleton, solution_regions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``release``."""
    parser.add_argument("folder", metavar="DIR", help="where to make it; must be empty, or not there yet")
    parser.add_argument("--chapters", metavar="NN,NN", help="what the students write, such as 02,03 (default: all)")


def run(args: argparse.Namespace) -> int:
    """Make the folder and say what is in it."""
    everything = find_chapters()
    if args.chapters is None:
        released = [chapter for chapter in everything if chapter.tasks]
    else:
        wanted = {find_chapter(text.strip()) for text in args.chapters.split(",") if text.strip()}
        released = [chapter for chapter in everything if chapter in wanted]
    if not released:
        raise CourseError("--chapters names no chapter")
    target = Path(args.folder)
    skeletons = release(target, released)
    print(f"Made {target}. For the students to write:")
    for path in skeletons:
        print(f"  {path.as_posix()}")
    before = [chapter.number for chapter in everything if chapter.number < released[0].number]
    print(f"Complete: chapters {', '.join(before)}." if before else "No chapter is complete.")
    missing = [chapter.notebook for chapter in released if not (target / chapter.notebook).is_file()]
    if missing:
        print(f"Not there to be copied: {', '.join(missing)}")
    print("No line of a solution is in its chapters, skeletons, tests or notebooks. pagebrain/, the engine, is complete.")
    return 0


_TOP_FILES = ("pyproject.toml", "requirements.txt", "LICENSE")
_MAKE_TARGETS = ("help", "demo", "lab", "clean")
_SUPPORT_LEFT_OUT = ("overlay.py",)  # it builds wrong solutions out of the right one
_JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", ".*cache", ".ipynb_checkpoints")
_SHORTEST_LINE = 20  # shorter ones (``return out``) say nothing
_LINES_NEAR = 8


def release(target: Path, released: Sequence[Chapter]) -> list[Path]:
    """Make the folder. Returns the files that are for the students to write, as paths in it. Raises ``CourseError``."""
    target = target.absolute()
    _check(target, released)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        skeletons = _build(building, released)
        if found := leaks(building, released):
            raise CourseError(f"nothing was released: {len(found)} lines of solutions would be in it, such as {found[0]}")
        building.chmod(0o755)
        if target.exists():
            target.rmdir()  # it is empty
        os.rename(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return [path.relative_to(building) for path in skeletons]


def solution_lines(released: Iterable[Chapter]) -> set[str]:
    """The lines, stripped, that only the solutions of these chapters hold; those that are public anyway are no secret."""
    chapters = list(released)
    secret: set[str] = set()
    public: set[str] = set()
    for chapter in find_chapters():
        regions = solution_regions(chapter) if chapter in chapters else ()
        inside = {number for region in regions for number in range(region.first + 1, region.last)}
        for number, line in enumerate(chapter.source.splitlines(), start=1):
            if chapter.number <= chapters[-1].number:
                (secret if number in inside else public).add(line.strip())
    return {line for line in secret - public if len(line) >= _SHORTEST_LINE}


def leaks(folder: Path, released: Iterable[Chapter]) -> list[str]:
    """Where lines of solutions stand in the chapters, the skeletons, the notebooks and the tests of a release.

    A test may need a line that a solution has too (``token_ids = list(prompt)``). In tests, only three of them within a few
    lines are a solution.
    """
    secret = solution_lines(released)
    found = []
    places = ("chapters/*.py", "chapters/aids/*.py", "chapters/lent/*", "work/*", "notebooks/*")
    for path in sorted(path for place in places for path in folder.glob(place)):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = _notebook_text(json.loads(text))
        lines = {line.strip() for line in text.splitlines()}
        found += [f"{path.relative_to(folder).as_posix()}: {line}" for line in sorted(secret & lines)]
    for path in sorted(folder.glob("tests/**/*.py")):
        name = path.relative_to(folder).as_posix()
        lines_of_test = path.read_text(encoding="utf-8").splitlines()
        known = [number for number, line in enumerate(lines_of_test) if line.strip() in secret]
        for number in known:
            near = {lines_of_test[other].strip() for other in known if abs(other - number) < _LINES_NEAR}
            if len(near) >= 3:
                found.append(f"{name}:{number + 1}: {lines_of_test[number].strip()}")
    return found


def without_solutions(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook without the cells tagged ``solution``, and without its tie to a text source that is not handed out."""
    cells = [cell for cell in notebook["cells"] if "solution" not in cell.get("metadata", {}).get("tags", [])]
    metadata = {key: value for key, value in notebook["metadata"].items() if key != "jupytext"}
    return {**notebook, "cells": cells, "metadata": metadata}


def _check(target: Path, released: Sequence[Chapter]) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CourseError(f"{target} is not empty: name a folder that does not exist yet")
    resolved = target.resolve()
    if any(resolved.is_relative_to(ROOT / name) for name in ("pagebrain", "chapters", "tests", "notebooks")):
        raise CourseError(f"{target} is inside what would be copied: name a folder elsewhere")
    for chapter in released:
        if chapter.is_skeleton:
            raise CourseError(f"chapter {chapter.number} is a skeleton here: release from a complete repository")
    numbers = [chapter.number for chapter in released]
    between = [other.number for other in find_chapters() if numbers[0] <= other.number <= numbers[-1]]
    if missing := [number for number in between if number not in numbers]:
        raise CourseError(f"chapter {missing[0]} is missing between the first and the last: release them in a row")


def _build(folder: Path, released: Sequence[Chapter]) -> list[Path]:
    """Fill the folder; returns the skeletons in ``work/``."""
    present = [chapter for chapter in find_chapters() if chapter.number <= released[-1].number]
    shutil.copytree(ROOT / "pagebrain", folder / "pagebrain", ignore=_JUNK)
    shutil.copytree(FOLDER / "course", folder / "chapters" / "course", ignore=_JUNK)
    skeletons = []
    for chapter in present:
        text = make_skeleton(chapter) if chapter in released else chapter.source
        _write(folder / "chapters" / chapter.path.name, text)
        if chapter in released:
            skeletons.append(folder / "work" / chapter.path.name)
            _write(skeletons[-1], text)
            _write(folder / "chapters" / "lent" / chapter.lent_file.name, pack(chapter))
    names = {chapter.name for chapter in present}
    for path in [*FOLDER.glob("*.py"), *FOLDER.glob("aids/*.py")]:
        if not re.match(r"ch\d\d_", path.name) and _chapters_of(path) <= names:
            _write(folder / "chapters" / path.relative_to(FOLDER), path.read_text(encoding="utf-8"))
    _copy_tests(folder / "tests", present)
    for chapter in present:
        _copy_notebook(folder, chapter, is_released=chapter in released)
    for name in _TOP_FILES:
        shutil.copy(ROOT / name, folder / name)
    _write(folder / "Makefile", _student_makefile((ROOT / "Makefile").read_text(encoding="utf-8")))
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    _write(folder / ".gitignore", "\n".join([*(line for line in ignored if line != "/work/"), "/work/.progress.json", ""]))
    _write(folder / "README.md", student_readme(released))
    return skeletons


def _student_makefile(text: str) -> str:
    """The Makefile with those commands that a copy has the files for."""
    rules = re.split(r"(?m)^(?=[a-z-]+:)", text)
    kept = [rule for rule in rules[1:] if rule.partition(":")[0] in _MAKE_TARGETS]
    # The environment's rule is at the end of the last one's text, with the comment that explains it.
    environment = re.search(r"(?ms)^# The environment .*", text)
    head = re.sub(r"(?m)^\.PHONY:.*$", f".PHONY: {' '.join(_MAKE_TARGETS)}", rules[0])
    body = "".join(re.sub(r"(?ms)^# The environment .*", "", rule) for rule in kept)
    return head + body + (environment[0] if environment else "")


def _copy_tests(folder: Path, present: Iterable[Chapter]) -> None:
    """The chapters' tests and what they need; nothing that is about wrong or alternative solutions."""
    left_out = shutil.ignore_patterns("__pycache__", *_SUPPORT_LEFT_OUT)
    shutil.copytree(ROOT / "tests" / "support", folder / "support", ignore=left_out)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "conftest.py")
    _write(folder / "chapters" / "conftest.py", (ROOT / "tests" / "chapters" / "conftest.py").read_text(encoding="utf-8"))
    for chapter in present:
        if chapter.test_file.is_file():
            shutil.copy(chapter.test_file, folder / "chapters" / chapter.test_file.name)


def _copy_notebook(folder: Path, chapter: Chapter, *, is_released: bool) -> None:
    source = ROOT / chapter.notebook
    if source.is_file():
        notebook = json.loads(source.read_text(encoding="utf-8"))
        if is_released:
            notebook = without_solutions(notebook)
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        _write(folder / chapter.notebook, text)
        for recording in set(re.findall(r"docs/performance/[\w-]+\.json", text)):  # what was measured on a GPU
            if (ROOT / recording).is_file():
                _write(folder / recording, (ROOT / recording).read_text(encoding="utf-8"))


def _chapters_of(path: Path) -> set[str]:
    """The chapters that a module of the package imports, by itself or through an aid."""
    found: set[str] = set()
    for node in ast.walk(parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found |= {name.split(".")[1] for name in names if re.match(r"chapters\.ch\d\d_", name)}
            aids = {FOLDER / "aids" / f"{name.split('.')[2]}.py" for name in names if name.startswith("chapters.aids.")}
            found |= {name for aid in aids if aid.is_file() for name in _chapters_of(aid)}
    return found


def _notebook_text(notebook: dict[str, Any]) -> str:
    """All that a reader can see in a notebook, highlighted code included."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        parts.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            parts.append("".join(output.get("text", [])))
            for kind, data in output.get("data", {}).items():
                text = "".join(data) if isinstance(data, list | str) else ""
                parts.append(html.unescape(re.sub(r"<[^>]*>", "", text)) if kind == "text/html" else text)
    return "\n".join(parts)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


_TEXT = """\
# PageBrain: your part

You build a serving engine for GPT-2, one chapter after the other. These chapters are yours to write:

{table}

{before}
{triton}

## Set up

```
make lab
```

makes an environment in `.venv` (once, in a few minutes) and opens the notebooks. On Windows, without `make`:

```
python -m venv .venv
.venv\\Scripts\\python -m pip install -r requirements.txt
.venv\\Scripts\\python -m pip install --no-deps -e .
.venv\\Scripts\\jupyter lab --notebook-dir=. --FileContentsManager.preferred_dir=notebooks
```

Run `source .venv/bin/activate` before the commands below, on Windows `.venv\\Scripts\\activate`.

## Work

1. Read `{notebook}`. Its outputs are stored in it. Its cells run on your file. Functions of tasks
   that are not done are lent, and a line says which.
2. Open `work/{name}.py`. In place of each task there is a `TodoError`. Replace it by your code. Keep
   the imports as they are: a file that imports more from `pagebrain` or `chapters` is not graded.
   Edit the file in `work/` only. `chapters/{name}.py` is the blank copy that `start` copies: it is
   neither checked nor graded.
3. Check one task, then all of them:

   ```
   python -m chapters check {task}
   python -m chapters check {number}
   ```

   A failure says what was got, what was expected and where, and gives a hint. `-v` shows all that pytest prints.
4. See it at work: `python -m chapters try {number}` runs the engine with your part in it (a block manager, attention or a
   scheduler). For other chapters it runs your `generate`, and for chapter 05 clients that come and go.

The tasks of a chapter can be done in any order. If the tests of a task call functions of other tasks that are not done
or not right, the check lends the right functions, and its report says so (`with 1.1 lent`). These functions come from
`chapters/lent/`, which holds the solutions as packed text. Reading them would spoil the tasks for you.

`python -m chapters list` shows the state of your tasks. `python -m chapters start {number} --force` begins a chapter
again and keeps your file in `work/old/`. If an earlier chapter is also yours to write, your own file of it is used.
`cp -pn ../earlier/work/*.py work/` copies your files from an earlier folder and leaves the new ones as they are.

Hand in the files in `work/`. They are graded by the tests in `tests/chapters`, with other random numbers than yours.
"""


_TRITON = """
Chapter 06 needs Triton, which exists for Linux on x86-64. No GPU is needed. On macOS or Windows, work on it in a Linux
container (Docker), in WSL 2 or in a Codespace, or read its notebook with the stored outputs. All other chapters run
everywhere.
"""
_BEFORE = "The chapters before them are complete in `chapters/`, to read and to build on."


def student_readme(released: Sequence[Chapter]) -> str:
    """What students read first."""
    first = released[0]
    lines = ["| chapter | your file | points | time |", "|---|---|---|---|"]
    lines += [f"| {c.number}: {c.title} | `work/{c.name}.py` | {c.points} | {c.effort} |" for c in released]
    return _TEXT.format(
        table="\n".join(lines),
        before="" if first.number == "00" else _BEFORE,
        triton=_TRITON if "06" in {chapter.number for chapter in released} else "",
        notebook=first.notebook,
        name=first.name,
        task=first.tasks[0].task_id if first.tasks else first.number,
        number=first.number,
    )
