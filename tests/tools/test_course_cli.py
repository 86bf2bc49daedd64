"""The course tool as a learner uses it: start, list, check, diff, try, ladder; and what it says to mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chapters.course import imports_guard
from chapters.course.catalog import FOLDER, ROOT, Chapter, CourseError, find_chapters
from chapters.course.cli import COMMANDS, main
from chapters.course.commands.list_ import save_progress
from chapters.course.commands.start_ import start_file
from chapters.course.commands.try_ import _run as try_run
from chapters.course.recorded_runs import Record
from chapters.course.running import Run
from chapters.course.visiting_clients import Visit, Visits
from chapters.course.workspace import Snapshot
from tests.support.kernels import require_kernels

FIRST = FOLDER / "ch00_baseline.py"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGEBRAIN_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "work"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.startswith("chapters: error: ") and said.count("\n") == 1, said
    return said


def test_start_writes_a_file_that_does_nothing_yet_and_says_what_comes_next(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["start", "0", "ch04_scheduler"]) == 0
    assert sorted(path.name for path in work.iterdir()) == ["ch00_baseline.py", "ch04_scheduler.py"]
    assert "raise TodoError(" in (work / "ch00_baseline.py").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert "python -m chapters check 00" in said and "notebooks/04_scheduler.ipynb" in said


def test_start_never_overwrites_and_force_keeps_the_old_file_with_its_date(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["start", "00"])
    mine = work / "ch00_baseline.py"
    mine.write_text("mine", encoding="utf-8")
    capsys.readouterr()
    assert main(["start", "00"]) == 2
    assert "was left as it is" in one_line(capsys)
    assert mine.read_text(encoding="utf-8") == "mine"
    for _ in range(2):  # also twice in the same second
        assert main(["start", "00", "--force"]) == 0
    kept = sorted((work / "old").iterdir())
    assert len(kept) == 2 and re.search(r"ch00_baseline_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", kept[0].name)
    assert "mine" in [path.read_text(encoding="utf-8") for path in kept]


def test_a_full_disk_loses_nothing(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    work.mkdir()
    mine = work / "ch00_baseline.py"
    mine.write_text("mine", encoding="utf-8")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["start", "00", "--force"]) == 2
    assert "No space left on device; nothing was changed" in one_line(capsys)
    assert [path.name for path in work.iterdir()] == ["ch00_baseline.py"] and mine.read_text(encoding="utf-8") == "mine"


def test_a_dangling_link_is_not_overwritten_either(work: Path) -> None:
    work.mkdir()
    (work / "file.py").symlink_to(work / "nowhere")
    with pytest.raises(CourseError, match="is there already"):
        start_file(work / "file.py", "text", force=False)


def test_list_shows_where_each_task_stands_and_forgets_a_verdict_when_the_file_changes(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def states() -> dict[str, str]:
        capsys.readouterr()
        assert main(["list"]) == 0
        rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
        return {row[0]: row[-1] for row in rows if re.fullmatch(r"\d\.\d", row[0])}

    assert set(states().values()) == {"not started"}
    assert len(states()) == sum(len(chapter.tasks) for chapter in find_chapters())
    main(["start", "00"])
    assert states()["0.1"] == "to do"
    shutil.copy(FIRST, work)
    assert states()["0.2"] == "not checked"
    chapter = find_chapters()[0]
    snapshot = Snapshot.take(work / FIRST.name)
    save_progress(work, chapter, snapshot, {"0.1": True}, {})
    save_progress(work, chapter, snapshot, {"0.2": False}, {})
    assert (states()["0.1"], states()["0.2"], states()["1.1"]) == ("passed", "failed", "not started")
    with (work / FIRST.name).open("a", encoding="utf-8") as file:
        file.write("\n")
    assert states()["0.1"] == "not checked"
    (work / ".progress.json").write_text("[1, 2", encoding="utf-8")
    assert states()["0.1"] == "not checked"


def test_check_tells_a_right_task_from_a_wrong_one_and_remembers_it(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work.mkdir()
    source = FIRST.read_text(encoding="utf-8")
    wrong = source.replace("return token_ids[len(prompt) :]", "return token_ids")
    assert wrong != source
    (work / FIRST.name).write_text(wrong, encoding="utf-8")
    assert main(["check", "00", "--gradescope", str(tmp_path / "results.json")]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"Checking {re.escape(str(work))}/ch00_baseline.py, modified [\d: -]+, sha256 [0-9a-f]{{12}}", said)
    assert re.search(r"0\.1 .* 4/4 .* passed", said) and re.search(r"0\.2 .* 0/6 .* failed", said)
    assert "Hint: " in said and "6 of 12 points: 2 of 3 tasks pass" in said
    assert "Traceback" not in said and "assert " not in said
    scores = {test["number"]: test["score"] for test in json.loads((tmp_path / "results.json").read_text("utf-8"))["tests"]}
    assert scores == {"0.1": 4, "0.2": 0, "0.3": 2}
    main(["list"])
    assert re.search(r"0\.1 .* passed", capsys.readouterr().out)


def test_check_of_one_task_that_passes_has_status_0_and_speaks_json(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def all_pass(chapter: Chapter, path: Path, tasks: list[str], **settings: Any) -> Run:
        asked.extend(tasks)
        return Run({"t": {"outcome": "passed", "seconds": 0.5}}, {"t": tasks[0]}, "t", loaded=True, done=True)

    monkeypatch.setattr("chapters.course.grading.run_tests", all_pass)
    work.mkdir()
    shutil.copy(FIRST, work)
    assert main(["check", "0.1", "--json", "--mine"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert asked == ["0.1"] == [task["task"] for task in found["tasks"]]
    assert found["passed"] and found["points"] == 4 == found["max_points"]


def test_earlier_chapters_are_the_learners_own_with_mine(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["start", "00", "01"])
    shutil.copy(FOLDER / "ch01_naive_kv_cache.py", work)
    capsys.readouterr()
    assert main(["check", "1.3", "--mine"]) == 0
    said = capsys.readouterr().out
    assert f"Earlier chapters: yours for {work}/ch00_baseline.py" in said
    assert "with 0.1 lent" in said and "Lent: the reference's functions stood for yours" in said


@pytest.mark.parametrize("way", ["symlink", "hard link"])
def test_a_link_to_the_reference_is_not_checked(work: Path, capsys: pytest.CaptureFixture[str], way: str) -> None:
    work.mkdir()
    if way == "symlink":
        (work / FIRST.name).symlink_to(FIRST)
    else:
        try:
            os.link(FIRST, work / FIRST.name)
        except OSError:
            pytest.skip("another file system")
    assert main(["check", "00"]) == 2
    assert "chapters/ch00_baseline.py itself" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "00"], "python -m chapters start 00"),
        (["check", "77"], "there is no chapter '77'; the chapters are 00, 01"),
        (["check", "0.9"], "chapter 00 has no task '0.9'; its tasks are 0.1, 0.2, 0.3"),
        (["check", "0.1", "1.1"], "one chapter at a time"),
        (["check"], "the following arguments are required"),
        (["check", "00", "--memory", "-1"], "--memory at least 0"),
        (["check", "00", "--file", "/"], "is not a file"),
        (["start", "²"], "there is no chapter"),
        (["diff", "00"], "name two chapters"),
        (["diff", "02", "01"], "compare an earlier chapter with a later one"),
        (["try", "03"], "python -m chapters start 03"),
        (["ladder", "--max-new-tokens", "0"], "at least 1"),
        (["ladder", "--model", "/no/such/folder"], "/no/such/folder"),
        (["ladder", "--prompts", "/no/such/file"], "/no/such/file"),
        (["grade", "/no/such/folder"], "is not a folder"),
        (["no-such-command"], "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_of_the_user_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "usage: python -m chapters" in capsys.readouterr().out


def test_diff_prints_what_is_kept_replaced_and_new(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "01", "02", "--roles"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"cache +\+ +BlockManager", said)
    assert re.search(r"~ +PagedCache replaces ReservedCache", said)
    assert re.search(r"attention += +masked_attention", said)
    assert "class BlockManager" not in said


def test_diff_shows_the_code_of_what_is_replaced_and_new(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "01", "02"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "-class ReservedCache:" in lines and "+class PagedCache:" in lines and "+class BlockManager:" in lines
    cache = lines.index("PagedCache replaces ReservedCache (chapter 02, was 01)")
    assert lines.index("-class ReservedCache:") > cache > lines.index("+class BlockManager:")
    assert not [line for line in lines if "SOLUTION" in line or line.startswith(("---", "+++"))]
    assert "+def masked_attention(" not in lines, "it is kept"
    assert "     max_new_tokens: int," in lines, "a line that stays has neither sign"


def test_try_runs_the_engine_with_the_learners_part(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work.mkdir()
    scheduler = (FOLDER / "ch04_scheduler.py").read_text(encoding="utf-8")
    (work / "ch04_scheduler.py").write_text(scheduler, encoding="utf-8")
    assert main(["try", "04", "--max-new-tokens", "60"]) == 0
    said = capsys.readouterr().out
    assert "Once upon a time" in said and "The pool at step" in said and "x" in said.partition("x preempted")[2]
    assert "Every token is the one that the engine gives by itself." in said


def test_try_of_the_server_shows_clients_that_arrive_stream_and_leave(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work.mkdir()
    server = (FOLDER / "ch05_server.py").read_text(encoding="utf-8")
    (work / "ch05_server.py").write_text(server, encoding="utf-8")
    assert main(["try", "05", "--max-new-tokens", "20"]) == 0
    said = capsys.readouterr().out
    clients = {line[0]: line.split() for line in said.splitlines() if line.rstrip().endswith(("leaves early", "reads all"))}
    arrived, tokens, steps = ([int(clients[name][column]) for name in "ABCD"] for column in (1, 4, 5))
    assert arrived[0] == 0 and arrived == sorted(set(arrived)), "the clients arrive one after the other"
    assert tokens == [20, 4, 20, 20] and clients["B"][-2:] == ["leaves", "early"]
    assert all(steps[number] >= tokens[number] for number in range(4))
    assert "32 of 32 blocks are free in the end" in said and "Every token is the one" in said
    assert "The pool at step" not in said
    for line, other, expected in (
        ("self.engine.finish(client.seq)", "pass", "KeyError"),
        ("seq.token_ids[-1])", "seq.token_ids[-1] + 1)", "departs at output token 0"),
    ):
        assert server.count(line) == 1
        (work / "ch05_server.py").write_text(server.replace(line, other), encoding="utf-8")
        assert main(["try", "05", "--max-new-tokens", "60"]) == 1
        assert expected in "".join(capsys.readouterr())


def test_try_of_the_server_says_that_clients_wait(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``generate`` has all clients before the first step, so that only clients that come later show a lost arrival."""
    monkeypatch.setattr("chapters.course.visiting_clients.PATIENCE_S", 0.2)
    work.mkdir()
    server = (FOLDER / "ch05_server.py").read_text(encoding="utf-8")
    wrong = server.replace("for client in self.arrived:\n", "for client in self.arrived[: 9 * (not self.clients)]:\n")
    assert wrong != server
    (work / "ch05_server.py").write_text(wrong, encoding="utf-8")
    assert main(["try", "05", "--max-new-tokens", "20"]) == 1
    assert "No step has ended for 0.2 s, and clients still wait" in capsys.readouterr().out


def test_blocks_of_clients_that_have_gone_are_a_problem() -> None:
    one = Visit(tokens=[1, 2], is_early=True)
    assert not Visits([one], [], 32, num_free=32).problem([[1, 2, 3]])
    assert "2 of 32 blocks are not free, and clients holds 1" in Visits([one], [], 32, 30, 1).problem([[1, 2, 3]])
    assert "Client A streamed the tokens [1, 2], expected [1, 9]" in Visits([one], [], 32, 32).problem([[1, 9, 3]])


def test_try_of_kernels_without_a_gpu_says_that_they_are_interpreted_and_begins_small(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_kernels("cpu")
    work.mkdir()
    kernels = (FOLDER / "ch06_kernels.py").read_text(encoding="utf-8")
    (work / "ch06_kernels.py").write_text(kernels, encoding="utf-8")
    asked: list[tuple[int, int]] = []

    def run(chapter: Chapter, module: Any, prompts: list[list[int]], max_new_tokens: int) -> Record:
        asked.append((len(prompts), max_new_tokens))
        return try_run(chapter, module, prompts, max_new_tokens)

    monkeypatch.setattr("chapters.course.commands.try_._run", run)
    assert main(["try", "06", "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr().out
    assert "Triton's interpreter runs the kernels" in said and "Every token is the one" in said
    assert asked == [(1, 2), (4, 3)]


def test_try_says_in_which_line_of_their_file_a_learners_part_fails(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["start", "03"])
    assert main(["try", "03"]) == 1
    assert "chapters: not done yet: Task 3.3" in capsys.readouterr().err
    attention = (FOLDER / "ch03_paged_attention.py").read_text(encoding="utf-8")
    (work / "ch03_paged_attention.py").write_text(attention.replace(".diff()", ".difference()"), encoding="utf-8")
    assert main(["try", "03"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"AttributeError: .*difference.* \(in your file, ch03_paged_attention.py:\d+: query_lens = ", said)


def test_try_shows_where_a_learners_tokens_depart(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work.mkdir()
    source = FIRST.read_text(encoding="utf-8").replace("int(logits.argmax())", "int(logits[1:].argmax())")
    (work / FIRST.name).write_text(source, encoding="utf-8")
    assert main(["try", "00", "--max-new-tokens", "3", "--prompt", "Once upon a time"]) == 1
    assert "Story A departs at output token 0" in capsys.readouterr().out


def test_the_ladder_runs_every_chapter_and_the_engine_on_the_same_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n\nOne morning Mia\n", encoding="utf-8")
    options = ["--max-new-tokens", "4", "--prompts", str(prompts), "--device", "cpu", "--dtype", "float64"]
    assert main(["ladder", *options, "--json", str(tmp_path / "l.json"), "--plot", str(tmp_path / "l.png")]) == 0
    said = capsys.readouterr().out
    assert "Every stage gives the same tokens." in said
    assert "06_kernels: left out, without a GPU its kernels are interpreted" in said
    report = json.loads((tmp_path / "l.json").read_text(encoding="utf-8"))
    stages = {row["stage"]: row for row in report["stages"]}
    assert [*stages] == [chapter.name[2:] for chapter in find_chapters() if chapter.number != "06"] + ["engine"]
    assert all(row["tokens"] == 8 and row["tokens_per_s"] > 0 and row["ms_per_token"] > 0 for row in stages.values())
    assert stages["00_baseline"]["kv_bytes"] == 0
    reserved = 2 * (max(report["prompt_lens"]) + 4)  # tokens
    token_bytes = stages["01_naive_kv_cache"]["kv_bytes"] / reserved
    assert stages["02_block_table"]["kv_bytes"] == 2 * 16 * token_bytes
    assert (tmp_path / "l.png").stat().st_size > 1000


ALLOWED = "from pagebrain import PageBrainConfig\nfrom chapters import ch02_block_table\nimport math\n"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import pagebrain", 1),
        ("x = 1\nimport pagebrain.attention as a", 2),
        ("from pagebrain import LLM", 1),
        ("from pagebrain import *", 1),
        ("def f():\n    from chapters.ch03_paged_attention import paged_attention", 2),
        ("from chapters import ch03_paged_attention", 1),
        ("from . import ch02_block_table", 1),
        ("import importlib", 1),
        ("from importlib import import_module", 1),
        ("import runpy", 1),
        ("f = __import__", 1),
        ("exec('1')", 1),
        ("eval('1')", 1),
        ("compile('1', '', 'exec')", 1),
        ("import sys\nsys.modules['pagebrain']", 2),
        ("import sys as s\nm = s.modules", 2),
        ("import torch\ntorch.sys.modules['pagebrain']", 2),
        ("f = torch.__loader__", 1),
        ("__spec__.loader", 1),
        ("f.__globals__", 1),
        ("from torch import builtins", 1),
        ("from sys import modules", 1),
        ("from tests.support import overlay", 1),
    ],
)
def test_the_guard_names_the_line_of_an_import_that_a_skeleton_does_not_have(source: str, line: int) -> None:
    found = imports_guard.forbidden_imports(source, ALLOWED)
    assert len(found) == 1 and found[0].startswith(f"line {line}: ") and "not allowed" in found[0]


def test_the_guard_lets_everything_else_pass() -> None:
    source = ALLOWED + "import sys, re, torch\nfrom chapters import TodoError\nre.compile('x')\nmodel.eval()\nsys.path\n"
    source += "list(model.modules())\nmodel.named_modules\n"
    assert imports_guard.forbidden_imports(source, ALLOWED) == []


def test_the_guard_quotes_an_import_as_it_is_written() -> None:
    found = imports_guard.forbidden_imports("import math, pagebrain.attention as a\nfrom pagebrain import LLM as L", ALLOWED)
    assert "`import pagebrain.attention as a`" in found[0] and "`from pagebrain import LLM as L`" in found[1]


def test_modules_that_a_skeleton_does_not_import_are_named() -> None:
    found = imports_guard.additional_modules
    assert found("import math\nfrom chapters import TodoError\nimport chapters.ch02_block_table", ALLOWED) == []
    source = "import os.path, torch.nn as n\nfrom collections import deque\nmath.sys\nfrom math import inspect"
    assert found(source, ALLOWED) == ["collections", "math.inspect", "math.sys", "os.path", "torch.nn"]
    assert found("import torch.nn.functional", "import torch") == []


def test_mine_without_a_file_of_ones_own_says_so(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["start", "01"])
    capsys.readouterr()
    assert main(["check", "01", "--mine"]) == 1
    assert "Earlier chapters: none of yours was found (--mine); the reference for 00" in capsys.readouterr().out


def test_the_tool_runs_from_any_folder() -> None:
    done = subprocess.run(
        [sys.executable, "../chapters", "diff", "02"], cwd=ROOT / "tests", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "BlockManager" in done.stdout, done.stderr
