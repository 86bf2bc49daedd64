"""The server under test, seen from outside: where it is, what it says of itself; and ``--launch``, which starts one.

Plain blocking requests before and after a run. The load itself is sent by :mod:`~pagebrain.bench.serve.http_client`.
"""

import argparse
import contextlib
import ctypes
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from pagebrain.bench.serve.measurements import error_message
from pagebrain.errors import ConfigError, PageBrainError

_TIMEOUT_S = 30.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy in between would be measured too


@dataclass(frozen=True)
class Target:
    """An OpenAI-compatible server. ``url`` is its root, without ``/v1``; ``api_key`` is sent as a bearer token."""

    url: str
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None) -> "Target":
        """Check ``url`` and cut what does not belong to its root. Raises ``ConfigError``."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"--url must look like http://127.0.0.1:8000, got {url!r}")
        return cls(url.rstrip("/").removesuffix("/v1"), api_key)

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, by its name."""
        return urllib.parse.urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def find_model(self, name: str | None) -> dict[str, Any]:
        """The entry of ``GET /v1/models`` for ``name``, or the first. Raises ``PageBrainError`` if there is none."""
        payload = self._get("/v1/models")
        models = payload.get("data") if isinstance(payload, dict) else None
        if not isinstance(models, list) or not all(isinstance(entry, dict) and "id" in entry for entry in models):
            raise PageBrainError(f"{self.url}/v1/models gave no list of models: is this an OpenAI-compatible server?")
        if name is None and models:
            return dict(models[0])
        for entry in models:
            if entry["id"] == name:
                return dict(entry)
        served = ", ".join(str(entry["id"]) for entry in models) or "no model"
        raise PageBrainError(f"{self.url} serves {served}" + ("" if name is None else f", not {name}"))

    def version(self) -> Any:
        """What ``GET /version`` says, or ``None`` where there is none."""
        try:
            return self._get("/version")
        except PageBrainError:
            return None

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers=self.headers)
        try:
            with _OPENER.open(request, timeout=_TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                reason = "check --api-key or PAGEBRAIN_API_KEY"
            else:
                reason = _said(error)
            raise PageBrainError(f"{self.url}{path} answered {error.code}: {reason}") from None
        except (OSError, HTTPException) as error:
            reason = str(getattr(error, "reason", error))
            advice = "start one with pagebrain serve, or say where it is with --url"
            raise PageBrainError(f"no server answers at {self.url}: {reason}; {advice}") from None
        except ValueError:
            raise PageBrainError(f"{self.url}{path} gave no JSON: is this an OpenAI-compatible server?") from None


def _said(error: urllib.error.HTTPError) -> str:
    """The message in the body of an error, or the status line's."""
    try:
        return error_message(json.loads(error.read()))
    except (ValueError, OSError, HTTPException):
        return str(error.reason)


READY = re.compile(r"serving .+ at (https?://\S+)")
"""The line of ``pagebrain serve`` that says it accepts requests, and where."""

_STOP_TIMEOUT_S = 20.0
_LINES_KEPT = 20


def parse_launch(text: str) -> tuple[list[str], dict[str, Any]]:
    """The arguments for ``pagebrain serve``, and those of them that shape the engine, as keyword arguments for ``LLM``.

    Raises ``ConfigError``; the options that only a server has are left to the server to check.
    """
    from pagebrain.cli.arguments import add_engine_arguments, engine_settings
    from pagebrain.cli.frame import OneLineParser

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
    """The URL from the server's own line. A thread goes on reading, because a full pipe would block the server."""
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
    """Send SIGTERM and wait; then kill what is left of its process group."""
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
