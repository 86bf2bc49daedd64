"""What a body must pass before the API sees it: it comes in time, it is not too long, and not too many come at once.

Also how a request is refused while its body may still be coming, which the other guards need as well: ``guards.py`` puts
them around the app.
"""

import asyncio
import time
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagebrain.server.error_responses import ApiError, error_response

BODY_TIMEOUT_S = 30.0
"""How long a body may take to arrive."""

MAX_BODIES = 16
"""Longest bodies that may be in memory at a time; shorter ones, as many as are together no longer."""


class BodyGuard:
    """Reads the body, within limits, before the app is called; the app then gets it in one piece.

    Reading here rather than inside the app's ``receive`` is what makes the answers sure: an exception from there would pass
    through the framework's own handling of bad bodies. The app needs the whole body before it can begin anyway, so that is
    when a request has arrived: ``request.state.arrival_s``, in ``time.monotonic`` seconds.

    Args:
        max_bytes: longest body.
        timeout_s: seconds that a body may take.

    Attributes:
        num_bytes: of all bodies that are being read, or are in the hands of an app that has not begun to answer.
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
                replay, body = _replay(body, receive), None  # whoever reads it has the only copy
                await self.app(scope, replay, hold.until_answered(send))
        finally:
            hold.release()
        if isinstance(body, ApiError):
            await refuse(body, scope, receive, send)
        # Otherwise, without a body, the client is gone, and nobody is left to answer.

    def _check_length(self, scope: Scope) -> ApiError | None:
        lengths = {value.strip() for name, value in scope["headers"] if name == b"content-length"}
        if not lengths:
            return None
        length = lengths.pop()
        if lengths or not length.isdigit() or header(scope, b"transfer-encoding") is not None:
            message = "the body's length must be given once, by a Content-Length that is a number or by chunks"
            return ApiError(400, message, code="invalid_content_length")
        # The number of digits first: Python refuses to convert thousands of them.
        if len(length) > 18 or int(length) > self.max_bytes:
            return self._too_long()
        return None

    async def _read_in_time(self, receive: Receive, hold: "_Hold") -> bytes | ApiError | None:
        try:
            return await asyncio.wait_for(self._read(receive, hold), self.timeout_s)
        except asyncio.TimeoutError:
            return ApiError(408, f"the body did not arrive within {self.timeout_s:g} seconds", code="request_timeout")

    async def _read(self, receive: Receive, hold: "_Hold") -> bytes | ApiError | None:
        """The whole body; ``None`` if the client went away."""
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
                busy = "the bodies of other requests take up all the room there is for them: try again later"
                return ApiError(503, busy, code="server_busy", headers={"Retry-After": "1"})
            if not message.get("more_body", False):
                return bytes(body)

    def _too_long(self) -> ApiError:
        message = f"the body is longer than {self.max_bytes} bytes: shorten it, or start the server with --max-body-bytes"
        return ApiError(413, message)


class _Hold:
    """What one body takes of the room for all."""

    def __init__(self, guard: BodyGuard) -> None:
        self._guard = guard
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """So much more has come."""
        self._num_bytes += num_bytes
        self._guard.num_bytes += num_bytes

    def release(self) -> None:
        """It is no longer needed. May be called twice."""
        self._guard.num_bytes -= self._num_bytes
        self._num_bytes = 0

    def until_answered(self, send: Send) -> Send:
        """A ``send`` that releases it with the first thing sent: a stream may go on for long after its request was read."""

        def send_on(message: Message) -> Awaitable[None]:
            self.release()
            return send(message)

        return send_on


async def refuse(refusal: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse. Then the connection is closed if a body was announced: the rest of it is not waited for."""
    response = error_response(refusal)
    if announces_body(scope):
        response.headers["Connection"] = "close"
    await response(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body first; after it whatever comes, such as the news that the client has gone."""
    left: bytes | None = body

    async def replay() -> Message:
        nonlocal left
        if left is None:
            return await receive()
        whole, left = left, None
        return {"type": "http.request", "body": whole, "more_body": False}

    return replay


def header(scope: Scope, name: bytes) -> bytes | None:
    """The value of a request's header, the first one if there are several; the name in lower case."""
    value: bytes | None = next((value for key, value in scope["headers"] if key == name), None)
    return value


def announces_body(scope: Scope) -> bool:
    """Whether a body follows the headers."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
        for name, value in scope["headers"]
    )
