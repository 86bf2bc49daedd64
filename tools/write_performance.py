"""Writes the tables of measured figures: docs/performance/*.json in, README.md and docs/performance/README.md out.

``python tools/write_performance.py`` after a new measurement; with ``--check`` it changes nothing and fails if a table is
not what the JSON says. ``pagebrain bench offline ... --json FILE``, ``pagebrain bench serve ... --json FILE``,
``python -m chapters ladder --json FILE`` and ``python -m tools.measure_gpu --json FILE`` make those. Where there is no JSON
yet, the page says so.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "performance"
PAGES = (ROOT / "README.md", RESULTS / "README.md")
NOT_YET = "Not measured yet."
NAMES = {
    "pagebrain": "PageBrain",
    "hf-static": "Hugging Face `generate`, static batches",
    "hf-continuous": "Hugging Face continuous batching",
}


def main() -> int:
    """Bring every page up to date, or say which is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.path.insert(0, str(ROOT))  # for tools.gpu_table, when this is run as a script
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    args = parser.parse_args()
    stale = [page for page in PAGES if with_tables(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        if args.check:
            print(f"{page.relative_to(ROOT)} is out of date: run python tools/write_performance.py", file=sys.stderr)
        else:
            page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    return int(args.check and bool(stale))


def with_tables(page: str) -> str:
    """``page`` with the figures between its markers; a page need not have all of them."""
    tables = {
        "speed": speed_table,
        "vllm": vllm_table,
        "speed-on-a-gpu": gpu_table,
        "steps-on-a-gpu": gpu_steps_table,
        "kernels-on-a-gpu": gpu_kernels_table,
        "serving-on-a-gpu": gpu_serving_table,
        "ladder-on-a-gpu": gpu_ladder_table,
        "speed-on-a-cpu": cpu_table,
        "serving": serving_table,
        "packing": packing_table,
        "ladder": ladder_table,
    }
    for name, table in tables.items():
        head, begin, rest = page.partition(f"<!-- {name}: begin -->")
        _, end, tail = rest.partition(f"<!-- {name}: end -->")
        if begin and end:
            page = f"{head}{begin}\n\n{table()}\n\n{end}{tail}"
    return page


def speed_table() -> str:
    """The first rows of :func:`vllm_table`: without a server, and over HTTP."""
    heading, offline, served = vllm_rows()
    return markdown_table(heading, [offline[0], served[0]])


def vllm_table() -> str:
    """PageBrain and vLLM on the same requests."""
    heading, offline, served = vllm_rows()
    return markdown_table(heading, [*offline, *served])


def vllm_rows() -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Heading, rows without a server, and rows over HTTP: tokens per second of both engines, and time to the first token."""
    report = json.loads((RESULTS / "vllm.json").read_text(encoding="utf-8"))
    offline = [[name, *(f"{speed:,}" for speed in speeds)] for name, speeds in report["output_tokens_per_s"].items()]
    served = []
    for name, load in report["served"].items():
        pairs = zip(load["output_tokens_per_s"], load["first_token_ms"], strict=True)
        served.append([f"{name}, over HTTP", *(f"{speed:,}, first token after {wait} ms" for speed, wait in pairs)])
    return [f"output tokens/s, {report['gpu']}, {report['date']}", *report["engines"]], offline, served


def gpu_table() -> str:
    """PageBrain, Hugging Face and vLLM on a GPU."""
    from tools.gpu_table import notes, table_rows

    file = RESULTS / "gpu.json"
    if not file.exists():
        return NOT_YET
    report = json.loads(file.read_text(encoding="utf-8"))
    heading, *rows = table_rows(report)
    rows = [[f"**{cell}**" if cell and row[0] == "PageBrain" else cell for cell in row] for row in rows]
    return markdown_table(heading, rows, " ".join(notes(report)))


def gpu_kernels_table() -> str:
    """The attention kernels on a GPU."""
    file = RESULTS / "kernels.json"
    if not file.exists():
        return NOT_YET
    report = json.loads(file.read_text(encoding="utf-8"))
    shape, found = report["shape"], report["versions"]
    rows = []
    for row in report["decode"]:
        speed, time = row["kv_bytes_per_s"] / 1e12, row["seconds"] * 1e6
        cells = [f"{row['num_seqs']}", f"{row['context_len']}", f"{time:.1f} us", f"{speed:.2f} TB/s"]
        rows.append([*cells, f"{row['share_of_copy']:.0%}"])
    copy = f"{report['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    note = (
        f"Decode attention of one layer, {shape['num_heads']} heads of {shape['head_dim']} in {shape['dtype']}, blocks of "
        f"{shape['block_size']}; medians of {report['replays']} replays. A copy moved {copy} in the same run. "
        f"{found['gpu']}, torch {found['torch']}, Triton {found['triton']}, {report['date'][:10]}."
    )
    return markdown_table(["sequences", "context", "time", "K and V read at", "of a copy"], rows, note)


def gpu_steps_table() -> str:
    """Where the time of PageBrain's decode steps goes on a GPU, and the share of the memory roof."""
    from tools.gpu_table import step_rows

    file = RESULTS / "gpu.json"
    rows = step_rows(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []
    if not rows:
        return NOT_YET
    heading, *others = rows
    return markdown_table(heading, others)


def gpu_serving_table() -> str:
    """What clients of the server saw on a GPU: medians of the runs of each load, next to what vLLM's saw."""
    from tools.gpu_table import VLLM

    file = RESULTS / "serve-gpu.json"
    if not file.exists():
        return NOT_YET
    report = json.loads(file.read_text(encoding="utf-8"))
    settings, found = report["settings"], report["versions"]
    heading = ["clients", "server", "output tokens/s", "first token, ms", "between two events, ms", "per output token, ms"]
    rows = []
    loads = list(dict.fromkeys(run["load"] for run in report["runs"]))
    for load in loads:
        metrics = [run["metrics"] for run in report["runs"] if run["load"] == load]
        speed = [one["output_tokens_per_s"] for one in metrics]
        cells = [f"{statistics.median(speed):,.0f} ({min(speed):,.0f} to {max(speed):,.0f})"]
        for name in ("ttft_ms", "itl_ms", "tpot_ms"):
            medians = [one[name]["median"] for one in metrics]
            cells.append(f"{statistics.median(medians):.3g} ({min(medians):.3g} to {max(medians):.3g})")
        theirs = [f"{figure:,}" for figure in VLLM["server"].get(load, ())]
        if theirs:
            rows.append([load.split()[0], f"{VLLM['name']} [1]", *theirs, ""])
        rows.append([f"**{cell}**" for cell in (load.split()[0], "PageBrain", *cells)])
    share = max(run["metrics"]["tokens_per_event"] for run in report["runs"])
    note = (
        f"[1] {VLLM['note']}. {settings['requests']:,} requests in each run, streamed, prompts of {settings['input_len']} "
        f"tokens and outputs of {settings['output_len']}, greedy, end of sequence ignored, with GPT-2's tokenizer. A client "
        f"sends its next request when its last has ended. Under the largest load an event brings up to {share:.1f} tokens "
        f"on average. Times are medians over all requests or events of a run; of {len(report['runs']) // len(loads)} runs "
        f"the median, lowest to highest in brackets. Server and {settings['processes']} client processes share "
        f"{found['cores']} cores. {found['gpu']}, torch {found['torch']}, Triton {found['triton']}, {report['date'][:10]}."
    )
    return markdown_table(heading, rows, note)


def gpu_ladder_table() -> str:
    """The staircase on a GPU, with its picture."""
    if not (RESULTS / "ladder-gpu.json").exists():
        return NOT_YET
    report = json.loads((RESULTS / "ladder-gpu.json").read_text(encoding="utf-8"))
    picture = ""
    if (ROOT / "docs" / "figures" / "ladder-gpu.png").exists():
        alt = "Three panels, a row for each stage: tokens per second, milliseconds from token to token, the KV cache."
        picture = f"![{alt} The numbers stand in the table below.](../figures/ladder-gpu.png)\n\n"
    return f"{picture}{ladder_rows(report)}\n\nThe command:\n\n```\n{report['command']}\n```"


def markdown_table(heading: list[str], rows: list[list[str]], note: str = "") -> str:
    """A table, and a note below it."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows)]
    return "\n".join([*lines, "", note] if note else lines)


def serving_table() -> str:
    """The server under load against the same requests offline, and what its clients saw."""
    report = json.loads((RESULTS / "serve-cpu-gpt2-float32.json").read_text(encoding="utf-8"))
    comparison, settings, versions = report["comparison"], report["settings"], report["versions"]
    lines = ["| GPT-2 124M, random weights, float32 | output tokens/s |", "|---|---|"]
    for name, side in (("16 clients, streamed over HTTP", "served"), ("`LLM.generate`, the same requests", "offline")):
        stats = comparison[f"{side}_tokens_per_s"]
        lines.append(f"| {name} | {stats['median']:.0f} ({stats['min']:.0f} to {stats['max']:.0f}) |")
    ratio = comparison["ratio"]
    lines.append(f"| served / offline | {ratio['median']:.1%} ({ratio['min']:.1%} to {ratio['max']:.1%}) |")
    lines += ["", "| what the clients saw, ms | median | p95 | p99 |", "|---|---|---|---|"]
    names = {"ttft_ms": "time to first token", "itl_ms": "between two events", "tpot_ms": "per output token"}
    for key, name in names.items():
        runs = [run["metrics"][key] for run in report["runs"]]
        cells = [f"{statistics.median(run[percentile] for run in runs):.0f}" for percentile in ("median", "p95", "p99")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{settings['requests']} requests in each of {settings['rounds']} rounds, prompts of {settings['input_len']} tokens "
        f"and answers of {settings['output_len']}, greedy, end of sequence ignored. Offline all requests are there from the "
        f"start and at most 16 run, as with the server. {settings['threads']} threads for each engine on "
        f"{versions['cores']} cores, which the server shares with HTTP and with the clients. {versions['processor']}, torch "
        f"{versions['torch']}, {report['date'][:10]}. Medians of the rounds.",
    ]
    return "\n".join(lines)


def packing_table() -> str:
    """Times of one step's matrix products, weights as saved and reordered."""
    report = json.loads((RESULTS / "packing-float32.json").read_text(encoding="utf-8"))
    lines = ["| rows | as saved | reordered |", "|---|---|---|"]
    lines += [f"| {r['rows']} | {r['as_saved_ms']:.0f} ms | {r['reordered_ms']:.0f} ms |" for r in report["results"]]
    versions = report["versions"]
    lines += ["", f"{report['dtype']}, {report['threads']} threads on {versions['processor']}, torch {versions['torch']}."]
    return "\n".join(lines)


def ladder_table() -> str:
    """The staircase: every chapter and the engine on the same work."""
    return ladder_rows(json.loads((RESULTS / "ladder.json").read_text(encoding="utf-8")))


def ladder_rows(report: dict[str, Any]) -> str:
    """The table of a ladder, and what it was measured on."""
    lines = ["| stage | tokens/s | ms from token to token | KV cache at its fullest |", "|---|---|---|---|"]
    for stage in report["stages"]:
        memory = f"{stage['kv_bytes'] / 1e6:.1f} MB" if stage["kv_bytes"] else "none"
        lines.append(f"| {stage['stage']} | {stage['tokens_per_s']:,.0f} | {stage['ms_per_token']:.1f} | {memory} |")
    lens, versions = report["prompt_lens"], report["versions"]
    work = (
        f"{len(lens)} prompts of {min(lens)} to {max(lens)} tokens at once, up to {report['max_new_tokens']} new ones each"
    )
    machine = f"{report['threads']} thread{'s' * (report['threads'] > 1)} on {versions['processor']}"
    machine = f"{versions.get('gpu', machine)}, torch {versions['torch']}"
    model = "the bundled model" if report["model"] == "bundled" else report["model"]
    model += " with random weights" if report.get("load_format") == "dummy" else ""
    lines += [
        "",
        f"{work}, {model}, {report['dtype']}, greedy. {machine}, {report['date']}.",
    ]
    return "\n".join(lines)


def cpu_table() -> str:
    """Tokens per second on a CPU as a Markdown table, a block of rows for each dtype that was measured."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("cpu-*.json"))]
    reports.sort(key=lambda report: -len(report["engines"]))
    first = reports[0]
    work, versions = first["workload"], first["versions"]
    lines = [
        "| GPT-2 124M, random weights | dtype | output tokens/s | PageBrain is | first token, median | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        lines += [row(report, engine) for engine in NAMES if engine in report["engines"]]
    lines += [
        "",
        f"{work['requests']} requests at once, prompts of {work['input_len']} tokens and answers of {work['output_len']}, "
        f"uniform: {work['input_tokens']:,} tokens in, {work['output_tokens']:,} out. Greedy, end of sequence ignored, "
        f"token ids in and out, {first['threads']} threads on {versions['processor']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}. Medians of {first['rounds']} interleaved rounds, of the "
        "ratios too; each engine in a process of its own.",
    ]
    return "\n".join(lines)


def row(report: dict[str, Any], engine: str) -> str:
    """One engine's line."""
    result = report["engines"][engine]
    stats = result["output_tokens_per_s_stats"]
    speed = f"{result['output_tokens_per_s']:.0f} ({stats['min']:.0f} to {stats['max']:.0f})"
    compared = report["comparison"].get(engine)
    ratio = "" if compared is None else f"{compared['speedup']['median']:.2f} times as fast"
    memory = f"{result['peak_memory_mb']:,.0f} MB"
    first_token = f"{result['ttft_s']['median']:.2f} s"
    return f"| {NAMES[engine]} | {report['workload']['dtype']} | {speed} | {ratio} | {first_token} | {memory} |"


if __name__ == "__main__":
    sys.exit(main())
