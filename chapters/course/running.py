"""Runs a chapter's tests on a file in a process of its own, with limits on time and memory."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chapters.course.catalog import ROOT, Chapter

_SECRETS = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "API_KEY", "ACCESS_KEY")
_DROPPED = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONSTARTUP")
_LONGEST_TEXT = 1 << 20  # bytes
_LONGEST_REPORT = 16 << 20  # bytes; a failure takes up to 20,000 characters of it
_GRACE_S = 1.0  # after a test's time, until the process is ended
AGAIN_TIMEOUT_S = 3.0
"""A test's time limit once another test of the same file did not end: most of that file's time has been spent."""


@dataclass(frozen=True)
class Limits:
    """What a graded file may take.

    Attributes:
        test_s: seconds for one test.
        total_s: seconds for all tests together.
        memory_gb: address space beyond what Python, torch and transformers take themselves; 0 for no limit.
    """

    test_s: float = 10.0
    total_s: float = 180.0
    memory_gb: float = 4.0


@dataclass
class Run:
    """What came of a run.

    Attributes:
        records: test -> what the plugin wrote about it.
        plan: test -> task, of all tests that were to run on the file as it is; empty if pytest never came so far.
        again: the same of the tests in their second form, on the file with all other tasks lent.
        running: the test that ran last.
        loaded: whether the file could be imported.
        done: whether pytest came to its own end.
        status: the exit status; negative for a signal; ``None`` if the process was stopped for taking too long.
        output: all that pytest printed.
        stuck: where each thread was, if the process was ended because a test would not end.
    """

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan: dict[str, str] = field(default_factory=dict)
    running: str = ""
    loaded: bool = False
    done: bool = False
    status: int | None = 0
    output: str = ""
    again: dict[str, str] = field(default_factory=dict)
    stuck: str = ""

    @property
    def guilty(self) -> str | None:
        """The task of the test that ran last."""
        return (self.plan | self.again).get(self.running)

    @property
    def ended_early(self) -> bool:
        """Whether tests are missing because the process, or the collection of tests, failed."""
        return not self.done or self.status not in (0, 1, 5)  # passed, failed, no tests


class StoppedError(Exception):
    """The run was stopped before it had a result."""


class Processes:
    """The processes that run now, of all threads; :meth:`stop` ends them and lets no other start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def start(self, command: Sequence[str], **settings: Any) -> "subprocess.Popen[bytes]":
        """Start a process. Raises ``StoppedError`` after :meth:`stop`."""
        with self._lock:
            self.check()
            process = subprocess.Popen(command, **settings)
            self._live.add(process)
        return process

    def end(self, process: "subprocess.Popen[bytes]") -> None:
        """End a process and what it started. Raises ``StoppedError`` if it was :meth:`stop` that ended it."""
        with self._lock:
            self._live.discard(process)
        _kill(process)
        process.wait()
        self.check()

    def check(self) -> None:
        """Raises ``StoppedError`` after :meth:`stop`."""
        if self._stopped:
            raise StoppedError

    def stop(self) -> None:
        """End all of them. A signal handler may call this."""
        self._stopped = True
        with self._lock:
            for process in self._live:
                _kill(process)


_UNUSED = ("-p", "no:nbval", "-p", "no:schemathesis", "-p", "no:hypothesispytest", "-p", "no:logging")
PLUGINS = ("-p", "chapters.course.plugin", "-p", "timeout", *_UNUSED)
"""pytest's options for the chapters' tests. They use none of the last four: three are slow to import, one in each test."""

QUICK = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PAGEBRAIN_CHECK": "1"}
"""Variables of a check's process: it imports no plugins but those that it names, and ``tests/conftest.py`` imports less."""
_THREADS = "OMP_NUM_THREADS"  # the tests' tensors are small: several threads would only wait for each other


def run_tests(
    chapter: Chapter,
    path: Path,
    tasks: Sequence[str],
    *,
    own: Mapping[str, Path],
    seed: int,
    limits: Limits,
    lend: Collection[str] = (),
    failed: Collection[str] = (),
    seconds_left: float | None = None,
    processes: Processes | None = None,
) -> Run:
    """Judge ``path`` by the tests of ``chapter`` that belong to ``tasks``; earlier chapters in ``own`` are these files.

    The functions of the tasks ``lend`` are the reference's. A task that fails is judged again with those of all other tasks
    lent; the tasks ``failed`` are known to fail, and only judged so.
    """
    with tempfile.TemporaryDirectory(prefix="pagebrain-check-", ignore_cleanup_errors=True) as folder:
        report = Path(folder) / "report"
        command = [
            *(sys.executable, "-m", "pytest", *PLUGINS, "-p", "no:cacheprovider", "-v", "--tb=short"),
            *("-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", str(chapter.test_file)),
            *("--chapter-file", f"{chapter.number}={path}", "--chapter-report", str(report), "--seed", str(seed)),
            *("--chapter-timeout", str(limits.test_s), "--memory-gb", str(limits.memory_gb)),
            *("--lend-others", "--in-a-hurry", "--grace", str(_GRACE_S)),
            *(option for task in tasks for option in ("--task", task)),
            *(option for task in lend for option in ("--lend", task)),
            *(option for task in failed for option in ("--failed", task)),
            *(option for file in own.values() for option in ("--mine", str(file))),
        ]
        output = Path(folder) / "output"
        status = run_command(command, output, limits.total_s if seconds_left is None else seconds_left, processes)
        run = read_report(report)
        run.status, run.output = status, _text(output)
        return run


def read_report(report: Path) -> Run:
    """What the plugin wrote about a run, however far it came."""
    plan, again = json.loads(_text(report.with_name(report.name + ".plan")) or "[{}, {}]")
    return Run(
        records={record["nodeid"]: record for record in _worst_last(_lines(report))},
        plan=plan,
        again=again,
        stuck=_text(report.with_name(report.name + ".stuck")),
        running=_text(report.with_name(report.name + ".running")),
        loaded=report.with_name(report.name + ".loaded").exists(),
        done=report.with_name(report.name + ".done").exists(),
    )


def run_command(command: Sequence[str], output: Path, timeout: float, processes: Processes | None = None) -> int | None:
    """The exit status of a command, ``None`` if it had to be stopped. Its output goes to a file, so no pipe can block."""
    environment = {name: value for name, value in os.environ.items() if not _is_private(name)}
    environment.setdefault(_THREADS, "1")
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1", **QUICK}
    processes = processes or Processes()
    with output.open("wb") as file:
        process = processes.start(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # where there are process groups, it leads one
        )
        deadline = time.monotonic() + timeout
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            processes.end(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process, and where there are process groups what it started."""
    try:
        if sys.platform != "win32":
            os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            process.kill()
    except (ProcessLookupError, PermissionError):
        pass  # it has ended already


def _is_private(name: str) -> bool:
    return name in _DROPPED or any(word in name.upper() for word in _SECRETS)


def _worst_last(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A test that passed and whose teardown failed has two records: the one that is not ``passed`` counts."""
    return sorted(records, key=lambda record: bool(record["outcome"] != "passed"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a report that may be cut off."""
    records = []
    for line in _text(path, _LONGEST_REPORT).splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _text(path: Path, longest: int = _LONGEST_TEXT) -> str:
    """What a file holds that the graded code may have written to: of a very long one, the end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - longest))
            return file.read(longest).decode("utf-8", errors="replace")
    except OSError:
        return ""
