"""A real server, started as users start it: ``pagebrain serve`` in a process of its own, on a free port."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
START_S = 90.0


def environment() -> dict[str, str]:
    """One thread for each server: the models are tiny. And the modules of this checkout."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


class Served:
    """A running server. Use as a context; whatever is left of it at the end is killed.

    Attributes:
        url: where it listens.
        lines: what it has written to standard error.
        process: its own process; the engine's is a child of that.
    """

    def __init__(self, *arguments: str, command: tuple[str, ...] = ("serve",), wait: bool = True, **settings: Any) -> None:
        line = [sys.executable, "-m", "pagebrain", *command, "--port", "0", *arguments]
        self.lines: list[str] = []
        self.url = ""
        self.process = subprocess.Popen(
            line,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            **({"env": environment()} | settings),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._family: list[psutil.Process] = []
        if wait:
            self.wait_until(lambda: bool(self.url), "the server did not start", START_S)
            self._family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if " at http://" in line and line.startswith("pagebrain: serving "):
                self.url = line.rpartition(" at ")[2].strip()

    def wait_until(self, holds: Callable[[], bool], otherwise: str, timeout_s: float = 30.0) -> None:
        """Wait for something; ``AssertionError`` with what the server said if it does not happen."""
        until = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > until or (not self.url and self.process.poll() is not None):
                raise AssertionError(f"{otherwise}: " + "\n".join(self.lines))
            time.sleep(0.02)

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        (engine,) = [child for child in self._family[1:] if _is_engine(child)]
        return engine

    def processes_left(self) -> list[psutil.Process]:
        """Those of the server's processes that still run."""
        return [process for process in self._family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit status."""
        status = self.process.wait(timeout_s)
        self._reader.join(5)
        return status

    def get(self, path: str, **settings: Any) -> httpx.Response:
        """GET a path."""
        return httpx.get(self.url + path, **settings)

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        """POST a path with a JSON body."""
        return httpx.post(self.url + path, json=body, **({"timeout": 60} | settings))

    def metric(self, name: str) -> float:
        """The value of a metric that has no labels but the model's."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith(f"pagebrain:{name}{{")]
        (line,) = lines
        return float(line.rpartition(" ")[2])

    def is_idle(self) -> bool:
        """Whether nothing runs, nothing waits and every block is free."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(self.metric(name) == 0 for name in names)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes_left():
            process.kill()
        self.process.kill()
        self.process.wait(10)


def _is_engine(process: psutil.Process) -> bool:
    """Not the helper that Python's multiprocessing keeps beside every spawned process."""
    return "resource_tracker" not in " ".join(process.cmdline())
