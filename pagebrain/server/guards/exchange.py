"""One request and its answer: ASGI's ``receive`` and ``send`` for the application, and the answer written as HTTP.

An answer of unknown length is sent in chunks, or to an HTTP/1.0 client without chunks until the connection closes.
:mod:`pagebrain.server.guards.connections` sends the bytes and detects lost clients.
"""

import asyncio
import http
import logging
import re
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Scope

from pagebrain.server.error_responses import ApiError, error_response
from pagebrain.server.guards.request_parser import RequestHead

logger = logging.getLogger(__name__)

MAX_EARLY_ZEROS = 8
"""Most zeros before a chunk's size. Some parsers read at most sixteen digits."""

_NOT_IN_A_HEADER = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class Line(Protocol):
    """What an exchange calls on its connection."""

    def write(self, data: bytes) -> None:
        """Send without waiting."""

    async def drained(self) -> None:
        """Wait until the write buffer is almost empty, or the connection is closed."""

    def on_body_read(self) -> None:
        """The application has read a piece of the body."""

    def on_answered(self, exchange: "Exchange") -> None:
        """The answer is complete."""

    def cut(self) -> None:
        """Close, because the answer cannot be completed. The client sees an incomplete answer."""


class Exchange:
    """A request and its answer.

    Attributes:
        keeps_alive: the connection may be used again. May be set to false until the answer begins.
        is_whole: the request is complete.
        has_begun, is_answered: the answer has begun, is complete.
        is_gone: the client has disconnected, or the request will be refused.
        body: bytes of the request's body that the application has not read.
    """

    def __init__(
        self, line: Line, head: RequestHead, scope: Scope, app: ASGIApp, default_headers: list[tuple[bytes, bytes]]
    ) -> None:
        self.keeps_alive = head.keeps_alive
        self.is_whole = False
        self.has_begun = False
        self.is_answered = False
        self.is_gone = False
        self.body = bytearray()
        self._line = line
        self._scope = scope
        self._app = app
        self._default_headers = default_headers
        self._version = b"HTTP/" + head.version.encode()
        self._is_head = head.method == "HEAD"
        self._waits_for_continue = head.version == "1.1" and any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in head.headers
        )
        self._was_read = False
        self._news = asyncio.Event()
        self._num_early = 0
        self._is_chunked = False
        self._num_left: int | None = None  # bytes of the answer still to send; None if its length is unknown

    async def run(self) -> None:
        """Call the application. Its errors are logged; after the client has disconnected only at level debug."""
        try:
            await self._app(self._scope, self.receive, self.send)
            if not self.is_answered and not self.is_gone:
                raise RuntimeError("the application returned before its answer was complete")
        except asyncio.CancelledError:  # the server shuts down
            self._line.cut()
            raise
        except Exception as error:
            if self.is_gone:
                logger.debug("a request failed after its client had disconnected", exc_info=error)
            elif self.has_begun:
                logger.error("an answer failed after it had begun", exc_info=error)
                self._line.cut()
            else:
                await error_response(error)(self._scope, self.receive, self.send)

    # The request ------------------------------------------------------------------------------------------------------

    def add_body(self, piece: bytes) -> None:
        """A piece of the body has arrived."""
        self.body += piece
        self._news.set()

    def end_request(self) -> None:
        """The request is complete."""
        self.is_whole = True
        self._news.set()

    def leave(self) -> None:
        """The client has disconnected, or its request is broken and will be refused."""
        self.is_gone = True
        self._news.set()

    async def receive(self) -> Message:
        """ASGI's ``receive``: the next piece of the body, or ``http.disconnect``."""
        if self._waits_for_continue and not (self.has_begun or self.is_whole or self.body):
            self._line.write(self._version + b" 100 Continue\r\n\r\n")
        self._waits_for_continue = False
        while not (self.is_gone or self.is_answered or self.body or (self.is_whole and not self._was_read)):
            self._news.clear()
            await self._news.wait()
        if self.is_gone or self.is_answered:
            return {"type": "http.disconnect"}
        piece, self.body = bytes(self.body), bytearray()
        self._was_read = self.is_whole
        self._line.on_body_read()
        return {"type": "http.request", "body": piece, "more_body": not self.is_whole}

    # The answer -------------------------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """ASGI's ``send``: send a piece of the answer and wait for :meth:`Line.drained`. No effect if the client is gone."""
        if self.is_gone:
            return
        if not self.has_begun and message["type"] == "http.response.start":
            self._begin(message["status"], list(message.get("headers", [])))
        elif self.has_begun and not self.is_answered and message["type"] == "http.response.body":
            self._go_on(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"the application sent {message['type']} out of order")
        await self._line.drained()

    def early_byte(self) -> bytes:
        """The next byte that every answer has in common; empty if there is none."""
        certain = b""
        if not self.has_begun:
            certain = self._version + b" "
        elif self._is_chunked and not self.is_answered:
            certain = b"0" * MAX_EARLY_ZEROS
        byte = certain[self._num_early : self._num_early + 1]
        self._num_early += len(byte)
        return byte

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._num_left = None
        for name, value in headers:
            if _NOT_IN_A_HEADER.search(name + value):
                raise RuntimeError(f"the answer's header {name!r} holds a control character")
            if name.lower() == b"content-length":
                self._num_left = int(value)
            elif name.lower() == b"connection" and b"close" in value.lower():
                self.keeps_alive = False
        headers = self._default_headers + [header for header in headers if header[0].lower() != b"connection"]
        if self._is_head or status in (204, 304):
            self._num_left = 0
        elif self._num_left is None:
            self._is_chunked = self._version == b"HTTP/1.1"
            self.keeps_alive = self.keeps_alive and self._is_chunked
        if self._is_chunked:
            headers.append((b"transfer-encoding", b"chunked"))
        if not self.keeps_alive:
            headers.append((b"connection", b"close"))
        elif self._version == b"HTTP/1.0":
            headers.append((b"connection", b"keep-alive"))
        lines = [b"%b %d %b" % (self._version, status, _phrase(status)), *(b"%b: %b" % header for header in headers)]
        self._write(b"\r\n".join([*lines, b"", b""])[self._num_early :])
        self.has_begun = True

    def _go_on(self, body: bytes, is_more: bool) -> None:
        if self._is_head:
            body = b""
        if self._num_left is not None:
            if len(body) > self._num_left or (len(body) < self._num_left and not is_more):
                raise RuntimeError(f"the application sent {len(body)} bytes, but {self._num_left} were left to send")
            self._num_left -= len(body)
        if self._is_chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if is_more else b"0\r\n\r\n")
        if body:
            self._write(body)
        if not is_more:
            self.is_answered = True
            self._news.set()
            self._line.on_answered(self)

    def _write(self, data: bytes) -> None:
        self._num_early = 0
        self._line.write(data)


def refusing(refusal: ApiError) -> ASGIApp:
    """An application that answers every request with ``refusal``."""

    async def refuse(scope: Scope, receive: Any, send: Any) -> None:
        await error_response(refusal)(scope, receive, send)

    return refuse


def _phrase(status: int) -> bytes:
    try:
        return http.HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""
