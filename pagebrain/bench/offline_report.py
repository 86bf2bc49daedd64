"""The figures of timed runs, as a JSON object and as a table: medians, spreads, ratios."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from pagebrain.bench.child import RunResult
from pagebrain.bench.command import new_table, say
from pagebrain.bench.decode_steps import print_closer
from pagebrain.bench.workload import GREEDY, BenchRequest, Sampling
from pagebrain.engine.trace import StepTotals

_MB = 1e6


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest, and the difference of the last two as a share of the median."""
    median = statistics.median(values)
    return {
        "median": median,
        "min": min(values),
        "max": max(values),
        "spread": (max(values) - min(values)) / median if median else 0.0,
        "rounds": list(values),
    }


def engine_report(
    requests: Sequence[BenchRequest], results: Sequence[RunResult], sampling: Sampling = GREEDY
) -> dict[str, Any]:
    """The figures of one engine. Surplus tokens do not count; ``ttft_s`` is measured from the start of the run."""
    useful = sum(request.output_len for request in requests)
    speed = summarize([useful / result.elapsed_s for result in results])
    cuda = [result.peak_cuda_bytes / _MB for result in results if result.peak_cuda_bytes is not None]
    return {
        "output_tokens_per_s": speed["median"],
        "output_tokens_per_s_stats": speed,
        "elapsed_s": summarize([result.elapsed_s for result in results]),
        "ttft_s": {
            "median": statistics.median(statistics.median(result.first_token_s) for result in results),
            "mean": statistics.median(statistics.fmean(result.first_token_s) for result in results),
            "max": statistics.median(max(result.first_token_s) for result in results),
            "rounds_median": [statistics.median(result.first_token_s) for result in results],
        },
        "peak_memory_mb": max(result.peak_rss_bytes for result in results) / _MB,
        "peak_cuda_memory_mb": max(cuda) if cuda else None,
        "start": start_report(results),
        "sampling": str(sampling),
        "detokenization": results[0].detokenization,
        "configuration": results[0].configuration,
        **totals_report(results),
        "closer": next((result.closer for result in reversed(results) if result.closer is not None), None),
    }


def start_report(results: Sequence[RunResult]) -> dict[str, Any] | None:
    """Seconds from the start of the process to ready, and of the warm-up, over all rounds."""
    starts = [result.start for result in results if result.start]
    return {name: summarize([start[name] for start in starts]) for name in starts[0]} if starts else None


def totals_report(results: Sequence[RunResult]) -> dict[str, Any]:
    """PageBrain's totals of the timed runs, and the share of decode tokens that CUDA graphs produced."""
    rounds = [StepTotals(**result.totals) for result in results if result.totals is not None]  # type: ignore[arg-type]
    if not rounds:
        return {}
    shares = summarize([totals.graph_share for totals in rounds])
    return {"graph_decode_share": shares, "totals": [vars(totals) for totals in rounds]}


def compare(results: Mapping[str, Sequence[RunResult]]) -> dict[str, dict[str, Any]]:
    """PageBrain against each other engine: ratios of times, round by round, and the number of requests with equal tokens."""
    ours = results["pagebrain"]
    ratios = {}
    for name, theirs in results.items():
        if name != "pagebrain":
            same = sum(mine == other for mine, other in zip(ours[0].token_ids, theirs[0].token_ids))
            ratio = summarize([other.elapsed_s / mine.elapsed_s for mine, other in zip(ours, theirs)])
            ratios[name] = {"speedup": ratio, "requests_with_equal_tokens": same, "requests": len(ours[0].token_ids)}
    return ratios


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the table, the settings of each engine, and the parts of PageBrain's decode steps."""
    workload, engines, ratios = report["workload"], report["engines"], report["comparison"]
    rate = workload["request_rate"]
    console.print(
        f"{workload['requests']} requests, {workload['input_tokens']:,} prompt, {workload['output_tokens']:,} output tokens "
        f"(input {workload['input_len']}, output {workload['output_len']}, seed {workload['seed']}); "
        f"{'all at once' if rate is None else f'{rate:g} requests/s, Poisson arrivals'}; {workload['model']} "
        f"({workload['load_format']} weights), {workload['dtype']} on {workload['device']}, {report['threads']} threads; "
        f"median of {report['rounds']} interleaved rounds (lowest to highest)",
        highlight=False,
    )
    headings = ["output\ntokens/s", "first token,\nmedian / last", "start to ready,\nwarm-up", "peak\nmemory"]
    table = new_table("engine", *headings, *(["PageBrain\nis faster"] if ratios else []))
    for name, engine in engines.items():
        speed, ttft, start = engine["output_tokens_per_s_stats"], engine["ttft_s"], engine["start"]
        memory = f"{engine['peak_memory_mb']:,.0f} MB"
        if engine["peak_cuda_memory_mb"] is not None:
            memory += f"\nGPU {engine['peak_cuda_memory_mb']:,.0f} MB"
        ratio = ratios[name]["speedup"] if name in ratios else None
        cells = [
            f"{speed['median']:,.1f}\n{speed['min']:,.1f} - {speed['max']:,.1f}",
            f"{_seconds(ttft['median'])}\n{_seconds(ttft['max'])}",
            f"{_seconds(start['ready_s']['median'])}\n{_seconds(start['warmup_s']['median'])}" if start else "",
            memory,
        ]
        if ratios:
            cells.append(f"{ratio['median']:.2f} x\n{ratio['min']:.2f} - {ratio['max']:.2f}" if ratio else "")
        table.add_row(name, *cells)
    console.print(table)
    for name, engine in engines.items():
        settings = ", ".join(f"{key}={value}" for key, value in engine["configuration"].items())
        lines = [f"{name}: {settings}", f"  sampling: {engine['sampling']}; detokenization: {engine['detokenization']}"]
        if name in ratios:
            equal, of = ratios[name]["requests_with_equal_tokens"], ratios[name]["requests"]
            lines.append(f"  same tokens as pagebrain: {equal} of {of} requests")
        if "graph_decode_share" in engine and workload["device"] != "cpu":
            lines.append(f"  decode tokens produced by CUDA graphs: {engine['graph_decode_share']['median']:.1%}")
        say(console, "\n".join(lines))
    if engines["pagebrain"]["closer"] is not None:
        print_closer(engines["pagebrain"]["closer"], console)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
