"""Reads the body of a request before the API sees it, within limits of time, length and memory.

:func:`refuse` refuses a request whose body may still be arriving. The guards of ``requests_guard.py`` use it too.
"""

import asyncio
import time
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagebrain.server.error_responses import ApiError, error_response

BODY_TIMEOUT_S = 30.0
"""Time for a body to arrive."""

MAX_BODIES = 16
"""All bodies in memory together have at most ``MAX_BODIES * max_bytes`` bytes."""


class BodyGuard:
    """Reads the body, within limits, and then calls the app, which gets the body in one piece.

    The body is not read inside the app's ``receive``, because the framework would handle an exception from there in its own
    way. The request's time of arrival is that of its last byte: ``request.state.arrival_s``, ``time.monotonic`` seconds.

    Args:
        max_bytes: length of the longest body.
        timeout_s: seconds for a body to arrive.

    Attributes:
        num_bytes: sum over all bodies that are being read, or whose answer has not begun.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.num_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"] in ("GET", "HEAD", "OPTIONS") and not announces_body(scope)):
            await self.app(scope, receive, send)
            return
        hold = _Hold(self)
        try:
            body: bytes | ApiError | None = self._check_length(scope)
            if body is None:
                body = await self._read_in_time(receive, hold)
            if isinstance(body, bytes):
                scope.setdefault("state", {})["arrival_s"] = time.monotonic()
                replay, body = _replay(body, receive), None  # no reference stays here, so that the app can free the body
                await self.app(scope, replay, hold.until_answered(send))
        finally:
            hold.release()
        if isinstance(body, ApiError):
            await refuse(body, scope, receive, send)

    def _check_length(self, scope: Scope) -> ApiError | None:
        lengths = {value.strip() for name, value in scope["headers"] if name == b"content-length"}
        if not lengths:
            return None
        length = lengths.pop()
        if lengths or not length.isdigit() or header(scope, b"transfer-encoding") is not None:
            message = "the body's length must be given once, by a Content-Length that is a number or by chunks"
            return ApiError(400, message, code="invalid_content_length")
        # Digits are counted first, because Python refuses to convert a number with thousands of them.
        if len(length) > 18 or int(length) > self.max_bytes:
            return self._too_long()
        return None

    async def _read_in_time(self, receive: Receive, hold: "_Hold") -> bytes | ApiError | None:
        try:
            return await asyncio.wait_for(self._read(receive, hold), self.timeout_s)
        except asyncio.TimeoutError:
            return ApiError(408, f"the body did not arrive within {self.timeout_s:g} seconds", code="request_timeout")

    async def _read(self, receive: Receive, hold: "_Hold") -> bytes | ApiError | None:
        """The whole body, the refusal, or ``None`` if the client has disconnected."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            piece = message.get("body", b"")
            body += piece
            hold.add(len(piece))
            if len(body) > self.max_bytes:
                return self._too_long()
            if self.num_bytes > MAX_BODIES * self.max_bytes:
                busy = "the bodies of other requests use all the memory for bodies: try again later"
                return ApiError(503, busy, code="server_busy", headers={"Retry-After": "1"})
            if not message.get("more_body", False):
                return bytes(body)

    def _too_long(self) -> ApiError:
        message = f"the body is longer than {self.max_bytes} bytes: shorten it, or start the server with --max-body-bytes"
        return ApiError(413, message)


class _Hold:
    """The part of ``guard.num_bytes`` that belongs to one body."""

    def __init__(self, guard: BodyGuard) -> None:
        self._guard = guard
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count bytes that have arrived."""
        self._num_bytes += num_bytes
        self._guard.num_bytes += num_bytes

    def release(self) -> None:
        """Stop counting the body. May be called twice."""
        self._guard.num_bytes -= self._num_bytes
        self._num_bytes = 0

    def until_answered(self, send: Send) -> Send:
        """A ``send`` that releases the body with the first message: a stream may last long after its request was read."""

        def send_on(message: Message) -> Awaitable[None]:
            self.release()
            return send(message)

        return send_on


async def refuse(refusal: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error. If a body was announced, the connection is then closed without waiting for the rest of it."""
    response = error_response(refusal)
    if announces_body(scope):
        response.headers["Connection"] = "close"
    await response(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that returns the body first, and then what ``receive`` returns."""
    left: bytes | None = body

    async def replay() -> Message:
        nonlocal left
        if left is None:
            return await receive()
        whole, left = left, None
        return {"type": "http.request", "body": whole, "more_body": False}

    return replay


def header(scope: Scope, name: bytes) -> bytes | None:
    """The value of the first header with this name (in lower case)."""
    value: bytes | None = next((value for key, value in scope["headers"] if key == name), None)
    return value


def announces_body(scope: Scope) -> bool:
    """Whether the headers announce a body."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
        for name, value in scope["headers"]
    )
