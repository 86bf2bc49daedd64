"""Starts the engine process, serves, and ends both processes.

After SIGTERM or SIGINT, or when the process that started the server has ended, the server drains: requests under way finish.
If the engine process ends, requests fail at once, and the server ends with exit status 70.
"""

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import uvicorn

from pagebrain.config import PageBrainConfig
from pagebrain.errors import ConfigError
from pagebrain.machine import allow_many_connections
from pagebrain.server.api.app import create_app
from pagebrain.server.api.templates import own_template
from pagebrain.server.guards.connections import HttpConnection
from pagebrain.server.link.client import EngineClient
from pagebrain.server.link.handle import EngineDeadError
from pagebrain.server.link.messages import settle_memory
from pagebrain.server.link.process import EngineProcess
from pagebrain.server.logs import configure_logging
from pagebrain.server.options import ServerOptions
from pagebrain.standard_streams import queue_output

ENGINE_DIED = 70
"""Exit status if the engine process ended by itself: "internal software error" in sysexits.h."""

GRACE_S = 2.0
"""Time in which ``/health`` answers 503 before a server without an engine ends. Also the time for the last answers."""

PARENT_CHECK_S = 0.5

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that end the server."""

UNSENT_S = 90
"""The system drops a connection whose client receives nothing for this time; ``connections.py`` usually does so earlier."""


def serve(config: PageBrainConfig, options: ServerOptions, parent: int | None = None) -> int:
    """Serve until the server is told to end. Returns the exit status.

    ``parent``: id of the process that started this one; it may have ended already. By default ``os.getppid()``.

    Raises ``ConfigError``, ``ModelLoadError`` or ``PartError`` before anything is served.
    """
    listener = listen(options.host, options.port)
    queue_output()
    configure_logging(options.log_level, options.log_requests)
    allow_many_connections()
    try:
        return _run(_Life(config, options, listener, parent or os.getppid()).live())
    finally:
        listener.close()


def _run(life: Coroutine[Any, Any, int]) -> int:
    """Run on uvloop's event loop if it is installed: it takes less time for each event sent."""
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.run(life)
    return int(uvloop.run(life))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Called before the model is loaded, so that a mistake shows early. Raises ``ConfigError``."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--host {host!r} is not an address of this machine: {error.strerror}") from error
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNSENT_S)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}: choose another --port") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Life:
    def __init__(self, config: PageBrainConfig, options: ServerOptions, listener: socket.socket, parent: int) -> None:
        self.options = options
        self.listener = listener
        self.parent = parent
        self.client = EngineClient(EngineProcess(config, options.log_level), options)
        self.server: _Server | None = None
        self.status = 0
        self._starting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    async def live(self) -> int:
        self._catch_signals()
        watch = asyncio.create_task(self._watch_parent()) if _belongs_to(self.parent) else None
        self._starting = asyncio.create_task(self.client.start())
        try:
            await self._starting
            self._starting = None
            self.server = self._make_server()
            settle_memory()
            self._announce()
            if not self.client.is_alive:  # the engine process ended before on_failure was set
                self._engine_died()
            await self.server.serve(sockets=[self.listener])
        except asyncio.CancelledError:  # told to end while the model was loading
            return 0
        except EngineDeadError as error:  # while the model was loading
            _say(f"error: {error}")
            return ENGINE_DIED
        finally:
            if watch is not None:
                watch.cancel()
            await self.client.stop()
            _ignore_signals()
        return self.status

    def _make_server(self) -> _Server:
        self.client.on_failure = self._engine_died
        return _Server(
            uvicorn.Config(
                create_app(self.client, self.options),
                log_config=None,
                access_log=False,
                http=HttpConnection,
                timeout_keep_alive=self.options.keep_alive_s,  # type: ignore[arg-type]
                lifespan="off",
                ws="none",
                forwarded_allow_ips=list(self.options.forwarded_allow_ips),  # uvicorn's default is 127.0.0.1
                timeout_graceful_shutdown=int(GRACE_S),
            )
        )

    def _announce(self) -> None:
        config, client = self.client.config, self.client
        for notice in client.handle.notices:
            _say(notice)
        _, why_no_chats = own_template(client.tokenizer)
        if why_no_chats is not None and self.options.chat_template is None:
            _say(f"chats are refused: {why_no_chats}; name a template with --chat-template")
        if self.options.api_key is None and not is_loopback(self.listener):
            _say("warning: every client that can reach this machine may use the server: set --api-key or PAGEBRAIN_API_KEY")
        _say(
            f"{config.dtype} on {config.device}, {config.num_blocks} blocks of {config.block_size} tokens, at most "
            f"{config.max_num_seqs} sequences at a time"
        )
        _say(f"serving {self.options.served_model_name} at {url_of(self.listener)}")

    # Shutdown ---------------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        """Catch signals without the event loop's handlers: these go when it closes, and a late signal would then kill."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            signal.signal(number, lambda got, _: loop.call_soon_threadsafe(self._told_to_end, signal.Signals(got).name))

    def _told_to_end(self, name: str) -> None:
        """Handle a signal. The first one drains, the second one aborts all requests."""
        if self._draining is None:
            self._begin_to_end(name)
        else:
            self.client.abort_all()

    def _begin_to_end(self, why: str) -> None:
        if self._starting is not None:
            _say(f"{why}: ending before the model is loaded")
            starting, self._starting = self._starting, None
            starting.cancel()
        elif self._draining is None:
            self._draining = asyncio.create_task(self._drain(why))

    async def _drain(self, why: str) -> None:
        """Wait, at most ``drain_s``, until all requests are computed and all answers are sent. Then stop serving."""
        self.client.begin_drain()
        num_streams = self.client.num_streams
        if num_streams:
            requests = "1 request" if num_streams == 1 else f"{num_streams} requests"
            _say(f"{why}: finishing {requests}, for {self.options.drain_s:g} seconds at most")
        else:
            _say(f"{why}: ending, with no request under way")
        until = time.monotonic() + self.options.drain_s
        while self._is_at_work() and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.client.abort_all()
        self._stop_serving()

    def _is_at_work(self) -> bool:
        if self.client.num_streams:
            return True
        self.client.end_subscriptions()  # a live feed would never end by itself
        return self.server is not None and bool(self.server.server_state.tasks)

    def _engine_died(self) -> None:
        self.status = ENGINE_DIED
        _say(f"error: the engine has stopped: {self.client.failure}")
        asyncio.get_running_loop().call_later(GRACE_S, self._stop_serving)

    def _stop_serving(self) -> None:
        self.client.end_subscriptions()
        if self.server is not None:
            self.server.should_exit = True

    async def _watch_parent(self) -> None:
        """End the server when its parent process has ended."""
        while os.getppid() == self.parent:
            await asyncio.sleep(PARENT_CHECK_S)
        self._begin_to_end("the process that started the server has gone")


def _belongs_to(parent: int) -> bool:
    """Whether the server ends with its parent: not if that is init, or if ``setsid`` or ``nohup`` started the server."""
    if os.name != "posix" or parent <= 1:
        return False
    return os.getsid(0) != os.getpid() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def _ignore_signals() -> None:
    """Keep a late signal from changing the exit status."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _say(line: str) -> None:
    """Print a line to stderr. Never blocks or fails, see :func:`pagebrain.standard_streams.queue_output`."""
    print(f"pagebrain: {line}", file=sys.stderr, flush=True)
