"""``GET /metrics`` for Prometheus: the engine's load, totals, and latencies of requests.

:class:`ServerMetrics` is an observer of :class:`~pagebrain.server.link.client.EngineClient`. It keeps numbers, and makes
metrics of them only for a scrape. Names and meanings are vLLM's with another prefix, so that vLLM's dashboards can be used.
The buckets are finer than vLLM's, because the models are small and fast.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from pagebrain.engine.trace import EngineStats

if TYPE_CHECKING:
    from pagebrain.server.link.streams import RequestStream

PREFIX = "pagebrain:"
OUTCOMES = ("stop", "length", "abort", "error")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TOKEN_GAPS_S = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_FIRST_TOKENS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_REQUESTS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0),
)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REQUEST_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Buckets:
    """A histogram: the number of values in each bucket, and their sum. For a single thread.

    The library's histogram takes a lock and walks the bounds for every value. With tens of thousands of values a second that
    is too slow for the event loop.

    Args:
        bounds: largest value of each bucket, ascending. One more bucket counts larger values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_all(self, values: Iterable[float]) -> None:
        """Count many values."""
        counts, bounds, total = self.counts, self.bounds, 0.0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self.sum += total

    def cumulative(self) -> list[tuple[str, float]]:
        """For each bound, as Prometheus writes it, the number of values up to it."""
        pairs, total = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts):
            total += count
            pairs.append(("+Inf" if bound == float("inf") else str(float(bound)), float(total)))
        return pairs


class ServerMetrics:
    """An observer of the engine client, and a collector of ``prometheus_client``. Needs no lock: it runs on the event loop.

    Args:
        model_name: the label ``model_name`` of every metric.
        clock: the clock of the engine client's times.
        held_bytes: returns the bytes reserved for answers in one piece.
    """

    def __init__(
        self, model_name: str, clock: Callable[[], float] = time.monotonic, held_bytes: Callable[[], int] = lambda: 0
    ) -> None:
        self.model_name = model_name
        self._clock = clock
        self._held_bytes = held_bytes
        self.registry = CollectorRegistry(auto_describe=True)  # not the global one: a process may hold several servers
        self._stats = EngineStats()
        self._num_prompt_tokens = 0
        self._num_generated = 0
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._first_token_s = Buckets(_FIRST_TOKENS_S)
        self._gap_s = Buckets(_TOKEN_GAPS_S)
        self._request_s = Buckets(_REQUESTS_S)
        self._queue_s = Buckets(_REQUESTS_S)
        self._prompt_tokens = Buckets(_REQUEST_TOKENS)
        self._generated_tokens = Buckets(_REQUEST_TOKENS)
        self._step_tokens = Buckets(_STEP_TOKENS)
        self.registry.register(self)

    # Called by the engine client --------------------------------------------------------------------------------------

    def on_step(self, stats: EngineStats) -> None:
        """Keep the engine's counts. Gauges show the latest."""
        self._stats = stats
        self._step_tokens.add_all(stats.last_step_tokens)

    def on_first_token(self, request: "RequestStream", seconds: float) -> None:
        """Count the prompt and the time to its first token."""
        self._first_token_s.add(seconds)
        self._num_prompt_tokens += request.num_prompt_tokens * request.params.n

    def on_tokens(self, num_tokens: int, gaps_s: list[float]) -> None:
        """Count tokens and the gaps before them. Called hundreds of times a second."""
        self._num_generated += num_tokens
        self._gap_s.add_all(gaps_s)

    def on_finished(self, request: "RequestStream", outcome: str) -> None:
        """Count a request that has ended. Its times count only if it was complete: an abort says nothing about speed."""
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
        times = request.metrics
        if times is None or outcome not in ("stop", "length"):
            return
        self._prompt_tokens.add(request.num_prompt_tokens)
        self._generated_tokens.add(request.num_generated)
        self._request_s.add(self._clock() - request.arrival_s)
        if times.first_scheduled_s is not None:  # measured in the engine process; both processes use the machine's clock
            self._queue_s.add(max(0.0, times.first_scheduled_s - request.arrival_s))

    # Called for a scrape ----------------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """The current metrics, in the order of docs/server.md."""
        stats = self._stats
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("num_requests_running", "Running sequences; each sample is a sequence", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait for a seat, blocks or their turn", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Blocks of the KV cache in use, as a fraction: 1 is all of them", used)
        yield self._gauge(
            "held_answer_bytes",
            "Bytes reserved for answers in one piece, from their requests until they were sent",
            self._held_bytes(),
        )
        yield self._counter("num_preemptions", "How often a sequence lost its blocks", stats.num_preemptions)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache", stats.prefix_cache_queries
        )
        yield self._counter(
            "prefix_cache_hits", "Prompt tokens that were in the prefix cache and not computed", stats.prefix_cache_hits
        )
        yield self._gauge(
            "num_cached_blocks", "Blocks whose content the prefix cache can find, in use or free", stats.num_cached_blocks
        )
        yield self._counter(
            "evicted_blocks", "Cached blocks that lost their content, because others needed them", stats.num_evicted_blocks
        )
        yield self._counter(
            "copied_blocks",
            "Blocks that were copied, because two samples continue one that is partly filled",
            stats.num_copied_blocks,
        )
        yield self._gauge("num_requests_swapped", "Sequences whose K and V are in the swap space", stats.num_swapped)
        out_and_in = (("out", "to", stats.num_swapped_out_blocks), ("in", "back from", stats.num_swapped_in_blocks))
        for direction, where, count in out_and_in:
            yield self._counter(f"swapped_{direction}_blocks", f"Blocks that were copied {where} the swap space", count)
            yield self._counter(
                f"swapped_{direction}_bytes",
                f"Bytes of K and V that were copied {where} the swap space",
                count * stats.swap_block_bytes,
            )
        yield self._counter(
            "prompt_tokens",
            "Prompt tokens, counted for each sample when its request's first token comes; computing them again after a "
            "preemption does not count",
            self._num_prompt_tokens,
        )
        yield self._counter("generation_tokens", "Tokens generated", self._num_generated)
        finished = CounterMetricFamily(
            PREFIX + "request_success", "Requests that ended, by finish reason", labels=["model_name", "finished_reason"]
        )
        for outcome, count in self._outcomes.items():
            finished.add_metric([self.model_name, outcome], count)
        yield finished
        yield self._histogram(
            "time_to_first_token_seconds", "From a request's arrival at the server to its first token", self._first_token_s
        )
        yield self._histogram("inter_token_latency_seconds", "Between two tokens of one sample", self._gap_s)
        yield self._histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival to its last token, if it was not aborted",
            self._request_s,
        )
        yield self._histogram(
            "request_queue_time_seconds", "From a request's arrival to the first step that it took part in", self._queue_s
        )
        yield self._histogram("request_prompt_tokens", "Prompt tokens of a request", self._prompt_tokens)
        yield self._histogram("request_generation_tokens", "Tokens generated for a request", self._generated_tokens)
        yield self._histogram("iteration_tokens_total", "Tokens computed in a step, of prompts and after", self._step_tokens)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self.model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self.model_name], value)
        return family

    def _histogram(self, name: str, text: str, buckets: Buckets) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self.model_name], buckets.cumulative(), buckets.sum)
        return family


def metrics_route(metrics: ServerMetrics) -> APIRouter:
    """``GET /metrics``, always in Prometheus' text format.

    In the OpenMetrics format the library writes ``_`` for a colon, so a metric's name would depend on the request.
    """
    router = APIRouter()

    @router.get("/metrics", response_class=PlainTextResponse, summary="Metrics for Prometheus")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE)

    return router
