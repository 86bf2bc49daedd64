"""The server's life: start the engine, serve, and end in an orderly way, whoever asks for it.

SIGTERM and SIGINT, or the end of the process that started the server, let requests under way finish. The end of the engine's
process fails them at once, and ends the server with a status that a supervisor sees.
"""

import asyncio
import contextlib
import ipaddress
import logging
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
from pagebrain.server.app import create_app
from pagebrain.server.client import EngineClient
from pagebrain.server.logs import configure_logging
from pagebrain.server.options import ServerOptions

logger = logging.getLogger(__name__)

ENGINE_DIED = 70
"""Exit status when the engine's process ended by itself; sysexits.h calls it an internal software error."""

GRACE_S = 2.0
"""How long ``/health`` says 503 before a server without an engine ends, and how long last answers have to go out."""

PARENT_CHECK_S = 0.5

UNSENT_S = 90
"""The system drops a connection whose client takes nothing for so long; ``sse.py`` has given the client up by then."""


def serve(config: PageBrainConfig, options: ServerOptions) -> int:
    """Serve until told to end; returns the exit status.

    Raises ``ConfigError``, ``ModelLoadError`` or ``PartError`` before anything is served.
    """
    configure_logging(options.log_level, options.log_requests)
    _allow_many_connections()
    listener = listen(options.host, options.port)
    try:
        return _run(_Life(config, options, listener).live())
    finally:
        listener.close()


def _run(life: Coroutine[Any, Any, int]) -> int:
    """On uvloop's event loop where there is one: it takes less time per event sent."""
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.run(life)
    return int(uvloop.run(life))


def _allow_many_connections() -> None:
    """Each takes a file descriptor, and the usual soft limit of 1024 is soon reached."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit below what it calls unlimited
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; made before the model is loaded, since it is quicker to fail. Raises ``ConfigError``."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--host {host!r} is no address of this machine: {error.strerror}") from error
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNSENT_S)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; name another --port") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a listening socket can be reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


class _Server(uvicorn.Server):
    """uvicorn's, which leaves the signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Life:
    def __init__(self, config: PageBrainConfig, options: ServerOptions, listener: socket.socket) -> None:
        self.options = options
        self.listener = listener
        self.client = EngineClient(config, options)
        self.server: _Server | None = None
        self.status = 0
        self._ending: asyncio.Task[None] | None = None
        self._parent = os.getppid()

    async def live(self) -> int:
        self._catch_signals()
        main = asyncio.current_task()
        assert main is not None
        self._starting: asyncio.Task[None] | None = main
        watch = asyncio.create_task(self._watch_parent()) if _belongs_to_parent() else None
        try:
            await self.client.start()
            self._starting = None
            self.server = self._make_server()
            self._announce()
            if not self.client.is_alive:  # already again
                self._engine_died()
            await self.server.serve(sockets=[self.listener])
        except asyncio.CancelledError:
            if self._starting is None:
                raise
            return 0  # told to end while the model was loading
        finally:
            if watch is not None:
                watch.cancel()
            await self.client.stop()
        return self.status

    def _make_server(self) -> _Server:
        self.client.on_dead = self._engine_died
        return _Server(
            uvicorn.Config(
                create_app(self.client, self.options),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=int(GRACE_S),
            )
        )

    def _announce(self) -> None:
        config, client = self.client.config, self.client
        for notice in client.notices:
            _say(notice)
        if self.options.api_key is None and not is_loopback(self.listener):
            _say("warning: everybody who can reach this machine may use the server: set --api-key or PAGEBRAIN_API_KEY")
        _say(
            f"{config.dtype} on {config.device}, {config.num_blocks} blocks of {config.block_size} tokens, at most "
            f"{config.max_num_seqs} sequences at a time"
        )
        _say(f"serving {self.options.served_model_name} at {url_of(self.listener)}")

    # Endings ----------------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                loop.add_signal_handler(number, self.end, signal.Signals(number).name)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda got, _: loop.call_soon_threadsafe(self.end, signal.Signals(got).name))

    def end(self, why: str) -> None:
        """Begin to end; told a second time, do not wait for anybody."""
        if self._starting is not None:
            self._starting.cancel()
        elif self._ending is None:
            self._ending = asyncio.create_task(self._drain(why))
        else:
            self.client.abort_all()

    async def _drain(self, why: str) -> None:
        self.client.begin_drain()
        if self.client.num_streams:
            _say(f"{why}: finishing {self.client.num_streams} requests, for {self.options.drain_s:g} seconds at most")
        until = time.monotonic() + self.options.drain_s
        while self.client.num_streams and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.client.abort_all()
        self._stop_serving()

    def _engine_died(self) -> None:
        _say(f"error: the engine has stopped: {self.client.failure}")
        self.status = ENGINE_DIED
        asyncio.get_running_loop().call_later(GRACE_S, self._stop_serving)

    def _stop_serving(self) -> None:
        self.client.end_subscriptions()
        if self.server is not None:
            self.server.should_exit = True

    async def _watch_parent(self) -> None:
        """A server must not outlive whoever started it, unless it was meant to."""
        while os.getppid() == self._parent:
            await asyncio.sleep(PARENT_CHECK_S)
        self.end("the process that started the server has gone")


def _belongs_to_parent() -> bool:
    """Whether the server's parent answers for it: not if it is init's child, leads a session, or was told to ignore hangups.

    ``setsid`` and ``nohup`` are how a process is meant to outlive the one that started it.
    """
    if os.name != "posix" or os.getppid() <= 1:
        return False
    return os.getsid(0) != os.getpid() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def _say(line: str) -> None:
    print(f"pagebrain: {line}", file=sys.stderr, flush=True)
