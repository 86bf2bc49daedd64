"""``python -m tools.measure_gpu``: what it runs, how its report grows, and the table that comes of it. No timings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagebrain.assets import BUNDLED_MODEL
from pagebrain.bench.child import RunResult, RunSpec, StartClock, child_events
from pagebrain.bench.workload import BenchRequest, Sampling
from pagebrain.errors import ModelLoadError, PageBrainError
from tools import gpu_table, measure_gpu, write_performance
from tools.engine_session import Case, SessionSpec, run_session
from tools.gpu_table import CASES, WORKLOADS, case_name, notes, table_rows

MODEL = {"model": str(BUNDLED_MODEL), "load_format": "dummy", "dtype": "float64", "device": "cpu", "seed": 0}
SMALL = [BenchRequest((1, 2, 3), 4), BenchRequest((5,), 2)]


# The child that runs several cases ------------------------------------------------------------------------------------


def test_session_spec_survives_the_way_to_the_child() -> None:
    sent = SessionSpec(MODEL, 1, [Case("a", SMALL, [], Sampling(0.5, 0.9, 3), runs=2, request_rate=7.0)], {"block_size": 8})
    assert SessionSpec.from_json(sent.to_json()) == sent


def test_a_case_that_fails_is_told_and_the_next_one_runs() -> None:
    impossible = [BenchRequest((999_999,), 2)]
    cases = [
        Case("good", SMALL, [], Sampling(0.9), runs=2, look_closer=True),
        Case("bad", impossible, []),
        Case("arriving", SMALL, SMALL, Sampling(0.9), runs=1, request_rate=1000.0, look_closer=True),
    ]
    told: list[dict[str, Any]] = []
    run_session(SessionSpec(MODEL, 1, cases, {"num_blocks": 16}), StartClock(0.0), told.append)
    assert told[0]["ready"]["ready_s"] > 0 and told[0]["configuration"]["num_blocks"] == 16
    assert [(event["case"], next(iter(set(event) - {"case"}))) for event in told[1:]] == [
        ("good", "run"),
        ("good", "run"),
        ("good", "closer"),
        ("bad", "failed"),
        ("arriving", "run"),
        ("arriving", "closer"),
    ]
    assert "999999" in told[4]["failed"]
    assert told[1]["run"]["tokens"] == told[2]["run"]["tokens"] == told[5]["run"]["tokens"]  # seeded, whenever they come
    assert told[1]["run"]["totals"]["num_decode_tokens"] >= 3 + 1
    assert told[3]["closer"]["decode"]["num_steps"] > 0 and told[6]["closer"]["decode"]["num_steps"] > 0


def test_what_was_told_before_a_child_broke_is_not_lost(tmp_path: Path) -> None:
    spec = SessionSpec(MODEL | {"model": str(tmp_path / "gone")}, 1, [])
    with pytest.raises(ModelLoadError, match="gone"):
        list(child_events("tools.engine_session", spec.to_json(), 1, "the session"))
    module = tmp_path / "breaks.py"
    module.write_text(
        "import os, sys\n"
        "from pagebrain.bench.child import child_main\n"
        "def work(task, clock, emit):\n"
        "    emit({'task': task, 'cache': os.environ['SOME_CACHE']})\n"
        "    raise ValueError('it broke')\n"
        "sys.exit(child_main(work))\n"
    )
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(PageBrainError, match="the session failed: ValueError: it broke"):
            for event in child_events("breaks", "hello", 1, "the session", {"SOME_CACHE": "here"}):
                told.append(event)
    assert told == [{"task": "hello", "cache": "here"}]


# The command ----------------------------------------------------------------------------------------------------------


def run_of(speed: float, tokens: str = "same", graph_tokens: int = 90) -> dict[str, Any]:
    return {
        "output_tokens_per_s": speed,
        "elapsed_s": 100 / speed,
        "first_token_s": {"median": 0.02, "max": 0.05},
        "totals": {"num_decode_tokens": 100, "num_graph_decode_tokens": graph_tokens},
        "tokens": tokens,
    }


class FakeChildren:
    """Children that answer at once: each run of a case is faster by one, and what ``breaks`` names fails."""

    def __init__(self, breaks: str = "") -> None:
        self.breaks = breaks
        self.specs: list[SessionSpec] = []
        self.environments: list[dict[str, str]] = []

    def events(
        self, module: str, task: str, threads: int, what: str, environment: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        spec = SessionSpec.from_json(task)
        self.specs.append(spec)
        self.environments.append(environment)
        ready = {"imported_s": 3.0, "ready_s": 5.0 + len(self.specs)}
        yield {"ready": ready, "configuration": {"max_num_seqs": 256}, "detokenization": "none"}
        for case in spec.cases:
            if case.name == self.breaks:
                yield {"case": case.name, "failed": "StepError: no"}
                continue
            for number in range(case.runs):
                yield {"case": case.name, "run": run_of(1000.0 + number)}
            if case.look_closer:
                yield {"case": case.name, "closer": {"error": "not here"}}

    def run(self, spec: RunSpec) -> RunResult:
        if spec.engine == self.breaks:
            raise PageBrainError("no such engine")
        tokens = [[1] * request.output_len for request in spec.requests]
        return RunResult(2.0, [0.5] * len(tokens), tokens, {"batch_size": 8}, "none")


def measure(file: Path, children: FakeChildren, *options: str) -> int:
    arguments = ["--json", str(file), "--device", "cpu", "--dtype", "float32", "--shrink", "64", "--threads", "2", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_gpu, "child_events", children.events)
        patch.setattr(measure_gpu, "run_in_child", children.run)
        return measure_gpu.main(arguments)


def test_two_invocations_make_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, children = tmp_path / "gpu.json", FakeChildren()
    assert measure(file, children, "--only", "starts,pagebrain") == 0
    before = json.loads(file.read_text())
    assert list(before["parts"]) == ["starts", "pagebrain"]
    assert measure(file, children, "--only", "hf", "--hf-runs", "2") == 0
    report = json.loads(file.read_text())
    assert report["parts"]["pagebrain"] == before["parts"]["pagebrain"]
    assert all(part["date"] and part["command"] and part["versions"]["torch"] for part in report["parts"].values())
    printed = capsys.readouterr().out
    assert "memory roof" not in printed and printed.count("PageBrain") >= 3

    rows = {(row[0], row[1]): row[2:] for row in table_rows(report)}
    assert rows["PageBrain", "temperature 0.6"] == ["1,001 (1,000 to 1,002)"] * 4 + [""]
    assert rows["Hugging Face continuous batching", "greedy"][1:] == [""] * 4
    engines = report["parts"]["hf"]["engines"]
    assert [len(engine["output_tokens_per_s"]["rounds"]) for engine in engines.values()] == [2, 2]
    assert engines["hf-static"]["output_tokens_per_s"]["median"] == engines["hf-static"]["output_tokens"] / 2.0


def test_every_case_runs_on_one_engine_and_the_first_one_meets_it_cold(tmp_path: Path) -> None:
    file, children = tmp_path / "gpu.json", FakeChildren()
    measure(file, children, "--only", "pagebrain")
    (spec,) = children.specs
    assert [case.name for case in spec.cases] == [case_name(*case) for case in CASES]
    assert [case.runs for case in spec.cases] == [4] + [3] * (len(CASES) - 1)
    assert [bool(case.warmup) for case in spec.cases] == [False] + [True] * (len(CASES) - 1)
    cases = json.loads(file.read_text())["parts"]["pagebrain"]["cases"]
    first = cases["W256, temperature 0.8, top-p 0.95"]
    assert first["first_run"]["output_tokens_per_s"] == 1000.0
    assert first["output_tokens_per_s"]["rounds"] == [1001.0, 1002.0, 1003.0]
    assert (first["temperature"], first["top_p"]) == (0.8, 0.95)
    assert first["graph_decode_share"]["median"] == 0.9 and first["same_tokens_in_all_runs"]


def test_the_workloads_are_those_of_the_table(tmp_path: Path) -> None:
    sizes = {name: (work.requests, work.input_len, work.output_len) for name, work in WORKLOADS.items()}
    assert sizes == {
        "W256": (256, (100, 512), (100, 512)),
        "1 request": (1, (256, 256), (256, 256)),
        "64 requests": (64, (384, 384), (256, 256)),
        "256 requests": (256, (384, 384), (256, 256)),
    }
    covered = {(workload, sampling) for workload, sampling, rate in CASES if rate is None}
    assert covered >= {(workload, sampling) for workload in WORKLOADS for sampling in ("greedy", "temperature 0.6")}
    assert any(rate for _, _, rate in CASES)


def test_starts_share_a_cache_of_compiled_kernels_that_the_first_finds_empty(tmp_path: Path) -> None:
    file, children = tmp_path / "gpu.json", FakeChildren()
    measure(file, children, "--only", "starts")
    starts = json.loads(file.read_text())["parts"]["starts"]["starts"]
    assert [(start["compiled_before"], start["ready_s"]) for start in starts] == [
        (False, 6.0),
        (True, 7.0),
        (True, 8.0),
        (True, 9.0),
    ]
    assert all(start["first_request_s"] > 0 for start in starts)
    assert len({environment["TRITON_CACHE_DIR"] for environment in children.environments}) == 1
    assert gpu_table.ready_cell({"starts": starts}) == "8.0 s (7.0 to 9.0)"


def test_what_fails_is_named_and_the_rest_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    assert measure(file, FakeChildren("64 requests, greedy"), "--only", "pagebrain") == 1
    report = json.loads(file.read_text())
    greedy = next(row for row in table_rows(report) if row[:2] == ["PageBrain", "greedy"])
    assert greedy[2:6] == ["1,001 (1,000 to 1,002)", "1,001 (1,000 to 1,002)", "failed", "1,001 (1,000 to 1,002)"]
    assert "failed: 64 requests, greedy: StepError: no" in capsys.readouterr().err
    assert any("Failed: 64 requests, greedy" in line for line in notes(report))

    assert measure(file, FakeChildren("hf-static"), "--only", "hf", "--hf-runs", "1") == 1
    engines = json.loads(file.read_text())["parts"]["hf"]["engines"]
    assert engines["hf-static"]["failed"] == "no such engine" and engines["hf-continuous"]["output_tokens_per_s"]


def test_figures_from_elsewhere_are_marked_as_such(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    measure(file, FakeChildren(), "--only", "pagebrain,starts")
    report = json.loads(file.read_text())
    rows = {(row[0], row[1]): row for row in table_rows(report)}
    assert rows["vLLM 0.26.0 [1]", "temperature 0.6"][2:] == ["34,492", "585", "21,113", "30,878", "60 s"]
    text = notes(report)
    assert text[0].startswith("[1]") and "2026-11-22" in text[0] and "not in this run" in text[0]
    assert any("very first run" in line and "1,000 tokens/s" in line and "[1]: 7,086" in line for line in text)
    assert any("Poisson arrivals" in line and "90.0% of the decode tokens" in line for line in text)
    assert any("All runs of a case of the table gave the same tokens." in line for line in text)
    report["parts"]["pagebrain"]["cases"]["W256, greedy"]["same_tokens_in_all_runs"] = False
    assert any("did not give the same tokens each time: W256, greedy." in line for line in notes(report))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "pagebrain,vllm"], "--only knows starts, pagebrain, hf; got vllm"),
        (["--runs", "0"], "--runs must be at least 1"),
        (["--model", "gpt5"], "gpt5"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    children = FakeChildren()
    assert measure(tmp_path / "gpu.json", children, *options) == 2
    assert said in capsys.readouterr().err
    assert not children.specs and not (tmp_path / "gpu.json").exists()


# The pages ------------------------------------------------------------------------------------------------------------


def test_the_pages_say_what_the_report_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_performance, "RESULTS", tmp_path)
    page = "".join(f"<!-- {name}-on-a-gpu: begin -->x<!-- {name}-on-a-gpu: end -->\n" for name in ("speed", "steps"))
    assert write_performance.with_tables(page).count("Not measured yet.") == 2
    measure(tmp_path / "gpu.json", FakeChildren(), "--only", "pagebrain,starts")
    report = json.loads((tmp_path / "gpu.json").read_text())
    host = {"schedule": 0.0001, "prepare": 0.0002, "launch": 0.00005, "wait for the GPU": 0.001, "detokenize": 0.0001}
    window = {"seconds": 0.0016, "num_steps": 64, "num_seqs_mean": 256.0, "host": host, "gpu": {"attention": 0.0011}}
    case = report["parts"]["pagebrain"]["cases"]["256 requests, greedy"]
    case["closer"] = {"decode": {"share": 0.744}, "window": window}
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    written = write_performance.with_tables(page)
    assert "| **PageBrain** | **greedy** | **1,001 (1,000 to 1,002)** |" in written
    assert "| vLLM 0.26.0 [1] | temperature 0.6 | 34,492 | 585 | 21,113 | 30,878 | 60 s |" in written
    assert "[1] compiled" in written and "not in this run" in written
    assert "| a decode step, ms | 256 requests, greedy |" in written and "| in all | **1.600** |" in written
    assert "| host: prepare | 0.200 |" in written and "| GPU: attention | 1.100 |" in written
    assert "| share of the memory roof, all decode steps | 74% |" in written
    assert write_performance.with_tables(written) == written


def test_the_page_of_the_ladder_names_the_machine_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_performance, "RESULTS", tmp_path)
    assert write_performance.gpu_ladder_table() == "Not measured yet."
    rows = [{"stage": "07_full_speed", "tokens_per_s": 22_000, "ms_per_token": 2.1, "kv_bytes": 310e6}]
    report = {"stages": rows, "prompt_lens": [64, 256], "max_new_tokens": 128, "model": "openai-community/gpt2"}
    report |= {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "threads": 16,
        "date": "2026-11-28",
        "command": "python -m chapters",
    }
    report |= {"versions": {"gpu": "NVIDIA H200", "processor": "?", "torch": "2.11"}}
    (tmp_path / "ladder-gpu.json").write_text(json.dumps(report))
    table = write_performance.gpu_ladder_table()
    assert "| 07_full_speed | 22,000 | 2.1 | 310.0 MB |" in table
    assert "openai-community/gpt2 with random weights, bfloat16, greedy. NVIDIA H200, torch 2.11, 2026-11-28." in table
    assert table.endswith("```\npython -m chapters\n```")


def test_the_page_of_the_server_has_the_median_of_the_runs_of_each_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_performance, "RESULTS", tmp_path)
    assert write_performance.gpu_serving_table() == "Not measured yet."

    def run(load: str, speed: float, ttft: float) -> dict[str, Any]:
        times = {name: {"median": ttft / 10} for name in ("itl_ms", "tpot_ms")}
        return {
            "load": load,
            "metrics": {"output_tokens_per_s": speed, "ttft_ms": {"median": ttft}, "tokens_per_event": 1.5} | times,
        }

    runs = [run("256 clients", 50_000, 80), run("7 clients", 9_000, 5), run("256 clients", 60_000, 70)]
    runs += [run("7 clients", 8_000, 6), run("256 clients", 40_000, 90), run("7 clients", 7_000, 4)]
    settings = {"requests": 1024, "processes": 8, "input_len": "100:512", "output_len": "100:512"}
    found = {"gpu": "NVIDIA H200", "cores": 16, "torch": "2.11", "triton": "3.6"}
    report = {"runs": runs, "settings": settings, "versions": found, "date": "2026-11-28T20:00:00"}
    (tmp_path / "serve-gpu.json").write_text(json.dumps(report))
    lines = write_performance.gpu_serving_table().splitlines()
    assert lines[2] == "| 256 | vLLM 0.26.0 [1] | 24,216 | 426 | 11.9 |  |"
    assert lines[3].startswith(
        "| **256** | **PageBrain** | **50,000 (40,000 to 60,000)** | **80 (70 to 90)** | **8 (7 to 9)** |"
    )
    assert lines[4].startswith("| **7** | **PageBrain** | **8,000 (7,000 to 9,000)** | **5 (4 to 6)** |")
    assert "of 3 runs the median" in lines[-1] and "NVIDIA H200, torch 2.11, Triton 3.6, 2026-11-28." in lines[-1]
