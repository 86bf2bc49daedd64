"""The child process of the benchmark: load one engine, warm up, run the requests once and time them.

``python -m pagebrain.bench.runners`` reads a :class:`~pagebrain.bench.child.RunSpec` as JSON from standard input. It writes
a :class:`~pagebrain.bench.child.RunResult` as JSON to standard output, the way :mod:`~pagebrain.bench.child` describes. All
engines get the same weights, the same requests and the same number of threads. The time is measured from the first request
to the last token known on the CPU.
"""

import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pagebrain import LLM
from pagebrain.bench.child import Emit, Mark, RunResult, RunSpec, StartClock, child_main, no_mark, synchronize
from pagebrain.bench.decode_steps import look_back, look_closer
from pagebrain.bench.engine_loop import LoopRun, run_loop
from pagebrain.bench.serve.load import Load
from pagebrain.bench.workload import BenchRequest, Sampling
from pagebrain.engine.trace import StepTotals

_CONFIGURATION = ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "async_scheduling", "cuda_graphs")


class PageBrainRunner:
    """One engine. It is made ready for requests: weights are read, blocks are allocated, graphs are captured."""

    def __init__(self, model: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.model = dict(model)
        self.llm = LLM(**model, **settings)
        synchronize(self.llm.config.device)
        self._arrived: LoopRun | None = None

    def generate(self, requests: Sequence[BenchRequest], sampling: Sampling) -> list[Any]:
        """Serve all requests with ``LLM.generate``."""
        prompts = [list(request.prompt_token_ids) for request in requests]
        return self.llm.generate(prompts, sampling.params(requests), use_tqdm=False)

    def timed(self, requests: Sequence[BenchRequest], sampling: Sampling, request_rate: float | None = None) -> RunResult:
        """Serve all requests and time them; with a rate, each request is added at its arrival time."""
        if request_rate is not None:
            return self._timed_loop(requests, sampling, request_rate)
        self._arrived = None
        engine = self.llm.engine
        before = StepTotals.of(engine.stats())
        gc.collect()  # otherwise a collection, of 0.1 s, falls into one run and not into another
        began = time.monotonic()  # the engine's clock
        outputs = self.generate(requests, sampling)
        run = LoopRun(
            elapsed_s=time.monotonic() - began,
            first_token_s=[output.metrics.first_token_s - began for output in outputs],
            token_ids=[list(output.outputs[0].token_ids) for output in outputs],
        )
        run.totals = StepTotals.of(engine.stats()).since(before)
        return self._result(run)

    def _timed_loop(self, requests: Sequence[BenchRequest], sampling: Sampling, request_rate: float) -> RunResult:
        arrivals = Load(rate=request_rate).arrivals_s(len(requests), int(self.model.get("seed", 0)))
        assert arrivals is not None
        self._arrived = run_loop(self.llm.engine, requests, sampling.params(requests), list(arrivals.values()))
        return self._result(self._arrived)

    def _result(self, run: LoopRun) -> RunResult:
        return RunResult(
            elapsed_s=run.elapsed_s,
            first_token_s=run.first_token_s,
            token_ids=run.token_ids,
            configuration=self.configuration,
            detokenization=self.detokenization,
            totals=vars(run.totals),
        )

    def look_closer(self, requests: Sequence[BenchRequest], sampling: Sampling) -> dict[str, Any]:
        """The parts of a decode step's time. An error is reported and not raised.

        The requests run again for it, unless there was a request rate: then the loop has a record of its steps.
        """
        engine = self.llm.engine
        try:
            if self._arrived is not None:
                return look_back(engine, self._arrived, self.model)
            return look_closer(engine, requests, sampling.params(requests), self.model)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}

    @property
    def configuration(self) -> dict[str, Any]:
        """The engine's settings."""
        return {name: getattr(self.llm.config, name) for name in _CONFIGURATION} | {
            "weights_packed": self.llm.weights_packed
        }

    @property
    def detokenization(self) -> str:
        """Whether tokens are decoded to text."""
        return "none: the model has no tokenizer" if self.llm.tokenizer is None else "each token as it comes, in the clock"


def run_pagebrain(spec: RunSpec, mark: Mark = no_mark) -> RunResult:
    """PageBrain's run, with the closer look if the spec asks for it."""
    runner = PageBrainRunner(spec.model, spec.settings)
    mark("ready")
    runner.generate(spec.warmup, spec.sampling)
    mark("warm")
    result = checked(spec, runner.timed(spec.requests, spec.sampling, spec.request_rate))
    if spec.look_closer:
        result = dataclasses.replace(result, closer=runner.look_closer(spec.requests, spec.sampling))
    return result


def _hf_static(spec: RunSpec, mark: Mark = no_mark) -> RunResult:
    from pagebrain.bench.hf_runners import run_hf_static  # imported here to keep it out of PageBrain's start time

    return checked(spec, run_hf_static(spec, mark))


def _hf_continuous(spec: RunSpec, mark: Mark = no_mark) -> RunResult:
    from pagebrain.bench.hf_runners import run_hf_continuous

    return checked(spec, run_hf_continuous(spec, mark))


RUNNERS: dict[str, Callable[..., RunResult]] = {
    "pagebrain": run_pagebrain,
    "hf-static": _hf_static,
    "hf-continuous": _hf_continuous,
}
"""Engine name -> function that loads it and runs a spec once. It calls ``mark`` when the engine is ready and warm."""


def checked(spec: RunSpec, result: RunResult) -> RunResult:
    """``result`` with this process's peak memory. Raises ``RuntimeError`` if a request has a wrong number of tokens."""
    checked_tokens(spec.engine, spec.requests, result)
    on_gpu = str(spec.model.get("device", "")).startswith("cuda")
    peak_cuda = torch.cuda.max_memory_allocated() if on_gpu else None
    return dataclasses.replace(result, peak_rss_bytes=_peak_rss_bytes(), peak_cuda_bytes=peak_cuda)


def checked_tokens(engine: str, requests: Sequence[BenchRequest], result: RunResult) -> None:
    """Raise ``RuntimeError`` unless every request has exactly its ``output_len`` tokens."""
    for index, (request, token_ids) in enumerate(zip(requests, result.token_ids)):
        if len(token_ids) != request.output_len:
            raise RuntimeError(f"{engine} made {len(token_ids)} tokens for request {index}, not {request.output_len}")


def _work(task: str, clock: StartClock, emit: Emit) -> None:
    spec = RunSpec.from_json(task)
    torch.set_num_threads(spec.threads)
    result = RUNNERS[spec.engine](spec, clock.mark)
    emit(dataclasses.asdict(dataclasses.replace(result, start=clock.times())))


def _peak_rss_bytes() -> int:
    """Peak resident memory of this process. On Linux ``ru_maxrss`` may be the parent's, from before ``exec``."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # missing on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(child_main(_work))
