"""The report of a server's benchmark, as tables and as JSON, and ``--against-offline``, the comparison with offline runs.

In that comparison the same requests go through the server and through ``LLM.generate``, in interleaved rounds. A server with
N clients never runs more than N sequences at once, so offline runs with ``max_num_seqs`` of at most N, and has all requests
at the start. Both have the same model, engine settings and threads. Each round has requests of its own. Each side of a round
has processes of its own, which end before the other side starts, so that the two do not compete for memory or cores. The
clients run on the machine of the server and use some of its cores.

:mod:`~pagebrain.bench.serve.measurements` computes all figures.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pagebrain.bench.child import RunResult, RunSpec
from pagebrain.bench.command import new_table, say
from pagebrain.bench.offline_report import summarize
from pagebrain.bench.serve.measurements import RequestRecord
from pagebrain.bench.workload import BenchRequest
from pagebrain.errors import PageBrainError

_MODEL_FIELDS = ("model", "load_format", "dtype", "device", "seed")
_DEFAULT_MAX_NUM_SEQS = 64


def offline_spec(
    engine: Mapping[str, Any], concurrency: int, threads: int, requests: list[BenchRequest], warmup: list[BenchRequest]
) -> RunSpec:
    """The offline side of a round: the server's ``engine`` settings, with at most as many sequences as clients."""
    settings = {name: value for name, value in engine.items() if name not in _MODEL_FIELDS}
    settings["max_num_seqs"] = min(concurrency, settings.get("max_num_seqs", _DEFAULT_MAX_NUM_SEQS))
    model = {name: engine[name] for name in _MODEL_FIELDS if name in engine}
    return RunSpec("pagebrain", model, threads, requests, warmup, settings)


def check_all_done(metrics: Mapping[str, Any], requests: Sequence[BenchRequest]) -> None:
    """Raise ``PageBrainError`` unless the server did all the work of the offline side, so that the ratio is valid."""
    asked = sum(request.output_len for request in requests)
    if metrics["done"] != len(requests) or metrics["output_tokens"] != asked:
        reasons = "; ".join(f"{count} times {reason}" for reason, count in metrics["reasons"].items())
        raise PageBrainError(
            f"the server did {metrics['done']} of {len(requests)} requests, {metrics['output_tokens']} of {asked} tokens: "
            f"that cannot be compared with offline ({reasons or 'outputs were too short'})"
        )


def compare(
    served: Sequence[Mapping[str, Any]], offline: Sequence[RunResult], concurrency: int, threads: int
) -> dict[str, Any]:
    """Tokens per second of both sides and their ratio, round by round. ``served`` are the metrics of the server's rounds."""
    tokens = [sum(map(len, result.token_ids)) for result in offline]
    served_speed = [metrics["output_tokens_per_s"] for metrics in served]
    offline_speed = [count / result.elapsed_s for count, result in zip(tokens, offline)]
    configuration = offline[0].configuration
    return {
        "what": (
            f"served: {concurrency} streaming clients in a closed loop, over HTTP on this machine. offline: LLM.generate, "
            f"all requests at once, max_num_seqs={configuration['max_num_seqs']}. In each round the same requests for both "
            f"({served[0]['requests']}, greedy, end of sequence ignored), the same model and engine settings, {threads} "
            f"thread{'s' * (threads > 1)} for each engine; each in processes of its own, one after the other, after a "
            "warm-up. Clients and HTTP take their share of the same cores. Output tokens by the time from the first request "
            "to the last token."
        ),
        "served_tokens_per_s": summarize(served_speed),
        "offline_tokens_per_s": summarize(offline_speed),
        "ratio": summarize([ours / theirs for ours, theirs in zip(served_speed, offline_speed)]),
        "offline_configuration": configuration,
        "offline_detokenization": offline[0].detokenization,
        "threads": threads,
    }


LATE_MS = 20.0
"""If an open loop sends its requests later than this (p99), the load was smaller than intended."""

BUSY = 0.85
"""A client process that uses a larger share of a core than this may limit the figures."""

_LATENCIES = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "itl_ms": "ITL",
    "itl_per_token_ms": "ITL per token",
    "e2e_ms": "E2E",
}
_MEANINGS = (
    "TTFT: sent to first event with a token. TPOT: (E2E - TTFT) / (output tokens - 1). ITL: gaps between events, of all "
    "requests. E2E: sent to last token."
)
_INNERMOST = re.compile(r"\{[^{}\[\]]*\}")


def request_rows(records: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    """A row of times for each request, in seconds."""
    rows = []
    for record in records:
        row: dict[str, Any] = {
            "index": record.index,
            "outcome": record.outcome,
            "sent_s": _rounded(record.sent_s),
            "ttft_s": _rounded(record.ttft_s),
            "tpot_s": _rounded(record.tpot_s),
            "e2e_s": _rounded(record.e2e_s),
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.num_output_tokens,
            "events": record.num_events,
        }
        rows.append(row if record.outcome == "done" else {name: row[name] for name in ("index", "outcome", "sent_s")})
        if record.reason:
            rows[-1]["reason"] = record.reason
    return rows


def to_json(report: Mapping[str, Any]) -> str:
    """Indented JSON. An object that holds only plain values, such as a request, takes one line."""
    text = json.dumps(report, indent=2, allow_nan=False)
    return _INNERMOST.sub(lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n"


def notices(run: Mapping[str, Any]) -> list[str]:
    """Warnings about the validity of a run's figures."""
    numbers = run["metrics"]
    said = [f"{count} not done: {reason}" for reason, count in list(numbers["reasons"].items())[:5]]
    if run["warmup_failures"]:
        failures = run["warmup_failures"]
        said.append(f"{len(failures)} of the warm-up requests failed, so the server may not have been warm: {failures[0]}")
    late = numbers["sent_late_ms"]
    if late["p99"] > LATE_MS:
        said.append(
            f"requests were sent up to {late['max']:,.0f} ms late: the load was less even than asked; try --processes"
        )
    if max(run["client_busy"]) > BUSY:
        said.append(
            f"a client process was busy {max(run['client_busy']):.0%} of the time: the figures may be the client's; "
            "try --processes"
        )
    if numbers["done"] and numbers["tokens_counted_by"] == "events":
        said.append("the server sent no usage: each event was counted as one token")
    if run["short_outputs"]:
        said.append(f"{run['short_outputs']} outputs were shorter than asked for")
    return said


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print a report: a sweep as a table, other runs one by one, and the comparison if there is one."""
    server, runs, comparison = report["server"], report["runs"], report["comparison"]
    say(console, f"{server['model']} at {server['url']}")
    if comparison is None and len(runs) > 1:
        print_sweep(runs, console)
    else:
        for run in runs:
            print_run(run, console)
    if comparison is not None:
        print_comparison(comparison, console)


def print_run(run: Mapping[str, Any], console: Console) -> None:
    """Print counts, rates, the table of latencies and goodput; without a request that is done, counts only."""
    numbers = run["metrics"]
    counts = ", ".join(f"{numbers[name]} {name}" for name in ("done", "failed", "refused"))
    say(console, f"{run['load']}: {numbers['requests']} requests, {counts}")
    if not numbers["done"]:
        say(console, "no request was done: there is nothing to measure")
    else:
        together = "" if numbers["tokens_per_event"] < 1.005 else f", {numbers['tokens_per_event']:.2f} tokens an event"
        say(
            console,
            f"{numbers['duration_s']:.2f} s: {numbers['requests_per_s']:,.2f} requests/s, "
            f"{numbers['output_tokens_per_s']:,.1f} output tokens/s, {numbers['total_tokens_per_s']:,.1f} with prompts "
            f"({numbers['prompt_tokens']:,} prompt, {numbers['output_tokens']:,} output tokens{together}; "
            f"at most {numbers['most_in_flight']} requests at a time)",
        )
        console.print(_latency_table(numbers))
        say(console, _MEANINGS)
        if numbers["goodput"]:
            say(console, _goodput(numbers))
    for notice in notices(run):
        say(console, f"note: {notice}")


def _latency_table(numbers: Mapping[str, Any]) -> Table:
    columns = ("mean", "median", "p95", "p99")
    table = new_table("ms", *columns)
    for name, label in _LATENCIES.items():
        found = numbers[name]
        if found is not None and not (name == "itl_per_token_ms" and numbers["tokens_per_event"] < 1.005):
            table.add_row(label, *(f"{found[column]:,.2f}" for column in columns))
    return table


def _goodput(numbers: Mapping[str, Any]) -> str:
    goodput = numbers["goodput"]
    limits = ", ".join(f"{name.upper()} <= {limit:g} ms" for name, limit in goodput["slo_ms"].items())
    share = goodput["good"] / numbers["requests"]
    return f"goodput: {goodput['requests_per_s']:,.2f} requests/s with {limits} ({share:.1%} of all requests)"


def print_sweep(runs: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a row for each load, with a latency's median above its p99."""
    has_goodput = any(run["metrics"]["goodput"] for run in runs)
    headings = ["done", "requests\n/s", "output\ntokens/s", "TTFT, ms\nmedian\np99", "TPOT, ms\nmedian\np99"]
    table = new_table("load", *headings, *["goodput,\nrequests\n/s"] * has_goodput)
    for run in runs:
        numbers = run["metrics"]
        cells = [f"{numbers['done']} of {numbers['requests']}"]
        cells += [_number(numbers["requests_per_s"], 2), _number(numbers["output_tokens_per_s"], 1)]
        cells += [_pair(numbers["ttft_ms"]), _pair(numbers["tpot_ms"])]
        if has_goodput:
            cells.append(_number(numbers["goodput"]["requests_per_s"], 2))
        table.add_row(run["load_label"], *cells)
    console.print(table)
    for run in runs:
        for notice in notices(run):
            say(console, f"note, {run['load']}: {notice}")


def print_comparison(comparison: Mapping[str, Any], console: Console) -> None:
    """Print served against offline, round by round, and a description of the comparison."""
    table = new_table("round", "served\ntokens/s", "offline\ntokens/s", "served / offline")
    served, offline, ratio = (comparison[name] for name in ("served_tokens_per_s", "offline_tokens_per_s", "ratio"))
    for number, row in enumerate(zip(served["rounds"], offline["rounds"], ratio["rounds"]), start=1):
        table.add_row(str(number), f"{row[0]:,.1f}", f"{row[1]:,.1f}", f"{row[2]:.1%}")
    table.add_section()
    table.add_row("median", f"{served['median']:,.1f}", f"{offline['median']:,.1f}", f"{ratio['median']:.1%}")
    console.print(table)
    say(console, comparison["what"])


def _pair(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:,.1f}\n{found['p99']:,.1f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _rounded(value: float | None) -> float | None:
    """To the microsecond."""
    return None if value is None else round(value, 6)
