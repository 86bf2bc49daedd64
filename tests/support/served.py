"""A real server, started as users start it: ``pagebrain serve`` in a process of its own, on a free port.

Schedulers that make its timing certain are in ``served_parts.py``; a client that reads slowly is in ``slow_client.py``.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
START_S = 90.0


def environment() -> dict[str, str]:
    """One thread for each server: the models are tiny. And the modules of this checkout."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def events(response: httpx.Response) -> Iterator[str]:
    """The data of each server-sent event of an open stream."""
    return (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))


def choices(data: list[str]) -> list[dict[str, Any]]:
    """The choices in the data of events."""
    return [choice for event in data if event != "[DONE]" for choice in json.loads(event).get("choices", [])]


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

    def wait_for_engine(self) -> psutil.Process:
        """The engine's process as soon as there is one, long before it can serve."""
        server = psutil.Process(self.process.pid)

        def has_started() -> bool:
            self._family = [server, *server.children(recursive=True)]
            return any(map(_is_engine, self._family))

        self.wait_until(has_started, "the server started no engine")
        assert not self.url, "the engine was ready before it was seen"
        return self.engine

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        (engine,) = [child for child in self._family[1:] if _is_engine(child)]
        return engine

    def processes_left(self) -> list[psutil.Process]:
        """Those of the server's processes that still run."""
        return [process for process in self._family if _runs(process)]

    def wait_gone(self, timeout_s: float = 15.0) -> None:
        """Wait until none of its processes is left."""
        until = time.monotonic() + timeout_s
        while self.processes_left() and time.monotonic() < until:
            time.sleep(0.02)
        assert not self.processes_left()

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

    def metrics(self) -> dict[str, float]:
        """Every metric by its name without prefix; labels beside the model's are in it: ``name{label="value"}``."""
        lines = [line for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {_short(name): float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def metric(self, name: str) -> float:
        """The value of a metric."""
        return self.metrics()[name]

    def num_ended(self, outcome: str) -> int:
        """How many requests ended so: ``stop``, ``length``, ``abort`` or ``error``."""
        return int(self.metric(f'request_success_total{{finished_reason="{outcome}"}}'))

    def is_idle(self) -> bool:
        """Whether nothing runs, nothing waits and every block is free."""
        now = self.metrics()
        return not any(now[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes_left():
            process.kill()
        self.process.kill()
        self.process.wait(10)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _is_engine(process: psutil.Process) -> bool:
    """Not the helper that Python's multiprocessing keeps beside every spawned process."""
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def _short(name: str) -> str:
    name, _, labels = name.removeprefix("pagebrain:").rstrip("}").partition("{")
    others = [label for label in labels.split(",") if not label.startswith("model_name=")]
    return name + (f"{{{','.join(others)}}}" if any(others) else "")
