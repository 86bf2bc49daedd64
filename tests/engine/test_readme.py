"""What README and the server's page show works: their Python runs, their options exist, README's links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from chapters.course.cli import COMMANDS
from pagebrain.cli import main
from tests.support.served import Served

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
SERVER_PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
SERVER_BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", SERVER_PAGE, flags=re.DOTALL | re.MULTILINE)
PYTHON_BLOCKS = [text for language, text in BLOCKS if language == "python"]
ALONE = [text for text in PYTHON_BLOCKS if "http://" not in text]
WITH_SERVER = [text for language, text in (*BLOCKS, *SERVER_BLOCKS) if language == "python" and "http://" in text]
PLAIN_BLOCKS = [text for language, text in (*BLOCKS, *SERVER_BLOCKS) if not language]

SNIPPET = """\
block_manager = BlockManager(config)
cache_manager = CacheManager(block_manager, config)
model = PagedGPT2LMHeadModel(base, cache_manager).eval()
outputs = model(inputs["input_ids"], input_pos=input_pos, cache_pos=cache_pos)
"""


@pytest.mark.parametrize("number", range(len(ALONE)))
def test_python_blocks_run_as_they_stand(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(ALONE[number], f"README.md, Python block {number}", "exec"), {"__name__": "__main__"})


def test_clients_work_as_they_stand_against_the_server_as_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(WITH_SERVER) == 2
    with Served() as served:
        for block in WITH_SERVER:
            exec(compile(block.replace("http://127.0.0.1:8000", served.url), "a page", "exec"), {"__name__": "__main__"})
            assert len(capsys.readouterr().out.split()) > 10


def test_the_model_is_shown_with_its_cache_made_by_hand() -> None:
    [block] = [block for block in PYTHON_BLOCKS if SNIPPET in block]
    assert "assert generated == expected" in block


def test_streaming_prints_what_generate_returns(capsys: pytest.CaptureFixture[str]) -> None:
    [block] = [block for block in PYTHON_BLOCKS if "llm.stream" in block]
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block, "README.md", "exec"), names)
    out = capsys.readouterr().out
    text = names["llm"].generate("Once upon a time", names["params"], use_tqdm=False)[0].outputs[0].text
    assert text and out.startswith(f"Once upon a time{text}\n") and out.endswith(text)


def test_command_lines_have_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in PLAIN_BLOCKS for line in block.splitlines() if re.match(r"(echo .*\| )?pagebrain ", line)]
    inline = re.findall(r"`(pagebrain [^`]*)`", README)
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
