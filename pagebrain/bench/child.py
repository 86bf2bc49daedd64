"""Runs part of a benchmark in a fresh Python: what the child is given, what it gives back, and how the two talk.

Each run gets a process of its own, so that no run inherits memory, threads or compiled kernels of another. The child reads
its task as JSON from standard input and writes JSON objects to standard output, one a line, each as soon as it is known.
Results before a crash are not lost.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from pagebrain import errors
from pagebrain.bench.workload import GREEDY, BenchRequest, Sampling
from pagebrain.errors import PageBrainError


@dataclass(frozen=True)
class RunSpec:
    """What one child process does: ``model`` are fields of ``PageBrainConfig``, ``settings`` the engine's own.

    ``sampling`` and ``request_rate`` (requests a second; ``None`` is all at once) are for PageBrain alone. With
    ``look_closer`` it runs the requests again after the timed run, to see where the time of a step went.
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
        """The spec as :meth:`to_json` wrote it."""
        raw = json.loads(text)
        for name in ("requests", "warmup"):
            raw[name] = [BenchRequest(tuple(item["prompt_token_ids"]), item["output_len"]) for item in raw[name]]
        return cls(**raw | {"sampling": Sampling(**raw["sampling"])})


Mark = Callable[[str], None]
"""Called with ``ready`` when an engine could take its first request, and with ``warm`` when it has warmed up."""


def no_mark(name: str) -> None:
    """A ``Mark`` that does nothing."""


@dataclass(frozen=True)
class RunResult:
    """What one timed run gave, per request in the order of the requests; times in seconds, sizes in bytes.

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
    """Wait until everything that was asked of a GPU is done, so that a clock may be read."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


Emit = Callable[[dict[str, Any]], None]


@dataclass
class StartClock:
    """When the child was spawned, and when what happened since, in seconds of ``time.time``."""

    spawned_s: float
    marks: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        """Note the time of ``imported``, ``ready`` or ``warm``."""
        self.marks[name] = time.time()

    def times(self) -> dict[str, float]:
        """Seconds from the spawning to each mark; ``warmup_s`` is from ``ready`` to ``warm``."""
        found = {f"{name}_s": at - self.spawned_s for name, at in self.marks.items() if name != "warm"}
        if "ready" in self.marks and "warm" in self.marks:
            found["warmup_s"] = self.marks["warm"] - self.marks["ready"]
        return found


Work = Callable[[str, StartClock, Emit], None]
"""What a child does with its task."""


def run_in_child(spec: RunSpec) -> RunResult:
    """Run ``spec`` in a fresh Python. A ``PageBrainError`` of the child is raised again, any other error as one line."""
    what = f"the {spec.engine} run"
    for result in child_events("pagebrain.bench.runners", spec.to_json(), spec.threads, what):
        return RunResult(**result)
    raise PageBrainError(f"{what} ended without a result")


def child_events(
    module: str, task: str, threads: int, what: str, more_environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run ``python -m module`` on ``task`` and yield its events. Raises what the child raised, naming ``what``."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join(entry for entry in sys.path if entry)  # the same modules, however this process found them
    environment = os.environ | quiet | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": path}
    environment |= more_environment or {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        command = [sys.executable, "-W", "ignore", "-m", module, repr(time.time())]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
        with subprocess.Popen(command, env=environment, text=True, encoding="utf-8", **pipes) as child:
            assert child.stdin is not None and child.stdout is not None
            try:
                _hand_over(task, child.stdin)
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


def _hand_over(task: str, stdin: IO[str]) -> None:
    try:
        with stdin:
            stdin.write(task)
    except BrokenPipeError:  # the child ended before it had read its task: standard error says why
        pass


def child_main(work: Work) -> int:
    """The child's side: read the task, do the ``work``, report a ``PageBrainError``."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not spoil the answer
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
