"""Runs part of a benchmark in a child process: its task, its result, and the protocol between the two.

Each run has a process of its own, so that no run inherits memory, threads or compiled kernels of another. The child reads
its task as JSON from standard input. It writes JSON objects to standard output, one a line, each as soon as it is known, so
that results before a crash are kept.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pagebrain import errors
from pagebrain.bench.workload import GREEDY, BenchRequest, Sampling
from pagebrain.errors import PageBrainError


@dataclass(frozen=True)
class RunSpec:
    """The task of one child process: ``model`` are fields of ``PageBrainConfig``, ``settings`` those of the engine.

    ``sampling`` and ``request_rate`` (requests a second; ``None`` is all at once) are for PageBrain alone. With
    ``look_closer`` it runs the requests again after the timed run and measures the parts of its steps.
    """

    engine: str
    model: dict[str, Any]
    threads: int
    requests: list[BenchRequest]
    warmup: list[BenchRequest]
    settings: dict[str, Any] = field(default_factory=dict)
    sampling: Sampling = GREEDY
    request_rate: float | None = None
    look_closer: bool = False

    def to_json(self) -> str:
        """The spec for the child's standard input."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RunSpec":
        """The inverse of :meth:`to_json`."""
        raw = json.loads(text)
        for name in ("requests", "warmup"):
            raw[name] = [BenchRequest(tuple(item["prompt_token_ids"]), item["output_len"]) for item in raw[name]]
        return cls(**raw | {"sampling": Sampling(**raw["sampling"])})


Mark = Callable[[str], None]
"""Called with ``ready`` when an engine can take its first request, and with ``warm`` after its warm-up."""


def no_mark(name: str) -> None:
    """A ``Mark`` that does nothing."""


@dataclass(frozen=True)
class RunResult:
    """The result of one timed run. Lists are in the order of the requests; times are seconds, sizes are bytes.

    ``configuration`` is what the engine ran with, ``detokenization`` whether text was made of the tokens. ``start`` has
    ``imported_s`` and ``ready_s``, seconds since the child was spawned, and ``warmup_s``, the seconds of the warm-up after
    that, which include late compilations. PageBrain adds ``totals``, the :class:`~pagebrain.engine.trace.StepTotals` of the
    timed run, and on request ``closer``, the report of :mod:`~pagebrain.bench.decode_steps`.
    """

    elapsed_s: float
    first_token_s: list[float]
    token_ids: list[list[int]]
    configuration: dict[str, Any]
    detokenization: str
    peak_rss_bytes: int = 0
    peak_cuda_bytes: int | None = None
    start: dict[str, float] | None = None
    totals: dict[str, float] | None = None
    closer: dict[str, Any] | None = None


def synchronize(device: str) -> None:
    """Wait until a GPU has done all queued work. No effect on a CPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


Emit = Callable[[dict[str, Any]], None]


@dataclass
class StartClock:
    """When the child was spawned, and the marks since then, in seconds of ``time.time``."""

    spawned_s: float
    marks: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        """Record the time of ``imported``, ``ready`` or ``warm``."""
        self.marks[name] = time.time()

    def times(self) -> dict[str, float]:
        """Seconds from the spawning to each mark; ``warmup_s`` is from ``ready`` to ``warm``."""
        found = {f"{name}_s": at - self.spawned_s for name, at in self.marks.items() if name != "warm"}
        if "ready" in self.marks and "warm" in self.marks:
            found["warmup_s"] = self.marks["warm"] - self.marks["ready"]
        return found


Work = Callable[[str, StartClock, Emit], None]
"""The function that a child runs on its task."""


def run_in_child(spec: RunSpec) -> RunResult:
    """Run ``spec`` in a child process. A ``PageBrainError`` of the child is raised again, any other error as one line."""
    what = f"the {spec.engine} run"
    for result in child_events("pagebrain.bench.runners", spec.to_json(), spec.threads, what):
        return RunResult(**result)
    raise PageBrainError(f"{what} ended without a result")


def child_environment(threads: int | None) -> dict[str, str]:
    """The environment for a Python that imports the same modules as this one, with ``threads`` for computing if given."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return environment | ({} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)))


def child_events(
    module: str, task: str, threads: int, what: str, more_environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run ``python -m module`` on ``task`` and yield its events. Raises what the child raised; messages name ``what``."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = child_environment(threads) | quiet | dict(more_environment or {})
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        command = [sys.executable, "-W", "ignore", "-m", module, repr(time.time())]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
        with subprocess.Popen(command, env=environment, text=True, encoding="utf-8", **pipes) as child:
            assert child.stdin is not None and child.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError), child.stdin:  # if it ends early, standard error says why
                    child.stdin.write(task)
                for line in child.stdout:
                    event = json.loads(line)
                    if "error" in event:
                        kind = getattr(errors, event["error"]["type"], PageBrainError)
                        raise kind(event["error"]["message"])
                    yield event
            except BaseException:
                child.kill()
                raise
        if child.returncode != 0:
            said.seek(0)
            lines = said.read().strip().splitlines() or [f"exit status {child.returncode}"]
            raise PageBrainError(f"{what} failed: {lines[-1]}")


def child_main(work: Work) -> int:
    """The child's side: read the task, do the ``work``, report a ``PageBrainError``."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not write between the events
    clock = StartClock(float(sys.argv[1]) if len(sys.argv) > 1 else time.time())
    clock.mark("imported")

    def emit(event: dict[str, Any]) -> None:
        answer.write(json.dumps(event) + "\n")
        answer.flush()

    with answer:
        try:
            work(sys.stdin.read(), clock, emit)
        except PageBrainError as error:
            emit({"error": {"type": type(error).__name__, "message": str(error)}})
    return 0
