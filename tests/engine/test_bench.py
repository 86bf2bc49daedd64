"""``pagebrain bench offline``: the workload, the arithmetic, what it refuses, the engines on a tiny model. No timings."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pagebrain.bench import offline
from pagebrain.bench.child import RunResult, RunSpec, run_in_child
from pagebrain.bench.command import report_head
from pagebrain.bench.offline import ENGINES, candidates
from pagebrain.bench.offline_report import compare, engine_report, summarize
from pagebrain.bench.runners import RUNNERS
from pagebrain.bench.workload import BenchRequest, LengthRange, Sampling, make_warmup, make_workload
from pagebrain.cli import main
from pagebrain.engine.trace import StepTotals
from pagebrain.errors import ConfigError, ModelLoadError, PageBrainError

VOCAB_SIZE = 211
NUM_POSITIONS = 64


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved GPT-2 small enough to run in an instant; its end-of-sequence token is one that greedy decoding does choose."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=NUM_POSITIONS,
        n_embd=48,
        n_layer=2,
        n_head=4,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def requests(count: int = 9, seed: int = 3) -> list[BenchRequest]:
    return make_workload(count, LengthRange(3, 20), LengthRange(2, 12), VOCAB_SIZE, seed)


def spec(engine: str, model: str, settings: dict[str, Any], workload: list[BenchRequest] | None = None) -> RunSpec:
    config = {"model": model, "load_format": "dummy", "dtype": "float64", "device": "cpu", "seed": 0}
    return RunSpec(engine, config, 1, workload or requests(), requests(2, seed=4), settings)


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    offline.add_offline_arguments(parser)
    return parser.parse_args(given)


def result(elapsed_s: float, token_ids: list[list[int]], first_token_s: list[float] | None = None) -> RunResult:
    first = first_token_s or [0.1] * len(token_ids)
    return RunResult(elapsed_s, first, token_ids, {"block_size": 16}, "none", peak_rss_bytes=5_000_000)


# The workload ---------------------------------------------------------------------------------------------------------


def test_workload_is_the_same_for_the_same_numbers_and_another_for_another_seed() -> None:
    assert requests(seed=1) == requests(seed=1)
    assert requests(seed=1) != requests(seed=2)


def test_workload_keeps_to_its_ranges_and_reaches_both_ends() -> None:
    made = make_workload(500, LengthRange(3, 9), LengthRange(2, 5), 50, 0)
    inputs = {len(request.prompt_token_ids) for request in made}
    outputs = {request.output_len for request in made}
    assert (min(inputs), max(inputs), min(outputs), max(outputs)) == (3, 9, 2, 5)
    assert {token for request in made for token in request.prompt_token_ids} == set(range(50))


def test_warmup_shares_no_prompt_with_what_is_timed() -> None:
    timed = {request.prompt_token_ids for request in requests()}
    warm = make_warmup(requests(), VOCAB_SIZE, 3)
    assert timed.isdisjoint(request.prompt_token_ids for request in warm)
    assert [len(request.prompt_token_ids) for request in warm] == [len(request.prompt_token_ids) for request in requests()]
    assert max(request.output_len for request in warm) <= 4


@pytest.mark.parametrize("text", ["", "a", "3:", ":3", "0:4", "-2:4", "9:3", "1:2:3", "1.5"])
def test_length_range_refuses_what_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--input-len must be LOW:HIGH"):
        LengthRange.parse("--input-len", text)


def test_length_range_reads_a_range_and_a_single_length() -> None:
    assert LengthRange.parse("--input-len", "32:128") == (32, 128)
    assert LengthRange.parse("--input-len", "64") == (64, 64)


# The arithmetic -------------------------------------------------------------------------------------------------------


def test_summary_gives_median_ends_and_spread() -> None:
    summary = summarize([30.0, 10.0, 20.0])
    assert summary == {"median": 20.0, "min": 10.0, "max": 30.0, "spread": 1.0, "rounds": [30.0, 10.0, 20.0]}


def test_only_tokens_that_were_asked_for_count() -> None:
    asked = [BenchRequest((1, 2), 3), BenchRequest((4,), 1)]
    runs = [result(seconds, [[7, 8, 9], [5]], first_token_s=[0.2, 0.4]) for seconds in (2.0, 1.0, 4.0)]
    report = engine_report(asked, runs)
    assert report["output_tokens_per_s"] == 2.0
    assert report["output_tokens_per_s_stats"]["rounds"] == [2.0, 4.0, 1.0]
    assert report["ttft_s"]["median"] == pytest.approx(0.3)
    assert report["ttft_s"]["max"] == 0.4
    assert report["peak_memory_mb"] == 5.0
    assert report["peak_cuda_memory_mb"] is None


def test_ratio_is_taken_round_by_round_and_equal_tokens_are_counted() -> None:
    ours = [result(1.0, [[1], [2]]), result(2.0, [[1], [2]]), result(1.0, [[1], [2]])]
    theirs = [result(2.0, [[1], [9]]), result(6.0, [[1], [9]]), result(1.5, [[1], [9]])]
    compared = compare({"pagebrain": ours, "hf-static": theirs})["hf-static"]
    assert compared["speedup"]["rounds"] == [2.0, 3.0, 1.5]
    assert compared["speedup"]["median"] == 2.0
    assert (compared["requests_with_equal_tokens"], compared["requests"]) == (1, 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_runs_more_sequences_at_once_than_was_said(engine: str) -> None:
    limit = {"pagebrain": "max_num_seqs", "hf-static": "batch_size", "hf-continuous": "max_requests_per_batch"}[engine]
    for settings in candidates(engine, requests(40), "cpu", max_num_seqs=6):
        assert settings[limit] <= 6
    assert candidates(engine, requests(40), "cpu", max_num_seqs=6)[0][limit] == 6


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--input-len", "128:32"], "--input-len must be LOW:HIGH with 1 <= LOW <= HIGH, got '128:32'"),
        (["--compare", "hf-static,vllm"], "--compare knows hf-static, hf-continuous; got 'vllm'"),
        (["--requests", "0"], "--requests must be at least 1, got 0"),
        (["--rounds", "-1"], "--rounds must be at least 1, got -1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be at least 1, got 0"),
        (["--json", "no/such/folder/out.json"], "cannot be written"),
        (["--temperature", "-1"], "--temperature, --top-p or --top-k: temperature must be at least 0"),
        (["--top-p", "0"], "--top-p or --top-k: top_p must be greater than 0"),
        (["--request-rate", "0"], "--request-rate must be greater than 0 and finite, got 0"),
        (["--request-rate", "inf"], "leave it out for all at once"),
        (["--compare", "hf-static", "--temperature", "0.5"], "--temperature is for PageBrain alone"),
        (["--compare", "hf-static", "--request-rate", "5"], "--request-rate is for PageBrain alone"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--input-len", "32:60", "--output-len", "2:8"], r"60 \+ 8 = 68 tokens, but the model has 64 positions"),
    ],
)
def test_mistakes_are_named_before_anything_runs(model_folder: str, given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        offline.OfflineBench(arguments("--model", model_folder, "--input-len", "4", "--output-len", "4", *given))


def test_a_model_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere"):
        offline.OfflineBench(arguments("--model", str(tmp_path / "nowhere"), "--load-format", "dummy"))


def test_the_command_prints_one_line_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "offline", "--output-len", "x"]) == 2
    assert (
        capsys.readouterr().err == "pagebrain: error: --output-len must be LOW:HIGH or one number, such as 32:128; got 'x'\n"
    )


# The engines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def greedy_tokens(model_folder: str) -> list[list[int]]:
    """Each request alone through ``generate`` in float64, nothing padded."""
    settings = {"attn_implementation": "eager", "batch_size": 1, "sort_by": "arrival", "cache": "dynamic"}
    return RUNNERS["hf-static"](spec("hf-static", model_folder, settings)).token_ids


def test_reference_runs_past_the_end_of_sequence_token(greedy_tokens: list[list[int]]) -> None:
    assert [len(tokens) for tokens in greedy_tokens] == [request.output_len for request in requests()]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_same_greedy_tokens_with_all_its_settings(
    engine: str, model_folder: str, greedy_tokens: list[list[int]]
) -> None:
    for settings in candidates(engine, requests(), "cpu", max_num_seqs=4):
        run = RUNNERS[engine](spec(engine, model_folder, settings))
        assert run.token_ids == greedy_tokens, settings
        assert all(0 < first <= run.elapsed_s for first in run.first_token_s)


def test_end_of_sequence_is_ignored_by_every_engine(
    model_folder: str, greedy_tokens: list[list[int]], tmp_path: Path
) -> None:
    ended = max(greedy_tokens, key=len)[1]  # a token that comes before the last: now it is the end of sequence
    config = GPT2Config.from_pretrained(model_folder)
    config.eos_token_id = ended
    config.save_pretrained(tmp_path)
    for engine in ENGINES:
        settings = candidates(engine, requests(), "cpu", None)[0]
        assert RUNNERS[engine](spec(engine, str(tmp_path), settings)).token_ids == greedy_tokens, engine


def test_sampled_runs_repeat_whenever_their_requests_come(model_folder: str, greedy_tokens: list[list[int]]) -> None:
    asked = dataclasses.replace(spec("pagebrain", model_folder, {"num_blocks": 32}), sampling=Sampling(1.0, 0.9, 50))
    at_once, again = RUNNERS["pagebrain"](asked), RUNNERS["pagebrain"](asked)
    arriving = RUNNERS["pagebrain"](dataclasses.replace(asked, request_rate=2000.0))
    assert at_once.token_ids == again.token_ids == arriving.token_ids != greedy_tokens
    assert at_once.totals is not None and arriving.totals is not None
    decodes = sum(request.output_len - 1 for request in requests())
    assert at_once.totals["num_decode_tokens"] >= decodes <= arriving.totals["num_decode_tokens"]
    assert at_once.totals["num_graph_decode_tokens"] == 0 < at_once.totals["launch_s"]


def test_the_child_tells_when_it_was_ready_and_what_a_closer_look_shows(model_folder: str) -> None:
    asked = dataclasses.replace(spec("pagebrain", model_folder, {"num_blocks": 32}), request_rate=500.0, look_closer=True)
    run = run_in_child(asked)
    assert run.start is not None and run.closer is not None
    assert 0 < run.start["imported_s"] < run.start["ready_s"] and run.start["warmup_s"] > 0
    assert run.closer["window"]["host"]["compute"] > 0 and run.closer["decode"]["copy_bytes_per_s"] > 0


def test_the_share_of_tokens_from_graphs_is_that_of_the_decode_tokens() -> None:
    totals = {"num_decode_tokens": 40.0, "num_graph_decode_tokens": 30.0, "num_prefill_tokens": 500.0}
    run = dataclasses.replace(result(1.0, [[1]]), totals=totals, start={"imported_s": 1.0, "ready_s": 4.0, "warmup_s": 0.5})
    report = engine_report([BenchRequest((1,), 1)], [run, run])
    assert report["graph_decode_share"]["median"] == 0.75
    assert report["start"]["ready_s"]["median"] == 4.0
    assert StepTotals().graph_share == 0.0


def test_spec_survives_the_way_to_the_child(model_folder: str) -> None:
    sent = dataclasses.replace(
        spec("pagebrain", model_folder, {"max_num_seqs": 3}), sampling=Sampling(0.5), request_rate=2.0
    )
    assert RunSpec.from_json(sent.to_json()) == sent


def test_an_error_in_the_child_comes_back_as_itself(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="gone"):
        run_in_child(spec("pagebrain", str(tmp_path / "gone"), {}))


def test_a_crash_in_the_child_is_one_line(model_folder: str) -> None:
    broken = {"attn_implementation": "sdpa", "batch_size": 2, "sort_by": "colour", "cache": "dynamic"}
    with pytest.raises(PageBrainError, match="the hf-static run failed: KeyError: 'colour'"):
        run_in_child(spec("hf-static", model_folder, broken))


def test_all_engines_end_to_end(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    workload = ["--requests", "6", "--input-len", "3:12", "--output-len", "2:9", "--seed", "5"]
    chosen = ["--compare", "hf-static,hf-continuous", "--rounds", "1", "--threads", "1", "--json", str(file)]
    assert offline.run_offline(arguments("--model", model_folder, "--load-format", "dummy", *workload, *chosen)) == 0

    report = json.loads(file.read_text())
    assert list(report["engines"]) == ["pagebrain", "hf-static", "hf-continuous"]
    for name, engine in report["engines"].items():
        assert engine["output_tokens_per_s"] > 0, name
        assert len(engine["output_tokens_per_s_stats"]["rounds"]) == 1
        assert 0 < engine["ttft_s"]["median"] <= engine["ttft_s"]["max"] <= engine["elapsed_s"]["max"]
        assert engine["peak_memory_mb"] > 50
        assert engine["sampling"].startswith("greedy") and engine["detokenization"]
        assert engine["start"]["ready_s"]["median"] > engine["start"]["imported_s"]["median"] > 0
    closer = report["engines"]["pagebrain"]["closer"]
    assert 0 < closer["decode"]["share"] and closer["decode"]["num_steps"] > 0
    assert list(closer["window"]["host"]) == ["schedule", "prepare", "compute", "detokenize", "rest"]
    assert report["engines"]["hf-static"]["closer"] is None and report["command"] and report["date"]
    for name in ("hf-static", "hf-continuous"):
        assert report["comparison"][name]["requests_with_equal_tokens"] == 6
        assert report["comparison"][name]["speedup"]["median"] > 0
    made = make_workload(6, LengthRange(3, 12), LengthRange(2, 9), VOCAB_SIZE, 5)
    assert report["workload"]["output_tokens"] == sum(request.output_len for request in made)
    assert (report["workload"]["seed"], report["workload"]["dtype"], report["threads"]) == (5, "float32", 1)
    assert {"pagebrain", "torch", "transformers", "python", "processor"} <= set(report["versions"])

    printed = capsys.readouterr().out
    for expected in (
        "hf-continuous: attn_implementation=",
        "max_requests_per_batch=6",
        "batch_size=6",
        "detokenization",
        "memory roof",
    ):
        assert expected in printed


def test_tuning_keeps_the_fastest_and_notes_what_failed(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    def fake(run_spec: RunSpec) -> RunResult:
        if run_spec.settings.get("attn_implementation") == "eager":
            raise PageBrainError("not here")
        speed = run_spec.settings.get("batch_size", 1)
        return result(1.0 if speed == 6 else 10.0, [[0] * request.output_len for request in run_spec.requests])

    monkeypatch.setattr(offline, "run_in_child", fake)
    given = ["--model", model_folder, "--requests", "12", "--input-len", "4", "--output-len", "4", "--compare", "hf-static"]
    report = offline.OfflineBench(arguments(*given, "--tune")).run(Console(quiet=True))
    trials = report["tuning"]["hf-static"]
    assert {trial["configuration"]["batch_size"] for trial in trials} == {12, 6}
    assert {trial["error"] for trial in trials if "error" in trial} == {"not here"}
    assert report["comparison"]["hf-static"]["speedup"]["median"] == pytest.approx(0.1)  # the one that took 1 s was kept


def test_a_report_hides_the_api_key_however_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-a&b c"
    for given in (["--api-key", key], [f"--api-key={key}"], ["--api-k", key]):
        monkeypatch.setattr("sys.argv", ["pagebrain", "bench", "serve", *given, "--requests", "3"])
        command = report_head("serve")["command"]
        assert "***" in command and "sk-a" not in command and "b c" not in command and command.endswith("--requests 3")
