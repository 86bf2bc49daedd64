"""Measures decode steps after a timed run: their share of the memory roof, and the parts of their time.

A decode step reads every weight once, and the K and V of every sequence in it; activations are small beside these. No step
can be faster than a copy of as many bytes. The time of that copy divided by the time of the step is its share of the roof.

The same requests run again with a clock at every step, and on a GPU once more while the profiler records some of the steps.
The host's parts are the engine's own totals. The rest of a step's time has a row of its own, so that every table adds up.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pagebrain.bench.command import new_table, say
from pagebrain.bench.engine_loop import LoopRun, StepRecord, run_loop
from pagebrain.bench.gpu_times import GpuTimes, Recorder
from pagebrain.bench.workload import BenchRequest
from pagebrain.config import PageBrainConfig
from pagebrain.engine.engine import Engine
from pagebrain.engine.trace import StepTotals
from pagebrain.models.loading import read_config
from pagebrain.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import GPT2Config

_GPU_COPY_BYTES, _CPU_COPY_BYTES = 2**30, 2**27
"""Several times the size of any cache."""

_COPIES = 11


@dataclass(frozen=True)
class ModelBytes:
    """Bytes that a decode step reads: ``weights`` once, ``kv_token`` for each token of context of each sequence."""

    weights: int
    kv_token: int

    @classmethod
    def of(cls, hf_config: "GPT2Config", itemsize: int) -> "ModelBytes":
        """For a model with numbers of ``itemsize`` bytes and Hugging Face's config. A tied head counts once."""
        import torch
        from transformers import GPT2LMHeadModel

        with torch.device("meta"):  # shapes only
            num_weights = sum(parameter.numel() for parameter in GPT2LMHeadModel(hf_config).parameters())
        return cls(num_weights * itemsize, 2 * hf_config.n_layer * hf_config.n_embd * itemsize)

    def of_steps(self, num_steps: int, context_tokens: int) -> int:
        """Bytes that ``num_steps`` decode steps read if their rows attended to ``context_tokens`` tokens in all."""
        return num_steps * self.weights + context_tokens * self.kv_token


def decode_roof(steps: Sequence[StepRecord], model: ModelBytes, copy_bytes_per_s: float | None) -> dict[str, Any] | None:
    """The bytes that steps without prefill moved, and their share of the roof; ``None`` if there was no such step.

    ``share`` is missing if the speed of a copy was not measured.
    """
    decodes = [step for step in steps if step.only_decodes]
    if not decodes:
        return None
    seconds = sum(step.seconds for step in decodes)
    context_tokens = sum(step.context_tokens for step in decodes)
    moved = model.of_steps(len(decodes), context_tokens)
    report: dict[str, Any] = {
        "num_steps": len(decodes),
        "num_seqs_mean": sum(step.num_decodes for step in decodes) / len(decodes),
        "context_tokens_mean": context_tokens / sum(step.num_decodes for step in decodes),
        "seconds": seconds,
        "bytes": moved,
        "weight_bytes": model.weights,
        "kv_bytes_per_token": model.kv_token,
        "bytes_per_s": moved / seconds,
        "copy_bytes_per_s": copy_bytes_per_s,
    }
    if copy_bytes_per_s is not None:
        report["share"] = moved / seconds / copy_bytes_per_s
    return report


def measure_copy(device: str) -> float | None:
    """Bytes read plus bytes written per second by a copy in ``device``'s memory; ``None`` if there is not enough memory."""
    import torch

    size = _GPU_COPY_BYTES if device.startswith("cuda") else _CPU_COPY_BYTES
    try:
        source = torch.ones(size // 4, dtype=torch.int32, device=device)
        target = torch.zeros_like(source)
    except RuntimeError:  # out of memory: the engine's blocks may take nearly all
        return None
    clock = gpu_seconds if device.startswith("cuda") else cpu_seconds
    return 2 * size / statistics.median(clock(lambda: target.copy_(source)) for _ in range(_COPIES))


def gpu_seconds(launch: Callable[[], object]) -> float:
    """The time between two events on the GPU, before and after the work of ``launch``."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    launch()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def cpu_seconds(work: Callable[[], object]) -> float:
    """The time of ``work`` on the host's clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


WINDOW_STEPS = 64
"""Most steps in the table of parts: the first ones of the longest run of steps without prefill."""


def look_closer(
    engine: Engine, requests: Sequence[BenchRequest], params: Sequence[SamplingParams], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Run ``requests`` again, all at once, and describe the decode steps."""
    run = run_loop(engine, requests, params)
    window = decode_window(run.steps)
    device = engine.config.device
    if not (device.startswith("cuda") and window):
        return _report(engine, run.steps, window, None, model)
    recorder = Recorder(device, window.start, window.stop - 1)
    run_loop(engine, requests, params, before_step=recorder.before_step)
    try:
        gpu = recorder.times()
    except Exception as error:  # the roof does not need the recording
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return _report(engine, run.steps, window, None, model) | {"not_recorded": reason}
    return _report(engine, run.steps, window, gpu, model)


def look_back(engine: Engine, run: LoopRun, model: Mapping[str, Any]) -> dict[str, Any]:
    """Describe all decode steps of a run that has ended, without the GPU's side."""
    return _report(engine, run.steps, [index for index, step in enumerate(run.steps) if step.only_decodes], None, model)


def _report(
    engine: Engine, steps: Sequence[StepRecord], window: Sequence[int], gpu: GpuTimes | None, model: Mapping[str, Any]
) -> dict[str, Any]:
    """The roof over all steps without prefill, and the parts of the steps in ``window``."""
    device, copy_bytes_per_s = engine.config.device, measure_copy(engine.config.device)
    moves = ModelBytes.of(read_config(PageBrainConfig(**model)), engine.config.torch_dtype.itemsize)
    report: dict[str, Any] = {"decode": decode_roof(steps, moves, copy_bytes_per_s), "window": None}
    if window:
        chosen = [steps[index] for index in window]
        parts = step_parts(chosen, gpu, on_gpu=device.startswith("cuda"))
        roof = decode_roof(chosen, moves, copy_bytes_per_s)
        report["window"] = {"first_step": window[0], "num_steps": len(window), **parts, "roof": roof}
    return report


def decode_window(steps: Sequence[StepRecord]) -> range:
    """The first ``WINDOW_STEPS`` of the longest run of steps without prefill; empty if there is none."""
    best, start = range(0), 0
    for index, step in enumerate(steps):
        if not step.only_decodes:
            start = index + 1
        elif index + 1 - start > len(best):
            best = range(start, index + 1)
    return best[:WINDOW_STEPS]


def step_parts(steps: Sequence[StepRecord], gpu: GpuTimes | None, on_gpu: bool) -> dict[str, Any]:
    """Mean seconds of a step, and of its parts on the host and, if recorded, on the GPU. Each side adds up to the step.

    On a CPU the host computes while it waits for the tokens, so this part is called ``compute``. ``launch`` is the time of
    the recorded calls of the CUDA runtime, ``prepare`` the rest of the engine's launch time.
    """
    count = len(steps)
    seconds = sum(step.seconds for step in steps) / count
    totals = sum((step.totals for step in steps), StepTotals())
    launching = 0.0 if gpu is None else min(gpu.launch_s, totals.launch_s) / count
    preparing = "prepare" if gpu is not None or not on_gpu else "prepare and launch"
    host = {"schedule": totals.schedule_s / count, preparing: totals.launch_s / count - launching}
    host |= {} if gpu is None else {"launch": launching}
    host |= {"wait for the GPU" if on_gpu else "compute": totals.wait_s / count, "detokenize": totals.output_s / count}
    parts: dict[str, Any] = {
        "seconds": seconds,
        "num_seqs_mean": sum(step.num_decodes for step in steps) / count,
        "host": host | {"rest": max(0.0, seconds - sum(host.values()))},
        "gpu": None,
    }
    if gpu is not None:
        by_category = {name: value / count for name, value in gpu.by_category.items()}
        parts["gpu"] = by_category | {"idle": max(0.0, seconds - gpu.busy_s / count)}
        parts["gpu_kernels"] = gpu.num_kernels / count
        parts["gpu_launches"] = gpu.num_launches / count
        parts["gpu_longest"] = {name: value / count for name, value in gpu.longest.items()}
    return parts


def print_closer(closer: Mapping[str, Any], console: Console) -> None:
    """One line on the roof, then the table of the parts of a step."""
    if "error" in closer:
        say(console, f"no closer look at the steps: {closer['error']}")
        return
    say(console, roof_line(closer["decode"]))
    window = closer["window"]
    if window is not None:
        steps = f"{window['num_steps']} steps of {window['num_seqs_mean']:.0f} sequences"
        say(console, f"where the {window['seconds'] * 1000:.2f} ms of a decode step go: {steps}")
        console.print(step_table(window))
    if "not_recorded" in closer:
        say(console, f"the GPU's side was not recorded: {closer['not_recorded']}")


def roof_line(decode: Mapping[str, Any] | None) -> str:
    """The bytes that decode steps moved, and their share of the roof, in words."""
    if decode is None:
        return "memory roof: no step was without prefill"
    moved = (
        f"memory roof: {decode['num_steps']} decode steps of {decode['num_seqs_mean']:.0f} sequences moved "
        f"{_bytes(decode['bytes'] / decode['num_steps'])} each (weights {_bytes(decode['weight_bytes'])}, and "
        f"{decode['kv_bytes_per_token']:,} bytes for each token of context) in "
        f"{decode['seconds'] / decode['num_steps'] * 1000:.2f} ms: {_bytes(decode['bytes_per_s'])}/s"
    )
    if decode["copy_bytes_per_s"] is None:
        return f"{moved}; there was no room to measure a copy"
    return f"{moved}, {decode['share']:.0%} of what a copy reaches here ({_bytes(decode['copy_bytes_per_s'])}/s)"


def step_table(window: Mapping[str, Any]) -> Table:
    """The parts of a step on the host and on the GPU; each side adds up to the step."""
    seconds = window["seconds"]
    table = new_table("where", "part", "ms", "share", num_left=2)
    for where in ("host", "gpu"):
        for number, (part, value) in enumerate((window[where] or {}).items()):
            label = "" if number else {"host": "host", "gpu": "GPU"}[where]
            table.add_row(label, part, f"{value * 1000:.3f}", f"{value / seconds:.0%}", end_section=part in ("rest", "idle"))
    return table


def _bytes(count: float) -> str:
    """Two or three digits and a unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if count < 100 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} bytes"
