"""The cases that are measured on a GPU, what others reached on them, and the tables that show both.

:mod:`tools.measure_gpu` measures and prints them, tools/write_performance.py writes them into docs/performance.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from pagebrain.bench.decode_steps import print_closer
from pagebrain.bench.workload import GREEDY, Sampling


class Workload(NamedTuple):
    """How many requests, and the least and most tokens of their prompts and outputs."""

    requests: int
    input_len: tuple[int, int]
    output_len: tuple[int, int]


WORKLOADS = {
    "W256": Workload(256, (100, 512), (100, 512)),
    "1 request": Workload(1, (256, 256), (256, 256)),
    "64 requests": Workload(64, (384, 384), (256, 256)),
    "256 requests": Workload(256, (384, 384), (256, 256)),
}

HF_WORKLOAD = "W256"
"""What Hugging Face is measured on; one run of it takes most of a minute there."""

SAMPLINGS = {
    "greedy": GREEDY,
    "temperature 0.6": Sampling(temperature=0.6),
    "temperature 0.8, top-p 0.95": Sampling(temperature=0.8, top_p=0.95),
}

PART_NAMES = {"starts": "Starts", "pagebrain": "PageBrain", "hf": "Hugging Face"}

RATE = 100.0
"""Requests a second where requests arrive one by one: about a third of what the engine should be able to serve."""

CASES: list[tuple[str, str, float | None]] = [
    (HF_WORKLOAD, "temperature 0.8, top-p 0.95", None),
    *((workload, sampling, None) for workload in WORKLOADS for sampling in ("greedy", "temperature 0.6")),
    (HF_WORKLOAD, "greedy", RATE),
]
"""Workload, sampling and request rate of what PageBrain runs, in that order: the first meets the engine cold."""

SHOWN_STEPS = (
    "1 request, greedy",
    "64 requests, greedy",
    "256 requests, greedy",
    "256 requests, temperature 0.6",
    "W256, greedy",
)
"""Cases of which the parts of a step are written down."""

VLLM: dict[str, Any] = {
    "name": "vLLM 0.26.0",
    "note": "compiled, CUDA graphs, FlashAttention 3; measured 2026-11-22 on one H200, not in this run",
    "temperature 0.6": {"W256": 34492, "1 request": 585, "64 requests": 21113, "256 requests": 30878},
    "temperature 0.8, top-p 0.95": {"W256": 34006, "first run": 7086},
    "ready_s": 60,
    "server": {"256 clients": (24216, 426, 11.9), "16 clients": (6935, 15, 1.85)},
}
"""Figures that were recorded at another time, on a workload of the same lengths (77,213 prompt and 75,759 output tokens).

Of its server: output tokens/s, and the medians of time to first token and between two events, in milliseconds.
"""

HF_NAMES = {"hf-static": "Hugging Face `generate`, static batches", "hf-continuous": "Hugging Face continuous batching"}


def case_name(workload: str, sampling: str, request_rate: float | None = None) -> str:
    """What a case is called in the report."""
    return f"{workload}, {sampling}" + ("" if request_rate is None else f", {request_rate:g} requests/s")


def table_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The table, its heading first: one row for each engine and way of sampling, one column for each workload."""
    rows = [["output tokens/s", "sampling", *WORKLOADS, "start to ready"]]
    parts = report["parts"]
    for engine, found in parts.get("hf", {}).get("engines", {}).items():
        cells = [cell(found) if workload == HF_WORKLOAD else "" for workload in WORKLOADS]
        rows.append([HF_NAMES[engine], "greedy", *cells, ""])
    cases = parts.get("pagebrain", {}).get("cases", {})
    for sampling in SAMPLINGS:
        if sampling in VLLM:
            figures = VLLM[sampling]
            cells = [f"{figures[workload]:,}" if workload in figures else "" for workload in WORKLOADS]
            ready = f"{VLLM['ready_s']} s" if sampling == "temperature 0.6" else ""
            rows.append([f"{VLLM['name']} [1]", sampling, *cells, ready])
        cells = [cell(cases.get(case_name(workload, sampling))) for workload in WORKLOADS]
        if any(cells):
            rows.append(["PageBrain", sampling, *cells, ready_cell(parts.get("starts", {})) if sampling == "greedy" else ""])
    return rows


def cell(found: Mapping[str, Any] | None) -> str:
    """Median, and lowest to highest if there are several runs."""
    if found is None:
        return ""
    if "output_tokens_per_s" not in found:
        return "failed"
    stats = found["output_tokens_per_s"]
    if len(stats["rounds"]) == 1:
        return f"{stats['median']:,.0f}"
    return f"{stats['median']:,.0f} ({stats['min']:,.0f} to {stats['max']:,.0f})"


def ready_cell(part: Mapping[str, Any]) -> str:
    """The median of the starts that found compiled kernels on the disk."""
    warm = [start["ready_s"] for start in part.get("starts", []) if start["compiled_before"] and "ready_s" in start]
    return f"{statistics.median(warm):.1f} s ({min(warm):.1f} to {max(warm):.1f})" if warm else ""


def notes(report: Mapping[str, Any]) -> list[str]:
    """What the table does not say: the workload in tokens, starts, first runs, graphs, whether runs repeat, the machine."""
    parts = report["parts"]
    cases = parts.get("pagebrain", {}).get("cases", {})
    lines = [f"[1] {VLLM['note']}."]
    lines += [_workload_line(case) for case in cases.values() if case["workload"] == HF_WORKLOAD][:1]
    lines += _start_lines(parts.get("starts", {}).get("starts", []))
    lines += [_first_run_line(name, case) for name, case in cases.items() if "first_run" in case]
    at_once = [case for case in cases.values() if case["request_rate"] is None and "graph_decode_share" in case]
    if at_once:
        share = min(case["graph_decode_share"]["median"] for case in at_once)
        how_many = "all" if share == 1 else f"at least {share:.1%}"
        lines.append(f"CUDA graphs produced {how_many} of the decode tokens in every case of the table.")
    lines += [_arrivals_line(case) for case in cases.values() if case["request_rate"] and "graph_decode_share" in case]
    differing = [name for name, case in cases.items() if case in at_once and not case["same_tokens_in_all_runs"]]
    if differing:
        lines.append(f"Runs that did not give the same tokens each time: {'; '.join(differing)}.")
    elif at_once:
        lines.append("All runs of a case of the table gave the same tokens.")
    lines += [f"Failed: {name}: {case['failed']}." for name, case in cases.items() if "failed" in case]
    return lines + machine_lines(report)


def _workload_line(case: Mapping[str, Any]) -> str:
    return (
        f"W256: {case['requests']} requests at once, prompts of {case['input_len']} tokens and outputs of "
        f"{case['output_len']}, uniform: {case['input_tokens']:,} tokens in, {case['output_tokens']:,} out. 1 request: 256 "
        "tokens in, 256 out; 64 and 256 requests: 384 in, 256 out. End of sequence ignored, token ids in and out."
    )


def _start_lines(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for is_warm in (True, False):
        some = [start for start in starts if start["compiled_before"] is is_warm and "first_request_s" in start]
        if some:
            ready, imported, first = (
                statistics.median(start[name] for start in some) for name in ("ready_s", "imported_s", "first_request_s")
            )
            what = "Start to ready" if is_warm else "The first start, which compiles the kernels and keeps them on the disk"
            lines.append(
                f"{what}: {ready:.1f} s from the start of the process, {imported:.1f} s of it importing; its first request "
                f"(256 tokens) then took {first:.2f} s."
            )
    return lines


def _first_run_line(name: str, case: Mapping[str, Any]) -> str:
    figures = VLLM.get(case["sampling"], {})
    beside = f" ({VLLM['name']} [1]: {figures['first run']:,})" if "first run" in figures else ""
    return f"The very first run of an engine, {name}: {case['first_run']['output_tokens_per_s']:,.0f} tokens/s{beside}."


def _arrivals_line(case: Mapping[str, Any]) -> str:
    return (
        f"With Poisson arrivals, {case['request_rate']:g} of the {case['requests']} requests of W256 a second: CUDA graphs "
        f"produced {case['graph_decode_share']['median']:.1%} of the decode tokens, and the first token came "
        f"{case['first_token_s']['median'] * 1000:.1f} ms after a request (median)."
    )


def machine_lines(report: Mapping[str, Any]) -> list[str]:
    """Where and with what each part was measured; one line if all parts agree."""
    lines: dict[str, list[str]] = {}
    for name, part in report["parts"].items():
        versions = part["versions"]
        line = f"{versions.get('gpu', versions['processor'])}, {part['threads']} threads, torch {versions['torch']}, "
        line += f"Triton {versions.get('triton', 'none')}, transformers {versions['transformers']}, {part['date'][:10]}"
        lines.setdefault(line, []).append(PART_NAMES[name])
    how = "Medians, lowest to highest in brackets."
    if len(lines) == 1:
        return [f"{next(iter(lines))}. {how}"]
    return [f"{' and '.join(names)}: {line}." for line, names in lines.items()] + [how]


def step_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Where the milliseconds of a decode step go, one column for each case of ``SHOWN_STEPS``; empty if none was seen."""
    cases = report["parts"].get("pagebrain", {}).get("cases", {})
    closers = {name: cases.get(name, {}).get("closer", {}) for name in SHOWN_STEPS}
    windows = {name: closer["window"] for name, closer in closers.items() if closer.get("window")}
    if not windows:
        return []
    rows = [["a decode step, ms", *windows]]
    rows.append(["in all", *(f"**{window['seconds'] * 1000:.3f}**" for window in windows.values())])
    for where, label in (("host", "host"), ("gpu", "GPU")):
        parts = dict.fromkeys(part for window in windows.values() for part in window[where] or {})
        for part in parts:
            values = [(window[where] or {}).get(part) for window in windows.values()]
            rows.append([f"{label}: {part}", *("" if value is None else f"{value * 1000:.3f}" for value in values)])
    roofs = [closers[name]["decode"] for name in windows]
    rows.append(
        [
            "share of the memory roof, all decode steps",
            *(f"{roof['share']:.0%}" if "share" in roof else "" for roof in roofs),
        ]
    )
    return rows


def print_tables(report: Mapping[str, Any], console: Console) -> None:
    """The table, the notes, and for each case where the time of its decode steps went."""
    from rich.table import Table

    heading, *rows = table_rows(report)
    table = Table(header_style="bold")
    for number, name in enumerate(heading):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in notes(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for name, case in report["parts"].get("pagebrain", {}).get("cases", {}).items():
        if "closer" in case:
            console.print(f"\n{name}", highlight=False, markup=False, style="bold")
            print_closer(case["closer"], console)
