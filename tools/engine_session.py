"""Several workloads on one engine that is started once: the child process behind a whole table of figures.

``python -m tools.engine_session`` reads a :class:`SessionSpec` and reports, line by line, when it was ready and what each
run gave. A case that fails is reported, and the next one runs; results before a crash are reported already.
"""

import dataclasses
import hashlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pagebrain.bench.child import Emit, RunResult, StartClock, child_main
from pagebrain.bench.runners import PageBrainRunner, checked_tokens
from pagebrain.bench.workload import GREEDY, BenchRequest, Sampling


@dataclass(frozen=True)
class Case:
    """One workload and how often it runs: with an empty ``warmup`` the first run also pays for what is not compiled yet."""

    name: str
    requests: list[BenchRequest]
    warmup: list[BenchRequest]
    sampling: Sampling = GREEDY
    runs: int = 3
    request_rate: float | None = None
    look_closer: bool = False


@dataclass(frozen=True)
class SessionSpec:
    """What one child does: ``model`` are fields of ``PageBrainConfig``, ``settings`` the engine's own."""

    model: dict[str, Any]
    threads: int
    cases: list[Case]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The spec for the child's standard input."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "SessionSpec":
        """The spec as :meth:`to_json` wrote it."""
        raw = json.loads(text)
        return cls(**raw | {"cases": [_case(item) for item in raw["cases"]]})


def _case(raw: Mapping[str, Any]) -> Case:
    lists: dict[str, Any] = {
        name: [BenchRequest(tuple(item["prompt_token_ids"]), item["output_len"]) for item in raw[name]]
        for name in ("requests", "warmup")
    }
    return Case(**dict(raw) | lists | {"sampling": Sampling(**raw["sampling"])})


def run_session(spec: SessionSpec, clock: StartClock, emit: Emit) -> None:
    """Start the engine, then run every case."""
    torch.set_num_threads(spec.threads)
    runner = PageBrainRunner(spec.model, spec.settings)
    clock.mark("ready")
    emit({"ready": clock.times(), "configuration": runner.configuration, "detokenization": runner.detokenization})
    for case in spec.cases:
        try:
            _run_case(runner, case, emit)
        except Exception as error:
            emit({"case": case.name, "failed": f"{type(error).__name__}: {' '.join(str(error).split())}"})


def _run_case(runner: PageBrainRunner, case: Case, emit: Emit) -> None:
    if case.warmup:
        runner.generate(case.warmup, case.sampling)
    for _ in range(case.runs):
        result = runner.timed(case.requests, case.sampling, case.request_rate)
        checked_tokens("pagebrain", case.requests, result)
        emit({"case": case.name, "run": run_row(case.requests, result)})
    if case.look_closer:
        emit({"case": case.name, "closer": runner.look_closer(case.requests, case.sampling)})


def run_row(requests: Sequence[BenchRequest], result: RunResult) -> dict[str, Any]:
    """One run in numbers. ``tokens`` is a digest of all tokens, by which two runs can be held to the same ones."""
    return {
        "output_tokens_per_s": sum(request.output_len for request in requests) / result.elapsed_s,
        "elapsed_s": result.elapsed_s,
        "first_token_s": {"median": statistics.median(result.first_token_s), "max": max(result.first_token_s)},
        "totals": result.totals,
        "tokens": hashlib.blake2b(json.dumps(result.token_ids).encode(), digest_size=8).hexdigest(),
    }


def _work(task: str, clock: StartClock, emit: Emit) -> None:
    run_session(SessionSpec.from_json(task), clock, emit)


if __name__ == "__main__":
    sys.exit(child_main(_work))
