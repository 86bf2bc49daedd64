"""What the README shows works: its Python runs, its options exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from chapters.course.cli import COMMANDS
from pagebrain.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
PYTHON_BLOCKS = [text for language, text in BLOCKS if language == "python"]
PLAIN_BLOCKS = [text for language, text in BLOCKS if not language]

SNIPPET = """\
block_manager = BlockManager(config)
cache_manager = CacheManager(block_manager, config)
model = PagedGPT2LMHeadModel(base, cache_manager).eval()
outputs = model(inputs["input_ids"], input_pos=input_pos, cache_pos=cache_pos)
"""


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_python_blocks_run_as_they_stand(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON_BLOCKS[number], f"README.md, Python block {number}", "exec"), {"__name__": "__main__"})


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
    lines = [line for block in PLAIN_BLOCKS for line in block.splitlines() if "pagebrain " in line and "pip" not in line]
    inline = re.findall(r"`(pagebrain [^`]*)`", README)
    commands = [shlex.split(line.rpartition("| ")[2]) for line in lines] + [shlex.split(command) for command in inline]
    assert len(commands) > 6
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
