"""A client's connection, in place of uvicorn's own class: deadlines, pipelined requests, and detection of lost clients.

``request_parser.py`` reads the bytes as HTTP, ``exchange.py`` writes the answer. No act of a client is logged above the
level ``info``.

A client that has closed its sending side may still read. The server can only find out by sending: if the client is gone, its
system answers any byte with a reset. So bytes that every answer has in common are sent early, one at a time.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Any

from starlette.types import ASGIApp, Scope
from uvicorn import Config
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from pagebrain.server.error_responses import ApiError
from pagebrain.server.guards.exchange import Exchange, refusing
from pagebrain.server.guards.request_parser import RequestHead, RequestParser
from pagebrain.server.guards.sockets import is_readable, num_unsent, reset

logger = logging.getLogger(__name__)

HEADERS_S = 30.0
"""Time for a new connection to begin its first request, and for the headers of any request."""

STALL_S = 60.0
"""A client that receives nothing for this time, while data waits for it, is disconnected."""

LINGER_S = 2.0
"""Time in which the rest of a refused request is still read and discarded."""

MAX_PIPELINED = 16
"""Most requests of a connection that wait while another one is answered."""

MAX_UNREAD_BYTES = 65_536
"""Reading stops while more bytes of bodies than this wait for the application."""

PROBES_S = (0.02, 0.2, 1.0, 3.0, 10.0, 30.0, 60.0)
"""Pauses between the early bytes to a client that may be gone."""


class HttpConnection(asyncio.Protocol):
    """One client's connection. Its requests are answered in order. Passed to uvicorn as ``http``."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        self._app = config.loaded_app
        self._keep_alive_s = config.timeout_keep_alive
        self._server = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_event_loop()
        self._parser = RequestParser(self)
        self._exchanges: deque[Exchange] = deque()  # the first is being answered, the others wait
        self._incoming: Exchange | None = None  # its request's body is still arriving
        self._has_begun_head = False
        self._is_deaf = False  # received data is discarded
        self._is_at_eof = False
        self._is_ending = False  # the server shuts down
        self._is_paused = False
        self._deadline: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._num_written = 0

    # Called by asyncio ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected: wait for its first request."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._server.connections.add(self)  # type: ignore[arg-type]
        self._addresses = {"server": get_local_addr(self._transport), "client": get_remote_addr(self._transport)}
        self._set_deadline(HEADERS_S)

    def data_received(self, data: bytes) -> None:
        """Parse requests, and begin to answer the first."""
        if self._is_deaf or self._transport.is_closing():
            return
        try:
            self._parser.feed(data)
        except ApiError as refusal:
            self._refuse(refusal)

    def eof_received(self) -> bool:
        """The client has closed its sending side; it may still read. Returns whether the connection stays open."""
        self._is_at_eof = True
        if self._incoming is not None:
            self._refuse(ApiError(400, "the body ended before it was complete", code="invalid_http"))
        if not self._exchanges:
            return False
        self._exchanges[-1].keeps_alive = False
        self._try_client()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by either side."""
        self._server.connections.discard(self)
        for timer in (self._deadline, self._probe, self._stall):
            if timer is not None:
                timer.cancel()
        for exchange in self._exchanges:
            exchange.leave()
        self._exchanges.clear()
        self._writable.set()

    def pause_writing(self) -> None:
        """The write buffer is full: begin to watch the client."""
        self._writable.clear()
        self._num_taken, self._taken_s = self._count_taken(), time.monotonic()
        if self._stall is None:
            self._stall = self._loop.call_later(STALL_S / 8, self._watch_client)

    def resume_writing(self) -> None:
        """The write buffer is almost empty."""
        self._writable.set()

    # Called by uvicorn ------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """The server shuts down: the answer under way is the last."""
        self._is_ending = True
        if self._exchanges:
            self._exchanges[0].keeps_alive = False
        else:
            self._transport.close()

    # Called by the parser ---------------------------------------------------------------------------------------------

    def on_request_begun(self) -> None:
        """Set the deadline for the headers. It begins when the requests before this one are answered."""
        if not self._has_begun_head and not self._exchanges:
            self._set_deadline(HEADERS_S)
        self._has_begun_head = True

    def on_request_head(self, head: RequestHead) -> None:
        """Begin to answer a request, or let it wait. Raises ``ApiError`` (429) if too many wait."""
        self._has_begun_head = False
        if len(self._exchanges) > MAX_PIPELINED:
            message = f"more than {MAX_PIPELINED} requests wait on one connection: wait for answers, or open another"
            raise ApiError(429, message, code="too_many_pipelined_requests")
        self._incoming = self._add(head, self._app)

    def on_request_body(self, piece: bytes) -> None:
        """Pass a piece of the body on."""
        if self._incoming is not None and not self._incoming.is_answered:
            self._incoming.add_body(piece)
            self.on_body_read()

    def on_request_end(self) -> None:
        """The request is complete."""
        if self._incoming is not None:
            self._incoming.end_request()
            self._incoming = None

    # Called by exchanges ----------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send without waiting."""
        if not self._transport.is_closing():
            self._num_written += len(data)
            self._transport.write(data)

    async def drained(self) -> None:
        """Wait until the write buffer is almost empty, or the connection is closed."""
        await self._writable.wait()

    def on_body_read(self) -> None:
        """Pause or resume reading, by the bytes that wait for the application."""
        is_full = sum(len(exchange.body) for exchange in self._exchanges) > MAX_UNREAD_BYTES
        if is_full == self._is_paused or self._transport.is_closing():
            return
        self._is_paused = is_full
        if not is_full:
            self._transport.resume_reading()
            return
        self._transport.pause_reading()
        if self._exchanges[0] is not self._incoming:  # without reading, only sending can detect a lost client
            self._try_client()

    def cut(self) -> None:
        """Close after sending what was written."""
        self._transport.close()

    def on_answered(self, exchange: Exchange) -> None:
        """Answer the next request, wait for one, or close."""
        self._server.total_requests += 1
        self._exchanges.popleft()
        if not exchange.keeps_alive or (self._is_at_eof and not self._exchanges):
            self._close()
        elif self._exchanges:
            self._start(self._exchanges[0])
        elif self._has_begun_head:
            self._set_deadline(HEADERS_S)
        else:
            self._set_deadline(self._keep_alive_s)

    # Requests ---------------------------------------------------------------------------------------------------------

    def _add(self, head: RequestHead, app: ASGIApp) -> Exchange:
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "method": head.method,
            "scheme": "http",
            "path": head.path,
            "raw_path": head.raw_path,
            "query_string": head.query,
            "root_path": "",
            "headers": head.headers,
            "state": self._app_state.copy(),
            **self._addresses,
        }
        exchange = Exchange(self, head, scope, app, self._server.default_headers)
        self._exchanges.append(exchange)
        if len(self._exchanges) == 1:
            self._start(exchange)
        return exchange

    def _start(self, exchange: Exchange) -> None:
        self._set_deadline(None)
        task = self._loop.create_task(exchange.run())
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def _refuse(self, refusal: ApiError) -> None:
        """Discard further data, and answer with an error after the answers to the requests before."""
        self._is_deaf = True
        broken, self._incoming = self._incoming, None
        if broken is not None and broken.is_answered:
            self._close()
        elif broken is not None and broken.has_begun:
            broken.keeps_alive = False
            broken.end_request()
        elif broken is not None or not self._exchanges or self._exchanges[-1].keeps_alive:
            if broken is not None:
                broken.leave()
                self._exchanges.pop()
            head = RequestHead("GET", b"/", "/", b"", self._parser.version, [], keeps_alive=False)
            self._add(head, refusing(refusal)).end_request()
        # Otherwise the data follows a request that was announced as the last: it is ignored.

    # Endings ----------------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        """Close after the last answer. Data that still arrives is discarded for a while.

        If the connection were closed at once, the system would answer such data with a reset, and many clients would then
        lose the answer too.
        """
        self._exchanges.clear()
        is_whole = not self._is_deaf and self._incoming is None
        self._is_deaf = True
        if is_whole or self._is_at_eof or self._is_ending or self._transport.is_closing():
            self._transport.close()
            return
        self._transport.write_eof()
        self.on_body_read()
        self._set_deadline(LINGER_S)

    def _set_deadline(self, seconds: float | None) -> None:
        """Close the connection after ``seconds``, unless the deadline is set again; ``None``: no deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self._loop.call_later(seconds, self._close_late)

    def _close_late(self) -> None:
        # On a busy machine a request may have arrived that asyncio has not read yet.
        if self._has_begun_head or self._is_deaf or not is_readable(self._transport):
            self._transport.close()
        else:
            self._set_deadline(HEADERS_S)

    # Lost clients -----------------------------------------------------------------------------------------------------

    def _try_client(self, num_tries: int = 0) -> None:
        """Send an early byte, now and after pauses. If the client is gone, its reset closes the connection."""
        if self._probe is not None:
            self._probe.cancel()
        if not self._exchanges or self._transport.is_closing():
            return
        if not self._transport.get_write_buffer_size() and (byte := self._exchanges[0].early_byte()):
            self.write(byte)
        if num_tries < len(PROBES_S):
            self._probe = self._loop.call_later(PROBES_S[num_tries], self._try_client, num_tries + 1)

    def _watch_client(self) -> None:
        """Disconnect a client that receives nothing for :data:`STALL_S` while data waits for it."""
        self._stall = None
        if self._writable.is_set():
            return
        num_taken, now_s = self._count_taken(), time.monotonic()
        if num_taken > self._num_taken:
            self._num_taken, self._taken_s = num_taken, now_s
        elif now_s - self._taken_s >= STALL_S:
            logger.info("a client received nothing for %g seconds and was disconnected", STALL_S)
            reset(self._transport)
            return
        self._stall = self._loop.call_later(STALL_S / 8, self._watch_client)

    def _count_taken(self) -> int:
        """Bytes that have reached the client's system."""
        return self._num_written - self._transport.get_write_buffer_size() - num_unsent(self._transport)
