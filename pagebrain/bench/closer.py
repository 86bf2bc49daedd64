"""A closer look at the decode steps, after a timed run: what share of the memory roof they reach, and where their time goes.

The same requests run again with a clock at every step, and on a GPU once more while the profiler records some of the steps.
The host's parts are the engine's own totals; what is left of a step's time is named, so that every table adds up.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pagebrain.bench.engine_loop import LoopRun, StepRecord, run_loop
from pagebrain.bench.gpu_times import GpuTimes, Recorder
from pagebrain.bench.roof import ModelBytes, decode_roof, measure_copy
from pagebrain.bench.totals import Totals
from pagebrain.bench.workload import BenchRequest
from pagebrain.config import PageBrainConfig
from pagebrain.engine import Engine
from pagebrain.loading import read_config
from pagebrain.sampling_params import SamplingParams

WINDOW_STEPS = 64
"""Steps that the table is about, at most: the first of the longest stretch without prefill."""


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
    except Exception as error:  # the roof does not need it
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return _report(engine, run.steps, window, None, model) | {"not_recorded": reason}
    return _report(engine, run.steps, window, gpu, model)


def look_back(engine: Engine, run: LoopRun, model: Mapping[str, Any]) -> dict[str, Any]:
    """Describe all decode steps of a run that is over, without what only a recording of the GPU shows."""
    return _report(engine, run.steps, [index for index, step in enumerate(run.steps) if step.only_decodes], None, model)


def _report(
    engine: Engine, steps: Sequence[StepRecord], window: Sequence[int], gpu: GpuTimes | None, model: Mapping[str, Any]
) -> dict[str, Any]:
    """The roof over all steps without prefill, and the parts of those whose numbers ``window`` names."""
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
    """The first ``WINDOW_STEPS`` of the longest stretch of steps without prefill; empty if there is none."""
    best, start = range(0), 0
    for index, step in enumerate(steps):
        if not step.only_decodes:
            start = index + 1
        elif index + 1 - start > len(best):
            best = range(start, index + 1)
    return best[:WINDOW_STEPS]


def step_parts(steps: Sequence[StepRecord], gpu: GpuTimes | None, on_gpu: bool) -> dict[str, Any]:
    """Mean seconds of a step, and of its parts on the host and, where it was recorded, on the GPU. Each side adds up.

    On a CPU the host computes while it waits for the tokens: that part is called ``compute`` then. Launching is what the
    recorded calls of the CUDA runtime took, and preparing is the rest of what the engine took to launch a step.
    """
    count = len(steps)
    seconds = sum(step.seconds for step in steps) / count
    totals = sum((step.totals for step in steps), Totals())
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
