"""The metrics say what happened, in the form and with the meanings that Prometheus and vLLM's dashboards expect."""

import asyncio
import math

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from pagebrain.engine.trace import EngineStats
from pagebrain.outputs import RequestMetrics
from pagebrain.sampling_params import SamplingParams
from pagebrain.server.api.metrics import Buckets, ServerMetrics, metrics_route
from pagebrain.server.link.observers import ServerObserver
from pagebrain.server.link.streams import RequestStream

MODEL = 'a "model"\\ of\nours'


def get(metrics: ServerMetrics, accept: str | None = None) -> httpx.Response:
    """What ``GET /metrics`` answers."""
    app = FastAPI()
    app.include_router(metrics_route(metrics))

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/metrics", headers={} if accept is None else {"Accept": accept})

    return asyncio.run(send())


def values(metrics: ServerMetrics) -> dict[str, float]:
    """Each sample that Prometheus would read: its name without the prefix and with its labels but the model's."""
    found = {}
    for family in text_string_to_metric_families(get(metrics).text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == metrics.model_name
            name = sample.name.removeprefix("pagebrain:")
            assert name != sample.name
            found[name + "".join(f"/{value}" for value in labels.values())] = sample.value
    return found


def request_of(num_prompt_tokens: int = 3, num_generated: int = 5, n: int = 1) -> RequestStream:
    """A request that arrived at 100, was first scheduled at 101 and ended."""
    stream = RequestStream("r", tuple(range(num_prompt_tokens)), SamplingParams(n=n), on_close=lambda _: None)
    stream.arrival_s = 100.0
    stream.num_generated = num_generated
    stream.metrics = RequestMetrics(arrival_s=100.5, first_scheduled_s=101.0, first_token_s=102.0, finished_s=104.0)
    return stream


def test_before_anything_happens_every_metric_is_there_and_zero() -> None:
    assert set(values(ServerMetrics(MODEL)).values()) == {0.0}


def test_gauges_and_preemptions_are_the_engines_latest() -> None:
    metrics = ServerMetrics(MODEL)
    metrics.on_step(EngineStats(num_running=9, num_waiting=9, num_free_blocks=9, num_blocks=20, num_preemptions=1))
    metrics.on_step(EngineStats(num_running=2, num_waiting=3, num_free_blocks=15, num_blocks=20, num_preemptions=4))
    found = values(metrics)
    assert (found["num_requests_running"], found["num_requests_waiting"]) == (2, 3)
    assert found["kv_cache_usage_perc"] == 0.25
    assert found["num_preemptions_total"] == 4


def test_tokens_of_steps_are_counted_when_several_steps_come_at_once() -> None:
    metrics = ServerMetrics(MODEL)
    metrics.on_step(EngineStats(last_step_tokens=(1, 256, 257)))
    metrics.on_step(EngineStats())
    found = values(metrics)
    assert found["iteration_tokens_total_count"] == 3 and found["iteration_tokens_total_sum"] == 514
    assert [found[f"iteration_tokens_total_bucket/{bound}"] for bound in ("1.0", "128.0", "256.0", "512.0")] == [1, 1, 2, 3]


def test_a_prompt_counts_when_its_first_token_comes_once_for_each_sample() -> None:
    metrics = ServerMetrics(MODEL)
    metrics.on_first_token(request_of(num_prompt_tokens=7), 0.25)
    metrics.on_first_token(request_of(num_prompt_tokens=10, n=3), 0.75)
    found = values(metrics)
    assert found["prompt_tokens_total"] == 7 + 30
    assert found["time_to_first_token_seconds_count"] == 2 and found["time_to_first_token_seconds_sum"] == 1.0


def test_generated_tokens_and_their_gaps_are_counted() -> None:
    metrics = ServerMetrics(MODEL)
    metrics.on_tokens(3, [])
    metrics.on_tokens(4, [0.002, 0.004, 1000.0])
    found = values(metrics)
    assert found["generation_tokens_total"] == 7
    buckets = [
        found[f"inter_token_latency_seconds_bucket/{bound}"] for bound in ("0.0015", "0.002", "0.004", "30.0", "+Inf")
    ]
    assert buckets == [0, 1, 2, 2, 3]
    assert found["inter_token_latency_seconds_sum"] == pytest.approx(1000.006)


def test_a_request_that_came_to_its_end_is_measured() -> None:
    metrics = ServerMetrics(MODEL, clock=lambda: 104.5)
    metrics.on_finished(request_of(), "stop")
    metrics.on_finished(request_of(num_prompt_tokens=4, num_generated=6), "length")
    found = values(metrics)
    assert found["request_success_total/stop"] == found["request_success_total/length"] == 1
    assert (found["request_prompt_tokens_sum"], found["request_generation_tokens_sum"]) == (3 + 4, 5 + 6)
    assert found["e2e_request_latency_seconds_sum"] == 2 * 4.5  # from the arrival at the server
    assert found["request_queue_time_seconds_sum"] == 2 * 1.0


@pytest.mark.parametrize("outcome", ["abort", "error"])
def test_a_request_that_was_cut_short_is_counted_but_not_measured(outcome: str) -> None:
    metrics = ServerMetrics(MODEL)
    metrics.on_finished(request_of(), outcome)
    never_scheduled = request_of()
    never_scheduled.metrics = None
    metrics.on_finished(never_scheduled, outcome)
    found = values(metrics)
    assert found.pop(f"request_success_total/{outcome}") == 2
    assert set(found.values()) == {0.0}


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = ServerMetrics("same"), ServerMetrics("same")
    first.on_tokens(5, [])
    assert values(first)["generation_tokens_total"] == 5 and values(second)["generation_tokens_total"] == 0


PROMETHEUS_ASKS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize("accept", [None, "", "*/*", "text/plain; version=garbage", PROMETHEUS_ASKS])
def test_metrics_have_the_same_names_whoever_asks(accept: str | None) -> None:
    answer = get(ServerMetrics("m"), accept)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'pagebrain:generation_tokens_total{model_name="m"} 0.0' in answer.text.splitlines()


def test_our_buckets_count_as_the_librarys_histogram_does() -> None:
    bounds = (0.001, 0.01, 0.1, 1.0)
    ours = Buckets(bounds)
    registry = CollectorRegistry()
    theirs = Histogram("h", "reference", buckets=bounds, registry=registry)
    numbers = [0.0, 0.001, math.nextafter(0.001, 1), 0.05, 0.1, 0.5, 1.0, 1.1, 1e9]
    for number in numbers:
        theirs.observe(number)
    ours.add_all(numbers[:4])
    for number in numbers[4:]:
        ours.add(number)
    for bound, count in ours.cumulative():
        assert registry.get_sample_value("h_bucket", {"le": bound}) == count, bound
    assert registry.get_sample_value("h_sum") == pytest.approx(ours.sum)


def test_the_metrics_are_an_observer_of_the_engine_client() -> None:
    observer: ServerObserver = ServerMetrics(MODEL)  # mypy checks the signatures
    observer.on_tokens(0, [])
