"""``python -m chapters ladder`` on random tokens, from recorded numbers, and with a chapter that fails. No timings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from chapters.course.cli import main
from chapters.course.commands import ladder_
from chapters.course.recorded_runs import Record, room_for_all, run_chapter, run_engine
from pagebrain import LLM, PageBrainConfig
from pagebrain.engine.trace import StepTrace


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2 without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def chapters_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a baseline that works and a chapter that does not, beside the engine."""
    stages = ladder_._stages

    def broken() -> Record:
        raise RuntimeError("no kernel image")

    def some(*args: Any) -> list[Any]:
        first, *_, engine = stages(*args)
        return [first, ladder_._Stage("99_broken", broken, broken), engine]

    monkeypatch.setattr(ladder_, "_stages", some)


def ladder(model_folder: str, *options: str) -> int:
    random = ["--requests", "3", "--input-len", "4:9", "--max-new-tokens", "5"]
    return main(["ladder", "--model", model_folder, "--load-format", "dummy", "--device", "cpu", *random, *options])


def test_the_ladder_runs_on_random_tokens_without_a_tokenizer(
    model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ladder.json"
    assert ladder(model_folder, "--dtype", "float64", "--json", str(file), "--shared-prefix", "6") == 0
    assert "Every stage gives the same tokens." in capsys.readouterr().out
    report = json.loads(file.read_text(encoding="utf-8"))
    assert len(report["prompt_lens"]) == 3 and 10 <= min(report["prompt_lens"]) <= max(report["prompt_lens"]) <= 15
    assert report["load_format"] == "dummy" and report["command"] and report["date"] and report["versions"]["torch"]
    rows = {row["stage"]: row for row in report["stages"]}
    assert rows["engine"]["ms_per_token"] > 0 and rows["engine"]["equal_answers"] == 3
    assert rows["engine"]["kv_bytes"] == rows["02_block_table"]["kv_bytes"] > 0  # seen in the run before the timed one
    assert all("answers" not in row for row in report["stages"])


def test_recorded_numbers_are_shown_and_drawn_without_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"stage": "00_baseline", "tokens_per_s": 152.0, "ms_per_token": 6.5, "kv_bytes": 0}
    report = {
        "date": "2026-11-28",
        "model": "openai-community/gpt2",
        "load_format": "dummy",
        "dtype": "bfloat16",
        "prompt_lens": [64, 256],
        "max_new_tokens": 128,
        "versions": {"gpu": "NVIDIA H200", "processor": "?"},
        "stages": [row, row | {"stage": "engine", "tokens_per_s": 64_000.0}],
    }
    file, picture = tmp_path / "ladder.json", tmp_path / "ladder.png"
    file.write_text(json.dumps(report), encoding="utf-8")
    monkeypatch.setattr(ladder_, "_measure", None)
    assert main(["ladder", "--from-json", str(file), "--plot", str(picture)]) == 0
    assert "64,000" in capsys.readouterr().out and picture.stat().st_size > 1000
    note = ladder_.describe(report)
    assert note == (
        "GPT-2 124M, random weights, bfloat16; 2 requests at once, 64 to 256 tokens in, 128 out; NVIDIA H200, 2026-11-28"
    )


@pytest.mark.usefixtures("chapters_that_fail")
def test_a_chapter_that_fails_is_named_and_the_others_are_measured(
    model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ladder.json"
    assert ladder(model_folder, "--json", str(file)) == 1
    assert "99_broken: left out, it fails: RuntimeError: no kernel image" in capsys.readouterr().out
    stages = [row["stage"] for row in json.loads(file.read_text(encoding="utf-8"))["stages"]]
    assert stages == ["00_baseline", "engine"]


@pytest.mark.parametrize(("dtype", "is_red"), [("bfloat16", False), ("float32", True)])
def test_other_tokens_are_counted_and_excused_only_where_sums_are_short(
    dtype: str, is_red: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    rows: list[dict[str, Any]] = [
        {"stage": "03", "answers": [[1], [2], [3]]},
        {"stage": "engine", "answers": [[1], [9], [3]]},
    ]
    ladder_._compare_answers({"stages": rows, "dtype": dtype}, Console(highlight=False))
    said = capsys.readouterr().out
    assert "03 (2 of 3 the same)" in said and ("These give other tokens" in said) is is_red
    assert [row["equal_answers"] for row in rows] == [2, 3]


def test_what_an_unwatched_run_tells_is_what_a_watched_one_saw() -> None:
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    llm = LLM(GPT2LMHeadModel(config).double().eval(), device="cpu")
    prompts = [[5, 6, 7], [8, 9]]
    watched, unwatched = run_engine(llm, prompts, 6), run_engine(llm, prompts, 6, watch=False)
    assert watched.answers == unwatched.answers and watched.traces and not unwatched.traces
    assert [count + 1 for _, count in unwatched.spans] == [len(answer) for answer in unwatched.answers]
    assert unwatched.seconds_per_token is not None and 0 < unwatched.seconds_per_token < unwatched.seconds


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--requests", "0"], "--requests must be at least 1"),
        (["--requests", "2", "--shared-prefix", "-1"], "--shared-prefix must be at least 0, got -1"),
        (["--input-len", "9:4"], "--input-len must be LOW:HIGH"),
        (["--max-new-tokens", "60"], "64 positions"),
    ],
)
def test_mistakes_are_one_line(model_folder: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder(model_folder, *options) == 2
    assert said in capsys.readouterr().err


def test_without_a_tokenizer_it_says_what_to_use(model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", "--model", model_folder, "--load-format", "dummy", "--device", "cpu"]) == 2
    assert "use --requests N" in capsys.readouterr().err


def test_a_chapter_is_timed_from_its_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes once before, such as a CUDA graph, does not count."""
    now = 100.0
    monkeypatch.setattr("chapters.course.recorded_runs.time.monotonic", lambda: now)

    def generate(model: Any, prompts: Any, max_new_tokens: int, on_logits: Any, *, on_step: Any) -> list[list[int]]:
        nonlocal now
        now += 30.0  # making what it needs
        empty: dict[int, Any] = {}
        on_step(StepTrace(0, (), empty, (), empty, num_blocks=1, block_size=1, launched_s=now))
        now += 2.0
        return [[1, 2]]

    record = run_chapter(generate, None, [[5]], 2)  # type: ignore[arg-type]
    assert record.seconds == 2.0 and record.answers == [[1, 2]] and len(record.traces) == 1


def test_every_chapter_that_takes_a_config_gets_room_for_all_requests(model_folder: str) -> None:
    model = GPT2LMHeadModel(GPT2Config.from_pretrained(model_folder))
    prompts = [[1] * 30, [2] * 3, [3]]
    config = room_for_all(model, prompts, 20)
    assert (config.max_num_seqs, config.num_blocks, config.max_model_len) == (3, 4 + 2 + 2, 50) and config.async_scheduling
    given: list[PageBrainConfig | None] = []

    def taking(*args: Any, config: PageBrainConfig) -> list[list[int]]:
        given.append(config)
        return [[0]]

    run_chapter(taking, model, prompts, 20, config=config)
    run_chapter(lambda *args: [[0]], model, prompts, 20, config=config)
    assert given == [config]
