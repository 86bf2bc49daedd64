"""``bench serve``: loads, arrivals, percentiles, TPOT, ITL, goodput and ratios, on made-up numbers. Nothing is measured."""

import itertools
import json
import math
import statistics

import pytest

from pagebrain.bench.child import RunResult
from pagebrain.bench.serve.load import ClientJob, Load, parse_loads
from pagebrain.bench.serve.measurements import (
    RequestRecord,
    measure,
    meets,
    most_in_flight,
    parse_slo,
    percentile,
    summarize_ms,
)
from pagebrain.bench.serve.serve_report import check_all_done, compare, offline_spec, to_json
from pagebrain.bench.workload import BenchRequest
from pagebrain.errors import ConfigError, PageBrainError


def done(sent_s: float, event_times_s: list[float], tokens: int | None = None, index: int = 0) -> RequestRecord:
    """A request whose events came at these times after it was sent."""
    return RequestRecord(
        index=index,
        outcome="done",
        reason="",
        sent_s=sent_s,
        ended_s=sent_s + event_times_s[-1],
        ttft_s=event_times_s[0],
        e2e_s=event_times_s[-1],
        prompt_tokens=10,
        output_tokens=tokens or len(event_times_s),
        num_events=len(event_times_s),
        gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(event_times_s)),
    )


def not_done(outcome: str, reason: str, sent_s: float = 0.0, ended_s: float = 0.1) -> RequestRecord:
    return RequestRecord(0, outcome, reason, sent_s, ended_s)  # type: ignore[arg-type]


# Loads ----------------------------------------------------------------------------------------------------------------


def test_arrivals_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    load = Load(rate=5)
    assert load.arrivals_s(50, seed=1) == load.arrivals_s(50, seed=1)
    assert load.arrivals_s(50, seed=1) != load.arrivals_s(50, seed=2)


def test_gaps_between_arrivals_are_exponential_with_the_asked_rate() -> None:
    arrivals = Load(rate=20).arrivals_s(4000, seed=0)
    assert arrivals is not None and list(arrivals) == list(range(4000)) and arrivals[0] == 0.0
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals.values())]
    assert min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1)  # as large as the mean: neither even nor in bursts


def test_an_infinite_rate_sends_all_at_once_and_a_closed_loop_has_no_arrivals() -> None:
    assert Load(rate=math.inf).arrivals_s(3, seed=0) == {0: 0.0, 1: 0.0, 2: 0.0}
    assert Load(concurrency=4).arrivals_s(3, seed=0) is None


@pytest.mark.parametrize("num_processes", [1, 2, 3, 9])
def test_splitting_a_job_deals_every_client_arrival_and_warmup_out_once(num_processes: int) -> None:
    arrivals = Load(rate=3).arrivals_s(7, seed=0)
    whole = ClientJob("url", {}, [b"body"] * 7, [b"%d" % number for number in range(5)], 5, arrivals, 1.0)
    jobs = whole.split(num_processes)
    assert len(jobs) == min(num_processes, 7)
    assert sorted(body for job in jobs for body in job.warmup) == sorted(whole.warmup)
    assert sorted(index for job in jobs for index in job.arrivals_s or {}) == list(range(7))
    assert arrivals is not None and all(
        arrivals[index] == when for job in jobs for index, when in (job.arrivals_s or {}).items()
    )

    closed = ClientJob("url", {}, [b"body"] * 7, [], 5, None, 1.0).split(num_processes)
    assert sum(job.num_clients for job in closed) == 5
    assert len(closed) == min(num_processes, 5)


def test_loads_come_from_the_options_in_their_order() -> None:
    assert parse_loads(16, None, None, None) == [Load(concurrency=16)]
    assert parse_loads(16, 2.5, None, None) == [Load(rate=2.5)]
    assert parse_loads(16, None, "1,8", None) == [Load(concurrency=1), Load(concurrency=8)]
    assert parse_loads(16, None, None, "0.5,inf") == [Load(rate=0.5), Load(rate=math.inf)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, None, None, None), "the concurrency must be at least 1, got 0"),
        ((16, -1.0, None, None), "the request rate must be greater than 0"),
        ((16, math.nan, None, None), "the request rate must be greater than 0"),
        ((16, None, "1,x", None), "--sweep-concurrency must be a list such as 1,2,4,8; got 'x' in it"),
        ((16, None, None, "1,,2"), "--sweep must be a list such as 1,2,4,8; got '' in it"),
    ],
)
def test_a_load_that_is_none_is_refused(given: tuple[int, float | None, str | None, str | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_loads(*given)


# The arithmetic -------------------------------------------------------------------------------------------------------


def test_percentiles_interpolate_between_neighbours() -> None:
    assert percentile([10.0, 20.0, 30.0, 40.0], 50) == 25.0
    assert percentile([10.0, 20.0], 95) == pytest.approx(19.5)
    assert percentile([float(value) for value in range(101)], 99) == 99.0
    assert percentile([7.0], 99) == 7.0
    assert percentile([1.0, 2.0], 100) == 2.0


def test_summary_is_in_milliseconds_and_none_without_values() -> None:
    summary = summarize_ms([0.003, 0.001, 0.002])
    assert summary is not None
    assert (summary["mean"], summary["median"], summary["max"]) == (2.0, 2.0, 3.0)
    assert summary["p95"] == pytest.approx(2.9)
    assert summarize_ms([]) is None


def test_tpot_leaves_the_first_token_out() -> None:
    assert done(0.0, [1.0, 1.1, 1.2, 1.5]).tpot_s == pytest.approx(0.5 / 3)
    assert done(0.0, [1.0]).tpot_s is None  # nothing came after the first token


def test_gaps_per_token_are_smaller_when_tokens_share_events_and_their_mean_is_tpot() -> None:
    shared = done(0.0, [1.0, 1.4, 1.6], tokens=7)  # six tokens in two events after the first
    assert shared.gaps_s == pytest.approx((0.4, 0.2))
    assert shared.token_gaps_s == pytest.approx((0.4 / 3, 0.2 / 3))
    assert statistics.fmean(shared.token_gaps_s) == pytest.approx(shared.tpot_s)
    alone = done(0.0, [1.0, 1.4, 1.6])
    assert alone.token_gaps_s == alone.gaps_s


def test_rates_count_what_is_done_over_the_whole_time() -> None:
    records = [
        done(0.0, [1.0, 2.0]),
        done(1.0, [0.5, 1.5, 3.0]),
        not_done("refused", "HTTP 503: full", sent_s=1.0, ended_s=1.0),
        not_done("failed", "cut", sent_s=2.0, ended_s=5.0),
        not_done("failed", "cut", sent_s=2.0, ended_s=4.5),
    ]
    numbers = measure(records, {})
    assert (numbers["requests"], numbers["done"], numbers["failed"], numbers["refused"]) == (5, 2, 2, 1)
    assert numbers["reasons"] == {"cut": 2, "HTTP 503: full": 1}
    assert numbers["duration_s"] == 5.0
    assert numbers["requests_per_s"] == pytest.approx(2 / 5)
    assert numbers["output_tokens_per_s"] == pytest.approx(5 / 5)
    assert numbers["total_tokens_per_s"] == pytest.approx(25 / 5)
    assert numbers["ttft_ms"]["median"] == pytest.approx(750)
    assert numbers["itl_ms"]["mean"] == pytest.approx(1000 * (1.0 + 1.0 + 1.5) / 3)
    assert numbers["goodput"] is None


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    slo = {"ttft": 200.0, "tpot": 20.0}
    records = [
        done(0.0, [0.2, 0.22]),  # keeps both, exactly
        done(0.0, [0.3, 0.31]),  # first token too late
        done(0.0, [0.1, 0.13]),  # 30 ms from token to token
        done(0.0, [0.1]),  # one token: no TPOT to exceed
        done(0.0, [0.1, 0.5]),
        not_done("refused", "full"),
        done(3.0, [0.1, 1.0]),
    ]
    assert [meets(record, slo) for record in records] == [True, False, False, True, False, False, False]
    numbers = measure(records, slo)
    assert numbers["goodput"] == {"slo_ms": slo, "good": 2, "requests_per_s": pytest.approx(2 / 4)}


def test_without_a_request_that_is_done_there_are_no_rates() -> None:
    numbers = measure([not_done("failed", "broken", ended_s=2.0)], {"e2e": 100.0})
    assert numbers["done"] == 0
    for name in ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert numbers[name] is None, name
    assert numbers["goodput"]["requests_per_s"] is None


def test_most_in_flight_counts_overlaps_only() -> None:
    assert most_in_flight([done(0.0, [1.0]), done(0.5, [1.0]), done(1.0, [1.0]), done(5.0, [1.0])]) == 2


def test_slo_reads_limits_in_milliseconds() -> None:
    assert parse_slo("ttft:200, tpot:20.5,e2e:5000") == {"ttft": 200.0, "tpot": 20.5, "e2e": 5000.0}


@pytest.mark.parametrize("text", ["ttft", "ttft:x", "itl:20", "ttft:0", "ttft:-1", "ttft:nan", "ttft:1,ttft:2", ","])
def test_slo_refuses_what_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo must name milliseconds for ttft, tpot, e2e"):
        parse_slo(text)


def test_json_keeps_a_request_on_one_line_and_says_the_same() -> None:
    report = {"runs": [{"requests": [{"index": 0, "reason": "a {brace}\nand [one]"}, {"index": 1}]}], "empty": {}}
    text = to_json(report)
    assert json.loads(text) == report
    assert '{ "index": 1 }' in text


# Against offline ------------------------------------------------------------------------------------------------------


def test_offline_runs_as_the_server_does_but_for_no_more_sequences_than_clients() -> None:
    requests = [BenchRequest((1, 2), 3)]
    spec = offline_spec({"model": "gpt2", "dtype": "float32", "block_size": 32}, 16, 2, requests, [])
    assert (spec.engine, spec.model, spec.threads) == ("pagebrain", {"model": "gpt2", "dtype": "float32"}, 2)
    assert spec.settings == {"block_size": 32, "max_num_seqs": 16}
    assert offline_spec({"max_num_seqs": 4}, 16, 2, requests, []).settings["max_num_seqs"] == 4
    assert offline_spec({}, 256, 2, requests, []).settings["max_num_seqs"] == 64  # the server's own default


def test_ratio_is_taken_round_by_round() -> None:
    offline = [RunResult(seconds, [0.1], [[1] * 100], {"max_num_seqs": 16}, "none") for seconds in (1.0, 2.0, 1.0)]
    served = [{"output_tokens_per_s": speed, "requests": 1} for speed in (90.0, 49.0, 80.0)]
    compared = compare(served, offline, concurrency=16, threads=2)
    assert compared["offline_tokens_per_s"]["rounds"] == [100.0, 50.0, 100.0]
    assert compared["ratio"]["rounds"] == pytest.approx([0.9, 0.98, 0.8])
    assert compared["ratio"]["median"] == pytest.approx(0.9)
    assert "max_num_seqs=16" in compared["what"] and "2 threads" in compared["what"]


def test_unequal_work_is_not_compared() -> None:
    requests = [BenchRequest((1,), 3), BenchRequest((1,), 2)]
    check_all_done({"done": 2, "output_tokens": 5, "reasons": {}}, requests)
    with pytest.raises(PageBrainError, match="1 of 2 requests, 3 of 5 tokens.*1 times cut"):
        check_all_done({"done": 1, "output_tokens": 3, "reasons": {"cut": 1}}, requests)
    with pytest.raises(PageBrainError, match="outputs were too short"):
        check_all_done({"done": 2, "output_tokens": 4, "reasons": {}}, requests)
