"""The child process of the benchmark: load one engine, warm up, run the requests once against the clock.

``python -m pagebrain.bench.runners`` reads a :class:`~pagebrain.bench.spec.RunSpec` as JSON from standard input and writes a
:class:`~pagebrain.bench.spec.RunResult` as JSON to standard output, the way :mod:`~pagebrain.bench.child` describes. All
engines get the same weights, the same requests and the same number of threads. The clock runs from the first request handed
over to the last token known on the CPU.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import torch

from pagebrain.bench.child import Emit, StartClock, child_main
from pagebrain.bench.pagebrain_runner import PageBrainRunner
from pagebrain.bench.spec import Mark, RunResult, RunSpec, no_mark
from pagebrain.bench.workload import BenchRequest


def run_pagebrain(spec: RunSpec, mark: Mark = no_mark) -> RunResult:
    """PageBrain through its front door, ``LLM.generate``; with a request rate, request by request."""
    return _warm_pagebrain(spec, mark).timed(spec.requests, spec.sampling, spec.request_rate)


def _warm_pagebrain(spec: RunSpec, mark: Mark) -> PageBrainRunner:
    runner = PageBrainRunner(spec.model, spec.settings)
    mark("ready")
    runner.generate(spec.warmup, spec.sampling)
    mark("warm")
    return runner


def _hf_static(spec: RunSpec, mark: Mark = no_mark) -> RunResult:
    from pagebrain.bench.hf_runners import run_hf_static  # here, so that PageBrain's start does not pay for it

    return run_hf_static(spec, mark)


def _hf_continuous(spec: RunSpec, mark: Mark = no_mark) -> RunResult:
    from pagebrain.bench.hf_runners import run_hf_continuous

    return run_hf_continuous(spec, mark)


RUNNERS: dict[str, Callable[..., RunResult]] = {
    "pagebrain": run_pagebrain,
    "hf-static": _hf_static,
    "hf-continuous": _hf_continuous,
}
"""Engine name -> function that loads it and runs a spec once; it calls ``mark``, if given, when it is ready and warm."""


def run(spec: RunSpec, mark: Mark = no_mark) -> RunResult:
    """Run ``spec`` in this process, add the memory it took, and look closer if that was asked for."""
    torch.set_num_threads(spec.threads)
    if spec.engine != "pagebrain":
        return checked(spec, RUNNERS[spec.engine](spec, mark))
    runner = _warm_pagebrain(spec, mark)
    result = checked(spec, runner.timed(spec.requests, spec.sampling, spec.request_rate))
    if spec.look_closer:
        result = dataclasses.replace(result, closer=runner.look_closer(spec.requests, spec.sampling))
    return result


def checked(spec: RunSpec, result: RunResult) -> RunResult:
    """``result`` with the memory that this process took, once every request has as many tokens as it asked for."""
    checked_tokens(spec.engine, spec.requests, result)
    on_gpu = str(spec.model.get("device", "")).startswith("cuda")
    peak_cuda = torch.cuda.max_memory_allocated() if on_gpu else None
    return dataclasses.replace(result, peak_rss_bytes=_peak_rss_bytes(), peak_cuda_bytes=peak_cuda)


def checked_tokens(engine: str, requests: Sequence[BenchRequest], result: RunResult) -> None:
    """Raise ``RuntimeError`` unless every request has as many tokens as it asked for."""
    for index, (request, token_ids) in enumerate(zip(requests, result.token_ids)):
        if len(token_ids) != request.output_len:
            raise RuntimeError(f"{engine} made {len(token_ids)} tokens for request {index}, not {request.output_len}")


def _work(task: str, clock: StartClock, emit: Emit) -> None:
    result = run(RunSpec.from_json(task), clock.mark)
    emit(dataclasses.asdict(dataclasses.replace(result, start=clock.times())))


def _peak_rss_bytes() -> int:
    """Most resident memory that this process had. On Linux ``ru_maxrss`` may be the parent's, from before ``exec``."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # which Windows has not

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(child_main(_work))
