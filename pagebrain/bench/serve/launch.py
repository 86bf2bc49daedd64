"""Starts ``pagebrain serve`` on a free port for a benchmark, waits until it is ready, and stops it however the run ends."""

import argparse
import contextlib
import ctypes
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pagebrain.errors import ConfigError, PageBrainError

READY = re.compile(r"serving .+ at (https?://\S+)")
"""The line of ``pagebrain serve`` that says it accepts requests, and where."""

_STOP_TIMEOUT_S = 20.0
_LINES_KEPT = 20


def parse_launch(text: str) -> tuple[list[str], dict[str, Any]]:
    """The arguments for ``pagebrain serve``, and those of them that shape the engine, as keyword arguments for ``LLM``.

    Raises ``ConfigError``; the options that only a server has are left to the server to check.
    """
    from pagebrain.cli.frame import OneLineParser
    from pagebrain.cli.options import add_engine_arguments, engine_settings

    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--launch cannot be split into arguments ({error}): {text!r}") from None
    for name, advice in (
        ("--port", "it takes a free one by itself"),
        ("--api-key", "give it to the bench, which hands it on"),
    ):
        if any(argument.partition("=")[0] == name for argument in arguments):
            raise ConfigError(f"--launch must not have {name}: {advice}")
    parser = OneLineParser(prog="pagebrain serve", add_help=False)
    add_engine_arguments(parser)
    known, _ = parser.parse_known_args(arguments, argparse.Namespace())
    return arguments, engine_settings(known)


@contextlib.contextmanager
def launched(
    arguments: Sequence[str],
    *,
    api_key: str | None = None,
    threads: int | None = None,
    ready_timeout_s: float = 900.0,
    command: Sequence[str] = (sys.executable, "-m", "pagebrain", "serve"),
) -> Iterator[str]:
    """A running server's URL; the server and all its processes are gone when the block is left.

    Raises ``PageBrainError`` with what the server said last if it ends, or is not ready in time.
    """
    server = subprocess.Popen(
        [*command, *arguments, "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=_environment(api_key, threads),
        start_new_session=True,  # a group of its own, so that Ctrl-C reaches it through here, in order
        preexec_fn=_end_with_parent(),
    )
    try:
        yield _wait_until_ready(server, ready_timeout_s)
    finally:
        _stop(server)


def _environment(api_key: str | None, threads: int | None) -> dict[str, str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)  # the same modules, however this process found them
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if api_key is not None:
        environment["PAGEBRAIN_API_KEY"] = api_key
    return environment


def _wait_until_ready(server: "subprocess.Popen[str]", timeout_s: float) -> str:
    """The URL from the server's own line. A thread goes on reading: a talkative server would block on a full pipe."""
    urls: queue.Queue[str | None] = queue.Queue()
    said: deque[str] = deque(maxlen=_LINES_KEPT)

    def read() -> None:
        assert server.stderr is not None
        with contextlib.suppress(ValueError):  # closed while it reads
            for line in server.stderr:
                said.append(line.rstrip())
                if found := READY.search(line):
                    urls.put(found[1])
        urls.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        url = urls.get(timeout=timeout_s)
    except queue.Empty:
        raise PageBrainError(f"pagebrain serve was not ready after {timeout_s:g} s; {_last(said)}") from None
    if url is None:
        raise PageBrainError(f"pagebrain serve ended with exit status {server.wait()} before it was ready; {_last(said)}")
    return url


def _last(said: Sequence[str]) -> str:
    lines = [line for line in said if line.strip()]
    return f"it said: {lines[-1]}" if lines else "it said nothing"


def _stop(server: "subprocess.Popen[str]") -> None:
    """Ask it to end, then make it; then end whatever is left of its process group."""
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux, what makes the kernel end the child when this process dies, even by SIGKILL; elsewhere nothing does."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1  # loaded here: after the fork, only the call is safe

    def ask_kernel() -> None:
        prctl(set_parent_death_signal, signal.SIGTERM)

    return ask_kernel
