"""What README, the page about generating text and the server's page show works: their Python runs, their options exist.

README is short, its links lead somewhere, and its tree, its hours and its number of lines are those of the repository.
"""

import contextlib
import functools
import io
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chapters.course.catalog import find_chapters
from chapters.course.cli import COMMANDS
from pagebrain.cli import main
from tests.support.served import Served

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/generate.md", "docs/server.md")}
BLOCKS = [
    (page, language, text)
    for page, whole in PAGES.items()
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", whole, flags=re.DOTALL | re.MULTILINE)
]
PYTHON_BLOCKS = [(page, text) for page, language, text in BLOCKS if language == "python"]
ALONE = [(page, text) for page, text in PYTHON_BLOCKS if "http://" not in text]
WITH_SERVER = [text for _, text in PYTHON_BLOCKS if "http://" in text]
PLAIN_BLOCKS = [text for _, language, text in BLOCKS if not language]

SNIPPET = """\
block_manager = BlockManager(config)
cache_manager = CacheManager(block_manager, config)
model = PagedGPT2LMHeadModel(base, cache_manager).eval()
outputs = model(inputs["input_ids"], input_pos=input_pos, cache_pos=cache_pos)
"""


@functools.cache
def run_block(page: str, text: str) -> tuple[dict[str, Any], str]:
    """Run a Python block as it stands, once for all tests: the names that it leaves, and what it prints."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(text, page, "exec"), names)
    return names, out.getvalue()


@pytest.mark.parametrize(("page", "text"), ALONE, ids=[f"{page}-{number}" for number, (page, _) in enumerate(ALONE)])
def test_python_blocks_run_as_they_stand(page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, out = run_block(page, text)
    assert out.strip()


def test_clients_work_as_they_stand_against_the_server_as_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(WITH_SERVER) == 2
    with Served() as served:
        for block in WITH_SERVER:
            exec(compile(block.replace("http://127.0.0.1:8000", served.url), "a page", "exec"), {"__name__": "__main__"})
            assert len(capsys.readouterr().out.split()) > 10


def test_the_model_is_shown_with_its_cache_made_by_hand() -> None:
    [block] = [text for page, text in ALONE if SNIPPET in text and page == "docs/generate.md"]
    assert "assert generated == expected" in block


def test_streaming_prints_what_generate_returns() -> None:
    [block] = [block for block in ALONE if "llm.stream" in block[1]]
    names, out = run_block(*block)
    text = names["llm"].generate("Once upon a time", names["params"], use_tqdm=False)[0].outputs[0].text
    assert text and out.startswith(f"Once upon a time{text}\n") and out.endswith(text)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    code = [line for page, text in PYTHON_BLOCKS if page == "README.md" for line in text.splitlines()]
    assert 0 < len(code) <= 14  # and `pagebrain serve`: generate and serve in 15 lines


def test_the_hours_are_those_of_the_chapters() -> None:
    hours = {chapter.number: float(re.findall(r"[\d.]+", chapter.effort)[0]) for chapter in find_chapters()}
    rows = re.findall(r"^\| \[(\d\d)\]\(notebooks/\S+\) \| .+ \| ([\d.]+) \|$", README, flags=re.MULTILINE)
    assert {number: float(stated) for number, stated in rows} == hours
    assert f"The chapters take about {sum(hours.values()):g} hours." in README


def test_the_tree_names_every_folder_and_module_of_the_package() -> None:
    tree = README.partition("```\npagebrain/\n")[2].partition("```")[0]
    named = set()
    for line in tree.splitlines():
        for word in line.strip().split():
            if not re.fullmatch(r"[a-z_]+(?:/|\.py)", word):
                break
            named.add(word)
    found = {f"{path.name}/" for path in (ROOT / "pagebrain").iterdir() if path.is_dir() and not path.name.startswith("_")}
    found |= {path.name for path in (ROOT / "pagebrain").glob("[!_]*.py")}
    assert named == found


def test_the_number_of_lines_of_the_core_is_right_within_5_percent() -> None:
    [(stated, command)] = re.findall(r"It has ([\d,]+) lines, counted by\s+`([^`]+)`", README)
    counted = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(stated.replace(",", "")) == pytest.approx(int(counted), rel=0.05)


def test_command_lines_have_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in PLAIN_BLOCKS for line in block.splitlines() if re.match(r"(echo .*\| )?pagebrain ", line)]
    inline = re.findall(r"`(pagebrain [^`]*)`", README + PAGES["docs/generate.md"])
    lines = [line.rpartition("| ")[2] for line in lines]
    commands = [shlex.split(command, comments=True) for command in (*lines, *inline)]
    assert len(commands) > 10
    for _, command, *arguments in commands:
        assert main([command, "--help"]) == 0
        known = set(re.findall(r"--?[a-z][a-z-]*", capsys.readouterr().out))
        if command == "bench":
            continue
        unknown = {argument for argument in arguments if argument.startswith("-")} - known
        assert not unknown, f"pagebrain {command} has no {unknown}"


def test_commands_of_the_course_exist() -> None:
    named = set(re.findall(r"python -m chapters (\w+)", README))
    assert {"list", "start", "check", "try", "release", "grade"} <= named <= set(COMMANDS)


def test_files_that_are_named_exist() -> None:
    links = re.findall(r"\]\(([^):#]+)\)", README)
    listed = re.findall(r"`([a-z0-9_/]+(?:\.py|/))`", README)
    assert "docs/figures/data-path.svg" in links and "block.py" not in links
    for name in links:
        assert (ROOT / name).is_file(), name
    for name in listed:
        if name != "work/":
            assert any((ROOT / folder / name).exists() for folder in (".", "pagebrain", "chapters")), name
