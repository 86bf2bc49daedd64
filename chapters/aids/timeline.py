"""What the CPU and the GPU do during a decode step: recorded on a GPU from chapter 07's engine, drawn from the record.

``python -m tools.record_timeline --json FILE`` writes what :func:`record` returns. The same steps are taken in three ways:
launched one kernel at a time and waited for; as one CUDA graph, and waited for; as one CUDA graph, and launched ahead.
"""

import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from transformers import GPT2Config, GPT2LMHeadModel

from chapters.ch07_full_speed import Engine, InFlight
from pagebrain import PageBrainConfig
from pagebrain.bench.machine_facts import versions
from pagebrain.engine.sequence import SequenceGroup
from pagebrain.viz.picture import Picture
from pagebrain.viz.style import BLUE, GREEN, INK, ORANGE, PALE, SKY, VERMILLION, legend_below, new_figure, styled

WAYS = {
    "eager": "many launches, and waiting for each step",
    "graph": "one graph, and waiting for each step",
    "ahead": "one graph, launched ahead",
}
PARTS = {"schedule": SKY, "prepare": ORANGE, "launch": VERMILLION, "wait": PALE, "output": GREEN}
"""Parts of a step on the CPU, in order: decide; bring the batch rows up to date; launch; wait for tokens; hand them out."""

PROMPT_LEN, MAX_LEN, WARM_STEPS, TIMED_STEPS, PROFILED_STEPS = 128, 256, 20, 60, 24
NUM_ROUNDS, NUM_MARKERS = 3, 8
GAP_S = 1e-6
"""Shorter pauses of the GPU are drawn and counted as work: they are the time between two kernels of a graph."""

_LAUNCHES = ("launch", "memcpyasync", "memsetasync")

Part = tuple[str, float, float]
"""A name of ``PARTS``, start and end in seconds."""


class Watched(Engine):
    """An engine that notes when each part of a step began and ended, a list of parts for each step in ``parts``."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.parts: list[list[Part]] = []
        self._marks: dict[str, float] = {}
        for bucket, replay in self.executor.steps.items():
            self.executor.steps[bucket] = self._marked("replay", replay)

    def _marked(self, name: str, function: Any) -> Any:
        def marked() -> Any:
            self._marks[name] = time.perf_counter()
            result = function()
            self._marks[f"{name} end"] = time.perf_counter()
            return result

        return marked

    def step(self) -> SequenceGroup | None:
        """One step, as the engine does it."""
        marks = self._marks = {"start": time.perf_counter()}
        group = super().step()
        now = time.perf_counter()
        parts: list[Part] = []
        if "replay" in marks:
            parts.append(("schedule", marks["start"], marks["launch"]))
            parts.append(("prepare", marks["launch"], marks["replay"]))
            parts.append(("launch", marks["replay"], marks["launched"]))
        if "wait" in marks:
            parts.append(("wait", marks["wait"], marks["wait end"]))
            parts.append(("output", marks["wait end"], now))
        self.parts.append(parts)
        return group

    def launch(self, group: SequenceGroup) -> None:
        """As the engine."""
        self._marks["launch"] = time.perf_counter()
        super().launch(group)
        self._marks["launched"] = time.perf_counter()

    def read(self, step: InFlight) -> SequenceGroup:
        """As the engine."""
        step.tokens.wait = self._marked("wait", step.tokens.wait)  # type: ignore[method-assign]
        return super().read(step)


def record(batch_sizes: Sequence[int] = (1, 32), command: str = "") -> dict[str, Any]:
    """Record decode steps of GPT-2 124M with random weights in bfloat16 on the GPU, for each batch size and in each way.

    Raises ``RuntimeError`` if there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA GPU here to record on")
    with _profile():  # the profiler's own first time, before anything is captured
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    torch.manual_seed(0)
    settings: Any = {"attn_implementation": "eager", "eos_token_id": None}
    model: Any = GPT2LMHeadModel(GPT2Config(**settings))
    model.to(device="cuda", dtype=torch.bfloat16).eval()
    # The host's speed varies from second to second: every way runs three times in turns, and the median run is kept.
    turns = [_record_run(model, size, way) for _ in range(NUM_ROUNDS) for size in batch_sizes for way in WAYS]
    runs: list[dict[str, Any]] = []
    for batch_size in batch_sizes:
        span = None
        answers = [answer for run, answer in turns if run["batch"] == batch_size]
        for way in WAYS:
            rounds = [run for run, _ in turns if (run["batch"], run["way"]) == (batch_size, way)]
            medians = [run["step_ms"]["median"] for run in rounds]
            run = sorted(rounds, key=lambda run: run["step_ms"]["median"])[NUM_ROUNDS // 2]
            steps, gpu = run.pop("recorded")
            window = _window(steps, gpu, span)
            span = window["span_us"] if span is None else span
            same = all(answer == answers[0] for answer in answers)
            runs.append({**run, "medians_of_rounds_ms": medians, "same_tokens": same, "timeline": window})
            print(summary(runs[-1]), flush=True)
    return {
        "benchmark": "timeline",
        "date": datetime.date.today().isoformat(),
        "command": command,
        "model": "GPT-2 124M, random weights",
        "dtype": "bfloat16",
        "prompt_len": PROMPT_LEN,
        "max_len": MAX_LEN,
        "timed_steps": TIMED_STEPS,
        "rounds": NUM_ROUNDS,
        "versions": versions("cuda"),
        "runs": runs,
    }


def _record_run(model: GPT2LMHeadModel, batch_size: int, way: str) -> tuple[dict[str, Any], list[list[int]]]:
    """One way with one batch size: times of undisturbed steps first, then a few under the profiler; and the answers."""
    settings = PageBrainConfig.for_model(
        model,
        num_blocks=batch_size * MAX_LEN // 16,
        max_num_seqs=batch_size,
        max_num_batched_tokens=batch_size * PROMPT_LEN,
        max_model_len=MAX_LEN,
        async_scheduling=way == "ahead",
    )
    engine = Watched(model, settings, keep_history=False, use_graphs=way != "eager")
    prompts = [[(7 * index + 3 * place) % 50000 for place in range(PROMPT_LEN)] for index in range(batch_size)]
    sequences = [engine.add_request(prompt, MAX_LEN - PROMPT_LEN) for prompt in prompts]
    for _ in range(WARM_STEPS):
        engine.step()
    torch.cuda.synchronize()
    times = [time.perf_counter()]
    for _ in range(TIMED_STEPS):
        engine.step()
        times.append(time.perf_counter())
    timed = engine.parts[-TIMED_STEPS:]
    profiled, gpu, counts = _profiled_steps(engine)
    while engine.step() is not None:
        pass
    run = {
        "batch": batch_size,
        "way": way,
        "step_ms": _spread([1e3 * (after - before) for before, after in zip(times, times[1:])]),
        "profiled_step_ms": _spread([1e3 * (step[-1][2] - step[0][1]) for step in profiled]),
        "host_ms": {name: round(statistics.median(_lengths_ms(timed, name)), 4) for name in PARTS},
        "clock_error_us": round(counts["clock_error_us"], 1),
        "launches_per_step": counts["launches"] / PROFILED_STEPS,
        "kernels_per_step": counts["kernels"] / PROFILED_STEPS,
        "gpu_busy_ms": round(1e3 * sum(end - start for start, end in gpu) / PROFILED_STEPS, 4),
        "recorded": (profiled, gpu),
    }
    return run, [seq.output_token_ids for seq in sequences]


def _profile() -> Any:
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CUDA])


def _profiled_steps(engine: Watched) -> tuple[list[list[Part]], list[tuple[float, float]], dict[str, float]]:
    """A few steps under the profiler: their parts; when the GPU was busy, on the same clock; kernels and launches.

    The profiler has a clock of its own. Markers, launched between two times that are noted, tell the difference of the two.
    """
    marker = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    first = len(engine.parts)
    with _profile() as profiler:
        noted = [(time.perf_counter(), marker.add_(1), time.perf_counter()) for _ in range(NUM_MARKERS)]
        torch.cuda.synchronize()
        for _ in range(PROFILED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return engine.parts[first:], *read_events(events, [(before, after) for before, _, after in noted])


def read_events(
    events: Iterable[Mapping[str, Any]], noted: Sequence[tuple[float, float]]
) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """When the GPU was busy, and the number of kernels and of launches, from a Chrome trace that begins with markers.

    Each marker was launched between two times of the host's clock, in seconds, which ``noted`` has; markers do not count.
    ``clock_error_us`` says how well the two clocks are known to agree.
    """
    on_gpu, launches = [], []
    for event in events:
        kind, name = str(event.get("cat", "")).lower(), str(event.get("name", "")).lower()
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            on_gpu.append((float(event["ts"]) * 1e-6, float(event["dur"]) * 1e-6, kind))
        elif kind in ("cuda_runtime", "cuda_driver") and any(word in name for word in _LAUNCHES):
            launches.append((float(event["ts"]) * 1e-6, float(event.get("dur", 0)) * 1e-6))
    on_gpu.sort()
    launches.sort()
    count = len(noted)
    if len(on_gpu) <= count or len(launches) <= count:
        raise RuntimeError(f"the profiler saw {len(on_gpu)} kernels and {len(launches)} launches: is CUPTI installed?")
    marked = list(zip(noted, launches))
    earliest = max(before - start for (before, _), (start, _) in marked)
    latest = min(after - start - length for (_, after), (start, length) in marked)
    offset = (earliest + latest) / 2
    busy: list[tuple[float, float]] = []
    for start, length, _ in on_gpu[count:]:
        start, end = start + offset, start + length + offset
        if busy and start - busy[-1][1] < GAP_S:
            busy[-1] = busy[-1][0], max(busy[-1][1], end)
        else:
            busy.append((start, end))
    kernels = sum(kind == "kernel" for _, _, kind in on_gpu[count:])
    return busy, {"kernels": kernels, "launches": len(launches) - count, "clock_error_us": abs(latest - earliest) / 2e-6}


def _window(steps: list[list[Part]], gpu: list[tuple[float, float]], span_us: float | None) -> dict[str, Any]:
    """What is drawn: from the third step on, three steps or ``span_us``, in microseconds since its beginning."""
    begin = steps[2][0][1]
    end = steps[4][-1][2] if span_us is None else begin + span_us * 1e-6

    def cut(start: float, stop: float) -> list[float]:
        return [round(1e6 * (max(start, begin) - begin), 1), round(1e6 * (min(stop, end) - begin), 1)]

    parts = [[name, *cut(start, stop)] for step in steps[2:] for name, start, stop in step if start < end]
    return {
        "span_us": round(1e6 * (end - begin), 1),
        "step_starts_us": [cut(step[0][1], end)[0] for step in steps[2:] if step[0][1] < end],
        "host": parts,
        "gpu": [cut(start, stop) for start, stop in gpu if stop > begin and start < end],
    }


def _lengths_ms(steps: list[list[Part]], name: str) -> list[float]:
    return [1e3 * sum(end - start for part, start, end in step if part == name) for step in steps]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(pick(values), 4) for name, pick in (("median", statistics.median), ("min", min), ("max", max))}


def summary(run: Mapping[str, Any]) -> str:
    """A run in one line."""
    host = ", ".join(f"{name} {run['host_ms'][name]:.3f}" for name in PARTS)
    return (
        f"batch {run['batch']:3d}, {run['way']:5s}: {run['step_ms']['median']:.3f} ms a step ({host}), "
        f"{run['launches_per_step']:.1f} launches, {run['kernels_per_step']:.1f} kernels, "
        f"GPU busy {run['gpu_busy_ms']:.3f} ms, under the profiler {run['profiled_step_ms']['median']:.3f} ms a step, "
        f"clocks known to {run['clock_error_us']:.0f} us, medians of rounds {run['medians_of_rounds_ms']}"
        f"{'' if run['same_tokens'] else ', TOKENS DIFFER'}"
    )


def to_json(report: Mapping[str, Any]) -> str:
    """The report as JSON with a line for each run."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in report.items() if key != "runs"]
    runs = ",\n".join(f"  {json.dumps(run, separators=(',', ':'))}" for run in report["runs"])
    return "\n".join(["{", *lines, ' "runs": [', runs, " ]", "}"]) + "\n"


@styled
def draw(report: Mapping[str, Any], batch_size: int, ways: Sequence[str] = tuple(WAYS)) -> Picture:
    """Timelines of the CPU and the GPU in these ways, one below the other, over the same length of time."""
    runs = [run for run in report["runs"] if run["batch"] == batch_size and run["way"] in ways]
    figure = new_figure(1.1 + 1.25 * len(runs))
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for axes, run in zip(panels, runs):
        _draw_run(axes, run)
    panels[-1].set_xlim(0, min(run["timeline"]["host"][-1][2] for run in runs) / 1e3)  # as far as all were recorded
    panels[-1].set_xlabel("ms")
    handles: list[Any] = [
        Patch(facecolor=colour, edgecolor=INK, linewidth=0.4, label=name) for name, colour in PARTS.items()
    ]
    legend_below(figure, [*handles, Patch(facecolor=BLUE, label="GPU computes")])
    said = [
        f"{WAYS[run['way']]}: {run['step_ms']['median']:.2f} ms a step, {run['launches_per_step']:.0f} launches, "
        f"the GPU busy for {run['gpu_busy_ms']:.2f} ms of it"
        for run in runs
    ]
    return Picture(figure, f"Timeline of decode steps of {batch_size} sequences. {'; '.join(said)}.")


def _draw_run(axes: Axes, run: Mapping[str, Any]) -> None:
    shown = run["timeline"]
    for name, colour in PARTS.items():
        bars = [(start / 1e3, (end - start) / 1e3) for part, start, end in shown["host"] if part == name]
        axes.broken_barh(bars, (1.1, 0.8), facecolors=colour, edgecolors=INK, linewidth=0.3)
    axes.broken_barh([(start / 1e3, (end - start) / 1e3) for start, end in shown["gpu"]], (0.1, 0.8), facecolors=BLUE)
    for start in shown["step_starts_us"]:
        axes.axvline(start / 1e3, color=INK, linewidth=0.6, linestyle=":")
    axes.set_yticks([0.5, 1.5], ["GPU", "CPU"])
    axes.set_ylim(0, 2)
    axes.set_title(f"{WAYS[run['way']]}: {run['step_ms']['median']:.2f} ms a step")
