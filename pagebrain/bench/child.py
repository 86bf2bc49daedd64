"""Runs part of a benchmark in a fresh Python, which tells what it finds line by line.

Each run gets a process of its own, so that none inherits another's memory, threads or compiled kernels. The child reads its
task as JSON from standard input and writes JSON objects to standard output, one a line, each as soon as it is known: what
came before a crash is not lost.
"""

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
from pagebrain.bench.spec import RunResult, RunSpec
from pagebrain.errors import PageBrainError

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
    """Run ``spec`` in a fresh Python. An error of PageBrain's comes back as itself, any other as one line."""
    what = f"the {spec.engine} run"
    for result in child_events("pagebrain.bench.runners", spec.to_json(), spec.threads, what):
        return RunResult(**result)
    raise PageBrainError(f"{what} ended without a result")


def child_events(
    module: str, task: str, threads: int, what: str, more_environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run ``python -m module`` on ``task`` and yield what it tells. Raises what it raised, naming ``what``."""
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
    except BrokenPipeError:  # it ended before it had read its task: standard error says why
        pass


def child_main(work: Work) -> int:
    """The other side: read the task, do the ``work``; an error of PageBrain's is told too."""
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
