"""The command line as a user meets it: what it prints, where, and with which exit status."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pagebrain import LLM, SamplingParams, __version__
from pagebrain.assets import BUNDLED_MODEL
from pagebrain.cli import COMMANDS, main
from pagebrain.cli.frame import INTERRUPTED, PIPE_CLOSED
from pagebrain.engine.engine import Engine
from pagebrain.errors import ModelLoadError

PROMPT = "Once upon a time"
GREEDY = ("--temperature", "0", "--ignore-eos")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process; returns its exit status, standard output and standard error."""

    def run(*argv: str) -> tuple[int, str, str]:
        status = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def pipe_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts bytes on standard input."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture(scope="module")
def expected() -> str:
    """What the library generates for the same request."""
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    return LLM().generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))


def in_a_new_process(*argv: str, **settings: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pagebrain", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)  # type: ignore[call-overload]


# What works -----------------------------------------------------------------------------------------------------------


def test_generate_prints_the_continuation_and_nothing_else(run: Run, expected: str) -> None:
    assert run("generate", PROMPT, "--max-tokens", "24", *GREEDY) == (0, expected.rstrip("\n") + "\n", "")


def test_text_is_printed_as_it_is_generated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    printed_at_step: list[int] = []
    step = Engine.step

    def watched(engine: Engine) -> object:
        printed_at_step.append(sys.stdout.tell())
        return step(engine)

    monkeypatch.setattr(Engine, "step", watched)
    assert run("generate", PROMPT, "--max-tokens", "24", *GREEDY)[0] == 0
    assert len(set(printed_at_step)) > 4


@pytest.mark.parametrize("arguments", [["generate", "-"], ["generate"]], ids=["dash", "piped"])
def test_prompt_is_read_from_standard_input(
    run: Run, pipe_in: Callable[[bytes], None], expected: str, arguments: list[str]
) -> None:
    pipe_in(PROMPT.encode() + b"\n")
    status, out, _ = run(*arguments, "--max-tokens", "24", *GREEDY)
    assert (status, out) == (0, expected.rstrip("\n") + "\n")


def test_json_holds_text_tokens_usage_and_timings(run: Run, expected: str) -> None:
    arguments = ("--max-tokens", "24", "--logprobs", "2", "--prompt-logprobs", "0", "--json", *GREEDY)
    status, out, err = run("generate", PROMPT, *arguments)
    report = json.loads(out)
    [sample] = report["outputs"]
    assert (status, err) == (0, "")
    assert sample["text"] == expected
    assert sample["finish_reason"] == "length"
    assert len(sample["token_ids"]) == len(sample["logprobs"]) == 24
    assert all(len(entry["top"]) == 2 for entry in sample["logprobs"])
    num_prompt = len(report["prompt_token_ids"])
    assert len(report["prompt_logprobs"]) == num_prompt and report["prompt_logprobs"][0] is None
    assert report["usage"] == {"prompt_tokens": num_prompt, "completion_tokens": 24, "total_tokens": num_prompt + 24}
    assert 0 <= report["timings"]["queued_s"] <= report["timings"]["first_token_s"] <= report["timings"]["total_s"]


def test_every_sampling_option_reaches_the_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingParams] = []
    add_request = Engine.add_request

    def watched(engine: Engine, prompt: str, params: SamplingParams, **options: object) -> object:
        seen.append(params)
        return add_request(engine, prompt, params, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "add_request", watched)
    wanted = SamplingParams(
        n=2, temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2,
        frequency_penalty=-0.3, logit_bias={5: -100.0, 6: 1.5}, max_tokens=3, min_tokens=2, stop=("zzz", "."),
        stop_token_ids=(7, 8), ignore_eos=True, seed=11, logprobs=1, prompt_logprobs=2,
        include_stop_str_in_output=True, skip_special_tokens=False,
    )  # fmt: skip
    options = (
        "-n 2 --temperature 0.7 --top-p 0.9 --top-k 20 --min-p 0.01 --repetition-penalty 1.1 --presence-penalty 0.2 "
        "--frequency-penalty -0.3 --logit-bias 5=-100 --logit-bias 6=1.5 --max-tokens 3 --min-tokens 2 --stop zzz --stop . "
        "--stop-token-ids 7,8 --ignore-eos --seed 11 --logprobs 1 --prompt-logprobs 2 --include-stop-str-in-output "
        "--no-skip-special-tokens --json"
    )
    assert run("generate", PROMPT, *options.split())[0] == 0
    assert seen == [wanted]


def test_engine_options_reach_the_config(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    make = LLM.__init__

    def watched(llm: LLM, **settings: object) -> None:
        seen.update(settings)
        make(llm, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(LLM, "__init__", watched)
    options = (
        "--load-format auto --dtype float64 --device cpu --block-size 4 --num-blocks 50 --memory-fraction 0.1 "
        "--max-num-seqs 3 --max-num-batched-tokens 9 --max-model-len 60 --async-scheduling --engine-seed 5 "
        "--check-integrity --max-tokens 4 --part block_manager=pagebrain.block:BlockManager"
    )
    folders = ("--model", str(BUNDLED_MODEL), "--tokenizer", str(BUNDLED_MODEL))
    assert run("generate", PROMPT, *folders, *options.split())[0] == 0
    assert seen == {
        "model": str(BUNDLED_MODEL), "tokenizer": str(BUNDLED_MODEL), "load_format": "auto", "dtype": "float64",
        "device": "cpu", "block_size": 4, "num_blocks": 50, "memory_fraction": 0.1, "max_num_seqs": 3,
        "max_num_batched_tokens": 9, "max_model_len": 60, "async_scheduling": True, "seed": 5, "check_integrity": True,
        "parts": {"block_manager": "pagebrain.block:BlockManager"},
    }  # fmt: skip


def test_samples_are_printed_in_order_under_headers(run: Run) -> None:
    _, report, _ = run("generate", PROMPT, "--max-tokens", "30", "--seed", "3", "-n", "3", "--json")
    status, out, _ = run("generate", PROMPT, "--max-tokens", "30", "--seed", "3", "-n", "3")
    samples = json.loads(report)["outputs"]
    headers = [
        f"--- sample {i} of 3: {len(sample['token_ids'])} tokens, {sample['finish_reason']} ---"
        for i, sample in enumerate(samples, start=1)
    ]
    assert status == 0
    assert out == "\n".join(f"{header}\n{sample['text']}\n" for header, sample in zip(headers, samples))
    assert len({sample["text"] for sample in samples}) == 3


def test_a_model_without_a_tokenizer_takes_and_prints_token_ids(run: Run, model_copy: Path) -> None:
    (model_copy / "tokenizer.json").unlink()
    options = ("--model", str(model_copy), "--load-format", "dummy", "--max-tokens", "5", "--ignore-eos")
    status, out, _ = run("generate", "--prompt-token-ids", "5,6,7", *options)
    assert status == 0
    assert len([int(token_id) for token_id in out.split(" ")]) == 5


def test_a_part_of_ones_own_is_used_and_what_it_lacks_is_said_on_stderr(run: Run, tmp_path: Path, expected: str) -> None:
    part = tmp_path / "mine.py"
    part.write_text(
        "from pagebrain.engine.scheduler import Scheduler\n"
        "class Mine(Scheduler):\n"
        "    supports = frozenset()\n"
        "    def schedule(self):\n"
        "        print('mine', end='')\n"
        "        return super().schedule()\n"
    )
    status, out, err = run(
        "generate", PROMPT, "--part", f"scheduler={part}:Mine", "--async-scheduling", "--max-tokens", "24", *GREEDY
    )
    assert status == 0
    assert "mine" in out and out.replace("mine", "") == expected.rstrip("\n") + "\n"
    features = ("async_scheduling", "prefix_caching")
    lines = err.splitlines()
    assert len(lines) == 2 and all(line.startswith("pagebrain: ") and name in line for line, name in zip(lines, features))


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"pagebrain {__version__}\n", "")


def test_no_command_prints_the_help(run: Run) -> None:
    status, out, err = run()
    assert (status, err) == (0, "")
    assert out == run("--help")[1]
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(run: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: pagebrain {command}") and max(map(len, out.splitlines())) <= 80


def test_help_does_not_wait_for_torch() -> None:
    lines = [
        "import sys; from pagebrain.cli import main",
        "helps = [[command, '--help'] for command in ('generate', 'demo', 'doctor', 'serve')]",
        "codes = [main(argv) for argv in ([], ['--version'], *helps)]",
        "sys.exit(any(codes) or 'torch' in sys.modules or 'rich' in sys.modules)",
    ]
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, timeout=60).returncode == 0


def test_doctor_finds_that_the_engine_can_run(run: Run) -> None:
    status, out, _ = run("doctor", "--json")
    report = json.loads(out)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert status == 0 and report["engine_can_run"] is True
    assert found["engine"]["state"] == "ok" and "equal to Hugging Face" in found["engine"]["found"]
    assert all(finding["advice"] for finding in found.values() if finding["state"] != "ok")
    assert found.keys() >= {
        "Python",
        "platform",
        "torch",
        "CPU threads",
        "GPU",
        "paged attention",
        "packed weights",
        "Triton",
    }


def test_doctor_fails_and_says_what_to_do_when_the_bundled_model_is_damaged(
    run: Run, model_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_copy / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr("pagebrain.models.loading.BUNDLED_MODEL", model_copy)
    status, out, _ = run("doctor")
    assert status == 1
    assert "BROKEN" in out and "install PageBrain again" in " ".join(out.split())


def test_demo_tells_a_story_and_shows_its_blocks_within_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run("demo", "--max-tokens", "60")
    assert (status, err) == (0, "")
    assert out.startswith(PROMPT)
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 80
    for expected_line in ("tokens/s, 4 stories at once", "contiguous ####", "logical", "physical", "A B C D"):
        assert expected_line in out


# What does not --------------------------------------------------------------------------------------------------------


def assert_one_line_and_status_2(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("pagebrain: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([""], "empty"),
        (["word " * 3000], "shorten"),
        ([PROMPT, "--prompt-token-ids", "1"], "not both"),
        (["--prompt-token-ids", "1,two"], "--prompt-token-ids"),
        (["--prompt-token-ids", "1,1000000"], "prompt token 1"),
        ([PROMPT, "--model", "/no/such/folder"], "/no/such/folder"),
        ([PROMPT, "--model", "gpt3", "--load-format", "dummy"], "gpt3"),
        ([PROMPT, "--load-format", "quick"], "load_format"),
        ([PROMPT, "--temperature", "-1"], "temperature"),
        ([PROMPT, "--temperature", "nan"], "temperature"),
        ([PROMPT, "--temperature", "warm"], "--temperature"),
        ([PROMPT, "--top-p", "0"], "top_p"),
        ([PROMPT, "--max-tokens", "0"], "max_tokens"),
        ([PROMPT, "--max-tokens", "1.5"], "--max-tokens"),
        ([PROMPT, "-n", "0"], "n must be"),
        ([PROMPT, "--logit-bias", "5"], "ID=X"),
        ([PROMPT, "--logit-bias", "five=1"], "ID=X"),
        ([PROMPT, "--logit-bias", "5=1000"], "logit_bias"),
        ([PROMPT, "--logit-bias", "1000000=1"], "vocabulary"),
        ([PROMPT, "--stop-token-ids", "a"], "--stop-token-ids"),
        ([PROMPT, "--stop", ""], "stop"),
        ([PROMPT, "--logprobs", "2"], "--json"),
        ([PROMPT, "--num-blocks", "0"], "num_blocks"),
        ([PROMPT, "--num-blocks", "2", "--max-model-len", "100"], "num_blocks"),
        ([PROMPT, "--block-size", "0"], "block_size"),
        ([PROMPT, "--max-model-len", "100000"], "max_model_len"),
        ([PROMPT, "--dtype", "int8"], "dtype"),
        ([PROMPT, "--device", "abacus"], "device"),
        ([PROMPT, "--part", "scheduler"], "PART="),
        ([PROMPT, "--part", "engine=here.py:Engine"], "parts"),
        ([PROMPT, "--part", "scheduler=no_such_file.py:Scheduler"], "no_such_file.py"),
        ([PROMPT, "--part", "scheduler=pagebrain.engine.scheduler:Nothing"], "Nothing"),
        ([PROMPT, "--part", "sampler=pagebrain.sampling:Sampler", "--part", "sampler=a.py:B"], "twice"),
        ([PROMPT, "--no-such-option"], "--no-such-option"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[-60:].replace("/", " "),
)
def test_bad_input_is_one_line_and_status_2(run: Run, arguments: list[str], word: str) -> None:
    assert_one_line_and_status_2(run("generate", *arguments), word)


def test_an_unknown_command_is_one_line_and_status_2(run: Run) -> None:
    assert_one_line_and_status_2(run("sing"), "sing")


def test_standard_input_that_is_not_text_is_refused(run: Run, pipe_in: Callable[[bytes], None]) -> None:
    pipe_in(b"Once \xff upon")
    assert_one_line_and_status_2(run("generate", "-"), "UTF-8")


def test_no_prompt_on_a_terminal_is_an_error_and_does_not_wait(
    run: Run, pipe_in: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe_in(b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert_one_line_and_status_2(run("generate"), "no prompt")


def test_a_folder_without_a_tokenizer_is_refused(run: Run, model_copy: Path) -> None:
    (model_copy / "tokenizer.json").unlink()
    assert_one_line_and_status_2(run("generate", PROMPT, "--model", str(model_copy)), "tokenizer")


def test_unreadable_weights_are_refused(run: Run, model_copy: Path) -> None:
    (model_copy / "model.safetensors").write_bytes(b"\x07" * 1000)
    assert_one_line_and_status_2(run("generate", PROMPT, "--model", str(model_copy)), "weights")


def test_a_config_that_is_not_json_is_refused(run: Run, model_copy: Path) -> None:
    (model_copy / "config.json").write_text("{")
    assert_one_line_and_status_2(run("generate", PROMPT, "--model", str(model_copy)), "config")


def test_a_text_prompt_for_a_model_without_a_tokenizer_is_refused(run: Run) -> None:
    options = ("--model", "gpt2", "--load-format", "dummy", "--num-blocks", "4", "--dtype", "float32")
    assert_one_line_and_status_2(run("generate", PROMPT, *options), "tokenizer")


@pytest.mark.parametrize(
    ("part", "source", "word"),
    [
        ("attention", "def Mine(query, key_pool): ...", "value_pool"),
        ("scheduler", "class Mine:\n    def __init__(self, config): ...", "cache_manager"),
        ("sampler", "class Mine:\n    def __init__(self, config): ...", "sample"),
        ("scheduler", "class Mine: oops", "importing"),
    ],
    ids=["attention-argument", "scheduler-argument", "sampler-method", "syntax-error"],
)
def test_a_part_that_does_not_fit_is_refused(run: Run, tmp_path: Path, part: str, source: str, word: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    assert_one_line_and_status_2(run("generate", PROMPT, "--part", f"{part}={file}:Mine"), word)


def test_a_person_who_may_wait_for_a_download_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(llm: LLM, **settings: object) -> None:
        raise ModelLoadError("not today")

    monkeypatch.setattr(LLM, "__init__", refuse)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, _, err = run("generate", PROMPT, "--model", "openai-community/gpt2")
    assert status == 2
    assert err.splitlines() == [
        "pagebrain: looking for openai-community/gpt2 in the local cache and on the Hugging Face hub",
        "pagebrain: error: not today",
    ]
    assert_one_line_and_status_2(run("generate", PROMPT, "--model", str(BUNDLED_MODEL)), "not today")


def test_an_interrupt_aborts_the_request_and_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []
    step = Engine.step

    def interrupted(engine: Engine) -> object:
        engines.append(engine)
        if len(engines) == 4:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    status, out, err = run("generate", PROMPT, "--max-tokens", "24", *GREEDY)
    manager = engines[0].cache_manager
    assert status == INTERRUPTED
    assert out.endswith("\n") and err == "pagebrain: interrupted\n"
    assert not engines[0].has_unfinished_requests and manager.num_free_blocks == manager.num_blocks


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    command = [sys.executable, "-m", "pagebrain", "generate", PROMPT, "--max-tokens", "400", *GREEDY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (PIPE_CLOSED, b"")


def test_a_terminal_without_the_characters_is_no_reason_to_fail() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    argv = ("generate", "\u00e9", "--max-tokens", "8", "--temperature", "5", "--seed", "1", "--ignore-eos")
    done = in_a_new_process(*argv, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
