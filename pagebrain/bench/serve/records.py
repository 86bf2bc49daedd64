"""One request as the benchmark's client saw it: first the raw bytes with their times, after the run a record of them.

While a benchmark runs, the client only stamps chunks with the time at which they came; what they say is read here, when the
clock no longer matters. :mod:`~pagebrain.bench.serve.metrics` turns the records into numbers.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_REASON_LEN = 300

_ENDINGS = ("stop", "length")
"""Finish reasons of an output that is complete; others (``abort``, say) tell of one that is not."""


@dataclass
class Exchange:
    """A request and its answer, unread. Times are seconds of ``time.perf_counter``.

    Attributes:
        index: which of the workload's requests.
        scheduled_s: when an open loop meant to send it; a closed loop sends when it can, so there it is ``sent_s``.
        sent_s: just before the request was handed to the HTTP library, which may have to connect first.
        ended_s: when the answer was complete, or had failed.
        arrivals_s, chunks: the body as it came; several events may share a chunk, and an event may span two.
        error: why there is no whole answer; ``None`` if there is one.
        is_refused: the server was full and said when to come back.
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
    """What became of one request. Times in seconds; ``sent_s`` and ``ended_s`` count from the start of the load.

    Attributes:
        outcome: ``done`` (all tokens came), ``refused`` (the server was full), or ``failed``.
        reason: why it is not done.
        late_s: how long after its scheduled time an open loop sent it.
        ttft_s: from sending to the first event with a token.
        e2e_s: from sending to the last event with a token.
        prompt_tokens, output_tokens: as the server counted them; ``None`` if it sends no usage.
        num_events: events that brought tokens; fewer than tokens when some shared an event.
        gaps_s: between one such event and the next, ``num_events - 1`` of them.
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
        """Tokens that the server counted; from a server that does not count, one for each event."""
        return self.num_events if self.output_tokens is None else self.output_tokens

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: ``(e2e - ttft) / (tokens - 1)``. ``None`` for fewer than two tokens."""
        if self.ttft_s is None or self.e2e_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def token_gaps_s(self) -> tuple[float, ...]:
        """``gaps_s``, each divided by the tokens that an event after the first brought on average; their mean is TPOT.

        A server that packs ten tokens into an event must not look ten times as slow from token to token.
        """
        if not self.gaps_s or self.num_output_tokens < 2:
            return ()
        share = len(self.gaps_s) / (self.num_output_tokens - 1)
        return self.gaps_s if share == 1 else tuple(gap * share for gap in self.gaps_s)


def read_exchange(exchange: Exchange, start_s: float) -> RequestRecord:
    """Read the answer. ``start_s`` is the ``perf_counter`` time at which the load began."""

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
    """The data of each server-sent event, with the time of the chunk that completed it. Comments are left out."""
    rest = b""
    for arrived_s, chunk in zip(arrivals_s, chunks):
        *complete, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in complete:
            data = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield arrived_s, b"\n".join(data)


class _BrokenStream(Exception):
    """A stream that does not hold a complete answer; the message says why."""


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
        answer.times_s.pop()  # it only says why the output ended; a token without text would have been counted
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
    """What a server says went wrong: the message of OpenAI's error object, or whatever there is instead."""
    if isinstance(payload, dict):
        error = payload.get("error", payload)
        payload = error.get("message", error) if isinstance(error, dict) else error
    return str(payload)
