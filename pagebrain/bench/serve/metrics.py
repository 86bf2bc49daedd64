"""From the records of a run to its numbers: counts, throughput, TTFT, TPOT, ITL and E2E, and goodput. Pure functions.

What is measured, at the client, of requests that are done only:

- **TTFT**, time to first token: from sending the request to its first event with a token.
- **E2E**, end to end: from sending the request to its last event with a token.
- **TPOT**, time per output token: ``(E2E - TTFT) / (output tokens - 1)``, one for each request with two tokens or more.
- **ITL**, inter-token latency: the gaps between successive events of a request, all requests' gaps together. An event may
  hold several tokens, so beside it stands **ITL per token**: each gap divided by the tokens that an event of its request
  brought on average, the first event left out.

Events that reach the client in one piece have a gap of 0. Tokens are counted by the server's usage.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pagebrain.bench.serve.records import RequestRecord
from pagebrain.errors import ConfigError

SLO_NAMES = ("ttft", "tpot", "e2e")
"""What ``--slo`` can limit."""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The ``percent``-th percentile of ascending values, interpolated between the two next to it."""
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
    """Whether a request is done and kept every limit. An output of one token has no TPOT to exceed."""
    times_s = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2e": record.e2e_s}
    kept = ((times_s[name], limit) for name, limit in slo.items())
    return record.outcome == "done" and all(value is None or 1000 * value <= limit for value, limit in kept)


def measure(records: Sequence[RequestRecord], slo: Mapping[str, float]) -> dict[str, Any]:
    """All numbers of a run. The rates are over the time from the first request sent to the end of the last; without a
    request that is done they are ``None``, as are the latencies.
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
    """The largest number of requests that had been sent and not ended at the same time."""
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.ended_s, -1) for record in records])
    most = now = 0
    for _, change in changes:  # at equal times an end (-1) sorts before a start
        now += change
        most = max(most, now)
    return most
