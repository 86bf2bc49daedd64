"""The measurements of the client: the raw bytes of each answer with their times, a record of each request, and the figures.

While a benchmark runs, the client only records chunks and their arrival times. They are parsed here, after the run.

The figures are measured at the client, for requests that are done:

- **TTFT**, time to first token: from sending the request to its first event with a token.
- **E2E**, end to end: from sending the request to its last event with a token.
- **TPOT**, time per output token: ``(E2E - TTFT) / (output tokens - 1)``, for each request with two tokens or more.
- **ITL**, inter-token latency: the gaps between successive events of a request, over all requests.
- **ITL per token**: each of these gaps divided by the mean number of tokens in an event of its request after the first one,
  because an event may hold several tokens.

Events that arrive in one chunk have a gap of 0. The server's usage counts the tokens.
"""

import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pagebrain.errors import ConfigError

MAX_REASON_LEN = 300

_ENDINGS = ("stop", "length")
"""Finish reasons of a complete output. Any other, such as ``abort``, means a failed request."""


@dataclass
class Exchange:
    """A request and its answer, not parsed yet. Times are seconds of ``time.perf_counter``.

    Attributes:
        index: of the request in the workload.
        scheduled_s: the arrival time of an open loop; in a closed loop ``sent_s``.
        sent_s: just before the request was given to the HTTP library, which may have to connect first.
        ended_s: when the answer was complete or had failed.
        arrivals_s, chunks: the received body; several events may share a chunk, and an event may span two chunks.
        error: why the answer is not complete; ``None`` if it is.
        is_refused: the server was full and sent ``Retry-After``.
    """

    index: int
    scheduled_s: float
    sent_s: float
    ended_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    error: str | None = None
    is_refused: bool = False


@dataclass(frozen=True)
class RequestRecord:
    """The outcome of one request. Times in seconds; ``sent_s`` and ``ended_s`` count from the start of the load.

    Attributes:
        outcome: ``done`` (the answer is complete), ``refused`` (the server was full), or ``failed``.
        reason: why it is not done.
        late_s: how long after its arrival time an open loop sent it.
        ttft_s: from sending to the first event with a token.
        e2e_s: from sending to the last event with a token.
        prompt_tokens, output_tokens: the server's counts; ``None`` if it sends no usage.
        num_events: events with tokens; an event may have several.
        gaps_s: between successive events with tokens, ``num_events - 1`` of them.
    """

    index: int
    outcome: Literal["done", "failed", "refused"]
    reason: str
    sent_s: float
    ended_s: float
    late_s: float = 0.0
    ttft_s: float | None = None
    e2e_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    num_events: int = 0
    gaps_s: tuple[float, ...] = ()

    @property
    def num_output_tokens(self) -> int:
        """The server's count of tokens; without one, the number of events."""
        return self.num_events if self.output_tokens is None else self.output_tokens

    @property
    def tpot_s(self) -> float | None:
        """TPOT; ``None`` for fewer than two tokens."""
        if self.ttft_s is None or self.e2e_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def token_gaps_s(self) -> tuple[float, ...]:
        """``gaps_s``, each divided by the mean number of tokens in an event after the first; their mean is TPOT."""
        if not self.gaps_s or self.num_output_tokens < 2:
            return ()
        share = len(self.gaps_s) / (self.num_output_tokens - 1)
        return self.gaps_s if share == 1 else tuple(gap * share for gap in self.gaps_s)


def read_exchange(exchange: Exchange, start_s: float) -> RequestRecord:
    """Parse the answer. ``start_s`` is the ``perf_counter`` time at which the load began."""

    def record(outcome: Literal["done", "failed", "refused"], reason: str, **numbers: Any) -> RequestRecord:
        return RequestRecord(
            index=exchange.index,
            outcome=outcome,
            reason=" ".join(reason.split())[:MAX_REASON_LEN],
            sent_s=exchange.sent_s - start_s,
            ended_s=exchange.ended_s - start_s,
            late_s=exchange.sent_s - exchange.scheduled_s,
            **numbers,
        )

    if exchange.is_refused:
        return record("refused", exchange.error or "")
    if exchange.error is not None:
        return record("failed", exchange.error)
    try:
        answer = _read_answer(exchange)
    except _BrokenStream as broken:
        return record("failed", str(broken))
    times = answer.times_s
    return record(
        "done",
        "",
        ttft_s=times[0] - exchange.sent_s,
        e2e_s=times[-1] - exchange.sent_s,
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.output_tokens,
        num_events=len(times),
        gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
    )


def events(arrivals_s: list[float], chunks: list[bytes]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event with the time of the chunk that completed it. Comments are skipped."""
    rest = b""
    for arrived_s, chunk in zip(arrivals_s, chunks):
        *complete, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in complete:
            data = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield arrived_s, b"\n".join(data)


class _BrokenStream(Exception):
    """A stream without a complete answer; the message says why."""


@dataclass
class _Answer:
    times_s: list[float]
    prompt_tokens: int | None
    output_tokens: int | None


def _read_answer(exchange: Exchange) -> _Answer:
    """Times of the events with tokens, and the server's counts. Raises ``_BrokenStream``."""
    answer = _Answer([], None, None)
    finish_reason: str | None = None
    closes_empty = is_done = False
    for arrived_s, data in events(exchange.arrivals_s, exchange.chunks):
        if data == b"[DONE]":
            is_done = True
            break
        event = _json(data)
        if event.get("error") is not None:
            raise _BrokenStream(f"an error in the stream: {error_message(event)}")
        if event.get("usage"):
            answer.prompt_tokens = event["usage"].get("prompt_tokens")
            answer.output_tokens = event["usage"].get("completion_tokens")
        if event.get("choices"):
            choice = event["choices"][0]
            answer.times_s.append(arrived_s)
            finish_reason = choice.get("finish_reason") or finish_reason
            closes_empty = bool(choice.get("finish_reason")) and not choice.get("text")
    if not is_done:
        raise _BrokenStream("the stream ended without [DONE]")
    if closes_empty and answer.output_tokens is not None and len(answer.times_s) > answer.output_tokens:
        answer.times_s.pop()  # this event has only the finish reason: a token without text would be in the server's count
    if not answer.times_s:
        raise _BrokenStream("the stream brought no token")
    if finish_reason not in _ENDINGS:
        raise _BrokenStream(f"the output ended with finish_reason {finish_reason!r}")
    return answer


def _json(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise _BrokenStream(f"an event is no JSON object: {data[:80]!r}")
    return event


def error_message(payload: object) -> str:
    """The message of OpenAI's error object; of any other payload its text."""
    if isinstance(payload, dict):
        error = payload.get("error", payload)
        payload = error.get("message", error) if isinstance(error, dict) else error
    return str(payload)


SLO_NAMES = ("ttft", "tpot", "e2e")
"""The figures that ``--slo`` can limit."""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The ``percent``-th percentile of ascending values, with linear interpolation."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize_ms(values_s: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, p95, p99 and largest of values in seconds, in milliseconds; ``None`` if there are none."""
    if not values_s:
        return None
    ordered = sorted(1000 * value for value in values_s)
    return {
        "mean": statistics.fmean(ordered),
        "median": percentile(ordered, 50),
        "p95": percentile(ordered, 95),
        "p99": percentile(ordered, 99),
        "max": ordered[-1],
    }


def parse_slo(text: str) -> dict[str, float]:
    """``ttft:200,tpot:20`` as limits in milliseconds. Raises ``ConfigError``."""
    limits: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.strip().partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in SLO_NAMES or not 0 < limit < math.inf or name in limits:
            raise ConfigError(
                f"--slo must name milliseconds for {', '.join(SLO_NAMES)}, each once, such as ttft:200,tpot:20; got {text!r}"
            )
        limits[name] = limit
    return limits


def meets(record: RequestRecord, slo: Mapping[str, float]) -> bool:
    """Whether a request is done and within every limit. An output of one token has no TPOT."""
    times_s = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2e": record.e2e_s}
    kept = ((times_s[name], limit) for name, limit in slo.items())
    return record.outcome == "done" and all(value is None or 1000 * value <= limit for value, limit in kept)


def measure(records: Sequence[RequestRecord], slo: Mapping[str, float]) -> dict[str, Any]:
    """All figures of a run. Rates are over the time from the first request sent to the end of the last one.

    Rates and latencies are ``None`` if no request is done.
    """
    done = [record for record in records if record.outcome == "done"]
    duration_s = max(record.ended_s for record in records) - min(record.sent_s for record in records)
    output_tokens = sum(record.num_output_tokens for record in done)
    prompt_tokens = sum(record.prompt_tokens or 0 for record in done)
    num_events = sum(record.num_events for record in done)

    def rate(count: int) -> float | None:
        return count / duration_s if done and duration_s > 0 else None

    return {
        "requests": len(records),
        "done": len(done),
        "failed": sum(record.outcome == "failed" for record in records),
        "refused": sum(record.outcome == "refused" for record in records),
        "reasons": dict(Counter(record.reason for record in records if record.outcome != "done").most_common()),
        "most_in_flight": most_in_flight(records),
        "duration_s": duration_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "tokens_counted_by": "usage" if all(record.output_tokens is not None for record in done) else "events",
        "tokens_per_event": output_tokens / num_events if num_events else None,
        "requests_per_s": rate(len(done)),
        "output_tokens_per_s": rate(output_tokens),
        "total_tokens_per_s": rate(prompt_tokens + output_tokens),
        "ttft_ms": summarize_ms([record.ttft_s for record in done if record.ttft_s is not None]),
        "tpot_ms": summarize_ms([record.tpot_s for record in done if record.tpot_s is not None]),
        "itl_ms": summarize_ms([gap for record in done for gap in record.gaps_s]),
        "itl_per_token_ms": summarize_ms([gap for record in done for gap in record.token_gaps_s]),
        "e2e_ms": summarize_ms([record.e2e_s for record in done if record.e2e_s is not None]),
        "sent_late_ms": summarize_ms([record.late_s for record in records]),
        "goodput": _goodput(records, slo, rate) if slo else None,
    }


def _goodput(
    records: Sequence[RequestRecord], slo: Mapping[str, float], rate: Callable[[int], float | None]
) -> dict[str, Any]:
    good = sum(meets(record, slo) for record in records)
    return {"slo_ms": dict(slo), "good": good, "requests_per_s": rate(good)}


def most_in_flight(records: Sequence[RequestRecord]) -> int:
    """The largest number of requests in flight at the same time."""
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.ended_s, -1) for record in records])
    most = now = 0
    for _, change in changes:  # at equal times an end (-1) sorts before a start
        now += change
        most = max(most, now)
    return most
