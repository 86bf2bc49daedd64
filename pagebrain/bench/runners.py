"""The child process of the benchmark: load one engine, warm up, run the requests once against the clock.

``python -m pagebrain.bench.runners`` reads a :class:`~pagebrain.bench.spec.RunSpec` as JSON from standard input and writes a
:class:`~pagebrain.bench.spec.RunResult` as JSON to standard output; what a library prints goes to standard error. All
engines get the same weights, the same requests, all at once, and the same number of threads. The clock runs from the first
request handed over to the last token known on the CPU.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pagebrain.bench.hf_runners import run_hf_continuous, run_hf_static
from pagebrain.bench.spec import RunResult, RunSpec, synchronize
from pagebrain.bench.workload import BenchRequest
from pagebrain.errors import PageBrainError


def run_pagebrain(spec: RunSpec) -> RunResult:
    """PageBrain through its front door, ``LLM.generate``."""
    from pagebrain import LLM, SamplingParams

    llm = LLM(**spec.model, **spec.settings)

    def params(requests: Sequence[BenchRequest]) -> list[SamplingParams]:
        return [SamplingParams(temperature=0.0, max_tokens=request.output_len, ignore_eos=True) for request in requests]

    def generate(requests: Sequence[BenchRequest]) -> Any:
        return llm.generate([list(request.prompt_token_ids) for request in requests], params(requests), use_tqdm=False)

    generate(spec.warmup)
    synchronize(llm.config.device)
    began = time.monotonic()  # the engine's own clock
    outputs = generate(spec.requests)
    elapsed = time.monotonic() - began
    config = llm.config
    text = "none: the model has no tokenizer" if llm.tokenizer is None else "each token as it comes, in the clock"
    names = ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "lookahead")
    return RunResult(
        elapsed_s=elapsed,
        first_token_s=[output.metrics.first_token_s - began for output in outputs],
        token_ids=[list(output.outputs[0].token_ids) for output in outputs],
        configuration={name: getattr(config, name) for name in names} | {"weights_packed": llm.weights_packed},
        detokenization=text,
    )


RUNNERS: dict[str, Callable[[RunSpec], RunResult]] = {
    "pagebrain": run_pagebrain,
    "hf-static": run_hf_static,
    "hf-continuous": run_hf_continuous,
}
"""Engine name -> function that loads it and runs a spec once."""


def run(spec: RunSpec) -> RunResult:
    """Run ``spec`` in this process and add the memory it took."""
    torch.set_num_threads(spec.threads)
    result = RUNNERS[spec.engine](spec)
    for index, (request, token_ids) in enumerate(zip(spec.requests, result.token_ids)):
        if len(token_ids) != request.output_len:
            raise RuntimeError(f"{spec.engine} made {len(token_ids)} tokens for request {index}, not {request.output_len}")
    on_gpu = str(spec.model.get("device", "")).startswith("cuda")
    peak_cuda = torch.cuda.max_memory_allocated() if on_gpu else None
    return dataclasses.replace(result, peak_rss_bytes=_peak_rss_bytes(), peak_cuda_bytes=peak_cuda)


def main() -> int:
    """Read a spec, run it, write the result; an error is a result too, so that the parent can say it in one line."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not spoil the answer
    try:
        payload: dict[str, Any] = {"result": dataclasses.asdict(run(RunSpec.from_json(sys.stdin.read())))}
    except PageBrainError as error:
        payload = {"error": {"type": type(error).__name__, "message": str(error)}}
    with answer:
        json.dump(payload, answer)
    return 0


def _peak_rss_bytes() -> int:
    """Most resident memory that this process had. On Linux ``ru_maxrss`` may be the parent's, from before ``exec``."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # which Windows has not

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
