"""The server under test: its address, its model and version; and ``--launch``, which starts one.

Requests here are blocking and are sent before and after a run. :mod:`~pagebrain.bench.serve.http_client` sends the load.
"""

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

from pagebrain.bench.child import child_environment
from pagebrain.bench.serve.measurements import error_message
from pagebrain.errors import ConfigError, PageBrainError

_TIMEOUT_S = 30.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without proxies, as the load is sent


@dataclass(frozen=True)
class Target:
    """An OpenAI-compatible server. ``url`` is its root, without ``/v1``; ``api_key`` is sent as a bearer token."""

    url: str
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None) -> "Target":
        """Check ``url`` and reduce it to its root. Raises ``ConfigError``."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"--url must look like http://127.0.0.1:8000, got {url!r}")
        return cls(url.rstrip("/").removesuffix("/v1"), api_key)

    @property
    def is_local(self) -> bool:
        """Whether the host's name means this machine."""
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
        """The answer to ``GET /version``, or ``None`` if there is none."""
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
            reason = "check --api-key or PAGEBRAIN_API_KEY" if error.code in (401, 403) else _said(error)
            raise PageBrainError(f"{self.url}{path} answered {error.code}: {reason}") from None
        except (OSError, HTTPException) as error:
            reason = str(getattr(error, "reason", error))
            advice = "start one with pagebrain serve, or give its URL with --url"
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
"""The line of ``pagebrain serve`` that announces its URL; then it accepts requests."""

_STOP_TIMEOUT_S = 20.0
_LINES_KEPT = 20


def parse_launch(text: str) -> list[str]:
    """The arguments for ``pagebrain serve``. Raises ``ConfigError`` for those that the bench itself sets."""
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
    return arguments


@contextlib.contextmanager
def launched(
    arguments: Sequence[str],
    *,
    api_key: str | None = None,
    threads: int | None = None,
    ready_timeout_s: float = 900.0,
    command: Sequence[str] = (sys.executable, "-m", "pagebrain", "serve"),
) -> Iterator[str]:
    """Start a server and yield its URL. At the end of the block, the server and all its processes are ended.

    Raises ``PageBrainError`` with the server's last line if it ends, or is not ready in time.
    """
    server = subprocess.Popen(
        [*command, *arguments, "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=_environment(api_key, threads),
        start_new_session=True,  # a process group of its own: Ctrl-C ends this process, which then ends the server
        preexec_fn=_end_with_parent(),
    )
    try:
        yield _wait_until_ready(server, ready_timeout_s)
    finally:
        _stop(server)


def _environment(api_key: str | None, threads: int | None) -> dict[str, str]:
    environment = child_environment(threads) | {"PYTHONUNBUFFERED": "1"}
    return environment | ({} if api_key is None else {"PAGEBRAIN_API_KEY": api_key})


def _wait_until_ready(server: "subprocess.Popen[str]", timeout_s: float) -> str:
    """The URL from the server's line. A thread continues to read, because a full pipe would block the server."""
    urls: queue.Queue[str | None] = queue.Queue()
    said: deque[str] = deque(maxlen=_LINES_KEPT)

    def read() -> None:
        assert server.stderr is not None
        with contextlib.suppress(ValueError):  # the pipe was closed during the read
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
    """Send SIGTERM and wait; then kill the rest of its process group."""
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux, a function that makes the kernel end the child when this process dies, even by SIGKILL; else ``None``."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1  # loaded before the fork; after it, only the call is safe

    def ask_kernel() -> None:
        prctl(set_parent_death_signal, signal.SIGTERM)

    return ask_kernel
