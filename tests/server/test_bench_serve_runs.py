"""``bench serve`` against a made-up server: who sends what when, what is counted, what is printed and saved. No timings."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagebrain.bench.serve.load import ClientJob, Load
from pagebrain.bench.serve.measurements import RequestRecord, read_exchange
from pagebrain.bench.workload import LengthRange, make_workload
from pagebrain.cli import main
from pagebrain.cli.frame import PIPE_CLOSED
from tests.support.fake_openai import VOCAB_SIZE, FakeServer, fake_server

pytest.importorskip("aiohttp")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as running:
        yield running


class Counted:
    """What the clients count, in this process."""

    def __init__(self) -> None:
        self.taken = self.tokens = self.ended = 0

    def take_next(self) -> int:
        self.taken += 1
        return self.taken - 1

    def count_tokens(self, number: int) -> None:
        self.tokens += number

    def count_ended(self) -> None:
        self.ended += 1


def drive_here(server: FakeServer, load: Load, num_requests: int, **settings: Any) -> tuple[list[RequestRecord], Counted]:
    """The clients of one process, in this one, which costs no start of another."""
    from pagebrain.bench.serve.http_client import drive, open_session, warm_up

    options: dict[str, Any] = {"headers": {}, "warmup": [], "timeout_s": 30.0} | settings
    bodies = [
        json.dumps({"prompt": [1] * 5, "max_tokens": 3 + index, "stream_options": {"include_usage": True}}).encode()
        for index in range(num_requests)
    ]
    arrivals_s = load.arrivals_s(num_requests, seed=0)
    job = ClientJob(
        url=f"{server.url}/v1/completions",
        bodies=bodies,
        num_clients=load.concurrency or 1,
        arrivals_s=arrivals_s,
        **options,
    )
    counted = Counted()

    async def run() -> list[RequestRecord]:
        async with open_session(job) as session:
            await warm_up(session, job)
            start_s = time.perf_counter()
            return [read_exchange(one, start_s) for one in await drive(session, job, start_s, counted)]

    return sorted(asyncio.run(run()), key=lambda record: record.index), counted


def bench(server: FakeServer, *arguments: str) -> int:
    return main(["bench", "serve", "--url", server.url, "--input-len", "4:9", "--output-len", "3:12", *arguments])


# The clients ----------------------------------------------------------------------------------------------------------


def test_a_closed_loop_sends_every_request_once_and_never_more_at_a_time_than_clients(server: FakeServer) -> None:
    server.delay_s = 0.002
    records, counted = drive_here(server, Load(concurrency=4), 15)
    assert [record.index for record in records] == list(range(15))
    assert sorted(request["max_tokens"] for request in server.requests) == [3 + index for index in range(15)]
    assert server.most_at_once == 4
    assert [record.output_tokens for record in records] == [3 + index for index in range(15)]
    assert {(record.outcome, record.prompt_tokens) for record in records} == {("done", 5)}
    assert counted.ended == 15 and counted.tokens == sum(3 + index for index in range(15))


def test_an_open_loop_does_not_wait_for_answers(server: FakeServer) -> None:
    server.delay_s = 0.05
    records, _ = drive_here(server, Load(rate=200), 12)
    assert server.most_at_once > 6  # an answer takes longer than all arrivals
    assert [record.sent_s for record in records] == sorted(record.sent_s for record in records)
    arrivals = Load(rate=200).arrivals_s(12, seed=0)
    assert arrivals is not None and all(record.sent_s >= arrivals[record.index] - 0.002 for record in records)
    assert all(record.late_s == pytest.approx(record.sent_s - arrivals[record.index], abs=1e-6) for record in records)


def test_tokens_are_counted_by_usage_when_they_share_events(server: FakeServer) -> None:
    server.tokens_per_event = 4
    records, _ = drive_here(server, Load(concurrency=2), 8)
    assert [record.output_tokens for record in records] == [3 + index for index in range(8)]
    assert [record.num_events for record in records] == [-(-(3 + index) // 4) for index in range(8)]


def test_every_misfortune_is_one_request_and_the_run_goes_on(server: FakeServer) -> None:
    wrongs = ["busy", "broken", "cut", "unfinished", "error event", "aborted", "empty", "hang"]
    server.misbehaviour = lambda number: wrongs[number] if number < len(wrongs) else None
    records, counted = drive_here(server, Load(concurrency=1), len(wrongs) + 2, timeout_s=0.5)
    assert [(record.outcome, record.reason) for record in records[: len(wrongs)]] == [
        ("refused", "HTTP 503: the queue is full"),
        ("failed", "HTTP 500: the engine is gone"),
        ("failed", "the connection ended in the middle of the answer"),
        ("failed", "the stream ended without [DONE]"),
        ("failed", "an error in the stream: the engine died"),
        ("failed", "the output ended with finish_reason 'abort'"),
        ("failed", "the stream brought no token"),
        ("failed", "no end after 0.5 s"),
    ]
    assert [record.outcome for record in records[len(wrongs) :]] == ["done", "done"]
    assert counted.ended == len(wrongs) + 2


def test_a_server_that_is_gone_fails_every_request() -> None:
    with fake_server() as server:
        pass
    records, _ = drive_here(server, Load(concurrency=2), 3)
    assert [record.outcome for record in records] == ["failed"] * 3
    assert "Cannot connect" in records[0].reason


# The command ----------------------------------------------------------------------------------------------------------


def test_a_run_is_printed_and_saved(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.api_key = "secret"
    server.misbehaviour = lambda number: "broken" if number == 5 else None
    file = tmp_path / "run.json"
    settings = ["--requests", "9", "--concurrency", "3", "--processes", "2", "--seed", "4", "--warmup", "2"]
    assert bench(server, *settings, "--slo", "e2e:60000", "--api-key", "secret", "--json", str(file)) == 0

    text = file.read_text()
    report = json.loads(text)
    (run,) = report["runs"]
    asked = make_workload(9, LengthRange(4, 9), LengthRange(3, 12), VOCAB_SIZE, 4)
    sent = {tuple(request["prompt"]): request for request in server.requests}
    assert len(server.requests) == 2 + 9 and all(request.prompt_token_ids in sent for request in asked)
    timed = [sent[request.prompt_token_ids] for request in asked]
    assert [body["max_tokens"] for body in timed] == [request.output_len for request in asked]
    common = {"model": "fake-1", "temperature": 0.0, "stream": True, "ignore_eos": True}
    assert all(body | common == body and body["stream_options"] == {"include_usage": True} for body in timed)
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"} and "secret" not in text

    numbers = run["metrics"]
    assert (numbers["done"], numbers["failed"], numbers["refused"]) == (8, 1, 0)
    assert [row["index"] for row in run["requests"]] == list(range(9))
    whole = {row["index"]: row["output_tokens"] for row in run["requests"] if row["outcome"] == "done"}
    assert whole == {index: asked[index].output_len for index in whole} and len(whole) == 8
    assert numbers["output_tokens"] == sum(whole.values())
    assert numbers["goodput"]["good"] == 8
    assert numbers["most_in_flight"] <= 3 and len(run["client_busy"]) == 2
    assert (report["server"]["model"], report["settings"]["vocab_size"]) == ("fake-1", VOCAB_SIZE)
    assert {"pagebrain", "aiohttp", "python", "processor", "cores"} <= set(report["versions"])
    assert report["date"] and report["command"].startswith("pagebrain")

    printed = capsys.readouterr().out
    assert "3 clients: 9 requests, 8 done, 1 failed, 0 refused" in printed
    assert "note: 1 not done: HTTP 500: the engine is gone" in printed
    assert "goodput" in printed and "TPOT" in printed


def test_a_sweep_runs_every_load_with_prompts_of_its_own_and_draws_it(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    files = tmp_path / "sweep.json", tmp_path / "sweep.png"
    saved = ["--json", str(files[0]), "--chart", str(files[1])]
    assert bench(server, "--sweep-concurrency", "1,3", "--requests", "6", "--model", "fake-2", *saved) == 0
    runs = json.loads(files[0].read_text())["runs"]
    assert [(run["load"], run["metrics"]["done"]) for run in runs] == [("1 client", 6), ("3 clients", 6)]
    prompts = [tuple(request["prompt"]) for request in server.requests]
    assert len(set(prompts)) == len(prompts) == 2 * 6 + 1 + 3  # with one warm-up request a client
    assert {request["model"] for request in server.requests} == {"fake-2"}
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "6 of 6" in capsys.readouterr().out


def test_when_nothing_is_done_only_that_is_said(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.misbehaviour = lambda number: "busy"
    file = tmp_path / "none.json"
    assert bench(server, "--requests", "4", "--concurrency", "2", "--json", str(file), "--slo", "ttft:100") == 1
    printed = capsys.readouterr().out
    assert "4 requests, 0 done, 0 failed, 4 refused" in printed
    assert "no request was done: there is nothing to measure" in printed
    assert "2 of the warm-up requests failed" in printed
    assert "tokens/s" not in printed and "TTFT" not in printed
    assert json.loads(file.read_text())["runs"][0]["metrics"]["ttft_ms"] is None


def test_a_reader_of_the_tables_that_goes_away_costs_no_results(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def print_to_a_closed_pipe(report: object, console: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("pagebrain.bench.serve.serve_bench.print_report", print_to_a_closed_pipe)
    file = tmp_path / "kept.json"
    assert bench(server, "--requests", "2", "--json", str(file)) == PIPE_CLOSED
    assert json.loads(file.read_text())["runs"][0]["metrics"]["done"] == 2


def test_ignore_eos_is_not_sent_when_the_server_does_not_know_it(server: FakeServer) -> None:
    assert bench(server, "--requests", "2", "--no-ignore-eos", "--temperature", "0.5", "--top-p", "0.9") == 0
    assert all("ignore_eos" not in request for request in server.requests)
    assert {(request["temperature"], request["top_p"]) for request in server.requests} == {(0.5, 0.9)}


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--requests", "0"], "--requests must be at least 1, got 0"),
        (["--concurrency", "0"], "the concurrency must be at least 1, got 0"),
        (["--timeout", "0"], "--timeout must be seconds greater than 0"),
        (["--timeout", "nan"], "--timeout must be seconds greater than 0"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--top-p", "1.5"], "--top-p must be greater than 0 and at most 1"),
        (["--warmup", "-1"], "--warmup must be at least 0"),
        (["--input-len", "9:4"], "--input-len must be LOW:HIGH"),
        (["--slo", "speed:3"], "--slo must name milliseconds"),
        (["--url", "127.0.0.1:8000"], "--url must look like http://127.0.0.1:8000"),
        (["--json", "no/such/folder/run.json"], "--json no/such/folder/run.json cannot be written"),
        (["--chart", "chart.png"], "--chart draws a sweep"),
        (["--sweep", "1,2", "--chart", "chart.jpg"], "--chart must name a .png or .svg file"),
        (["--threads", "2"], "--threads is for --launch"),
        (["--rounds", "2"], "--rounds is for --against-offline"),
        (["--against-offline"], "--against-offline needs --launch"),
        (["--launch=", "--against-offline", "--request-rate", "3"], "--against-offline compares a closed loop"),
        (["--launch=", "--against-offline", "--temperature", "1"], "--against-offline is greedy"),
        (["--launch=--port 3"], "--launch must not have --port: it takes a free one"),
        (["--launch=--model 'gpt2"], "--launch cannot be split into arguments"),
        (["--launch=--max-model-len 100", "--input-len", "90"], "90 + 128 = 218 tokens, but the model has 100 positions"),
        (["--request-rate", "3", "--sweep", "1,2"], "not allowed with argument"),
    ],
)
def test_mistakes_are_named_before_anything_is_sent(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *given]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("package", ["aiohttp", "matplotlib"])
def test_a_missing_package_is_named_with_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pagebrain.bench.command.find_spec", lambda name: None if name == package else object())
    assert main(["bench", "serve", "--sweep", "1,2", "--chart", "chart.png"]) == 2
    assert f"bench serve needs the package {package}: pip install 'pagebrain[bench]'" in capsys.readouterr().err


def test_a_server_that_cannot_be_used_is_said_in_one_line(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(server, "--model", "fake-3") == 2
    assert f"{server.url} serves fake-1, fake-2, not fake-3" in capsys.readouterr().err
    server.api_key = "secret"
    assert bench(server) == 2
    assert "/v1/models answered 401: check --api-key or PAGEBRAIN_API_KEY" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", f"{server.url}/elsewhere"]) == 2
    capsys.readouterr()
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 2
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
    assert not server.requests
