"""What a request must pass before the API sees it: the name it calls the server by, its key, its content type, its size.

Plain ASGI middlewares: they cost microseconds and hold no stream up. What they refuse is answered in OpenAI's shape, and
neither the API nor the engine hears of it. What a body means is the API's to judge.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagebrain.server.errors import ApiError, error_response
from pagebrain.server.live import ASSETS
from pagebrain.server.options import ServerOptions

BODY_TIMEOUT_S = 30.0
"""How long a body may take to arrive."""

LINGER_S = 2.0
"""How long the rest of a refused body is still taken and thrown away, see ``_answer``."""

MAX_BODIES = 16
"""Longest bodies that may be in memory at a time; shorter ones, as many as are together no longer."""

_OPEN_PATHS = frozenset({"/health", "/live", *(f"/live/{name}" for name in ASSETS)})
"""What everybody may GET. A list of what needs a key would have holes: a router can be generous about what it takes for
the same path, and Starlette's ignores a newline at the end."""


def add_guards(app: FastAPI, options: ServerOptions, body_timeout_s: float = BODY_TIMEOUT_S) -> None:
    """Put the guards around an app. Called once, before it serves.

    From the outside in: CORS, so that browsers may read errors too; unexpected errors; API key, or the server's name where
    there is no key to protect it; content type; body.
    """
    app.add_middleware(BodyGuard, max_bytes=options.max_body_bytes, timeout_s=body_timeout_s)
    app.add_middleware(HeaderGuard, check=check_content_type)
    if options.api_key is not None:
        app.add_middleware(HeaderGuard, check=KeyCheck(options.api_key))
    elif needs_host_check(options):
        app.add_middleware(HeaderGuard, check=HostCheck(options.cors_origins))
    app.add_middleware(ErrorGuard)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )


class HeaderGuard:
    """Refuses what ``check`` refuses from the headers alone; the body is not read."""

    def __init__(self, app: ASGIApp, check: Callable[[Scope], ApiError | None]) -> None:
        self.app = app
        self.check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None if scope["type"] == "lifespan" else self.check(scope)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _answer(refusal, scope, receive, send)
        else:  # there are no websockets yet; if there ever are, they are not a way around
            await send({"type": "websocket.close", "code": 1008})


class KeyCheck:
    """Lets in who sends ``Authorization: Bearer KEY``, and everybody to ``/health`` and the files of the live page.

    The page itself has to load before somebody can type a key into it; its feed and its controls do need the key.
    """

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def __call__(self, scope: Scope) -> ApiError | None:
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] in _OPEN_PATHS:
            return None
        scheme, _, token = (_header(scope, b"authorization") or b"").partition(b" ")
        # Bytes, because compare_digest takes no text beyond ASCII, and in constant time: an early exit at the first wrong
        # character would let a patient client guess the key character by character.
        if hmac.compare_digest(token.strip(), self._key) and scheme.lower() == b"bearer":
            return None
        message = "this server needs its API key: send the header 'Authorization: Bearer KEY'"
        if token:
            message = "the API key is wrong: send the one that the server was started with"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def needs_host_check(options: ServerOptions) -> bool:
    """Whether nothing but its address protects the server: it has no key, and trusts whoever is on this machine."""
    return options.api_key is None and "*" not in options.cors_origins and _is_local(options.host)


class HostCheck:
    """Lets in who calls the server by an address, or by a name that is this machine's for certain.

    A page may have its own name resolved to 127.0.0.1 once it is loaded ("DNS rebinding"). To the browser the server is then
    the place that the page came from, and neither CORS nor the content type is in the way. But the browser says which name
    it was, and leaving it out is nothing that a page can do.

    Args:
        origins: pages from there may use the server, so their names do no harm.
    """

    def __init__(self, origins: Iterable[str]) -> None:
        self._names = {urlsplit(origin).hostname for origin in origins}

    def __call__(self, scope: Scope) -> ApiError | None:
        for key, value in scope["headers"]:
            if key == b"host" and not self._is_own(value.decode("latin-1")):
                host = ascii(value.decode("latin-1"))[1:-1][:100]
                message = (
                    f"this server is for its own machine, and is not called {host}: use localhost or 127.0.0.1, or start it "
                    f"with --api-key, or with --cors-origin http://HOST for a name that may be used"
                )
                return ApiError(403, message, code="host_not_allowed")
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname  # without the port; in lower case
        except ValueError:  # brackets that are none of IPv6
            return False
        return name is not None and (name in self._names or _is_local(name) or _is_address(name))


def _is_local(name: str) -> bool:
    """Whether a name or an address is this machine's, and nobody else's."""
    name = name.lower().removesuffix(".")
    if _is_address(name):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost" or name.endswith(".localhost")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_content_type(scope: Scope) -> ApiError | None:
    """Refuse a POST whose body does not say that it is JSON.

    A page of any origin can make a browser post a form or plain text without being asked first ("simple" requests); for JSON
    the browser asks, and CORS says no. So this also keeps strange pages from using a server that listens on loopback.
    """
    if scope["type"] != "http" or scope["method"] != "POST" or not _announces_body(scope):
        return None
    content_type = _header(scope, b"content-type") or b""
    if content_type.partition(b";")[0].strip().lower() == b"application/json":
        return None
    got = ascii(content_type.decode("latin-1"))[1:-1][:100] or "none"
    return ApiError(415, f"the body must have the content type application/json, got {got}")


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
        if scope["type"] != "http" or (scope["method"] in ("GET", "HEAD", "OPTIONS") and not _announces_body(scope)):
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
            linger_s = 0.0 if body.status_code == 408 else LINGER_S  # of what has not come in time nothing more is coming
            await _answer(body, scope, receive, send, linger_s)
        # Otherwise, without a body, the client is gone, and nobody is left to answer.

    def _check_length(self, scope: Scope) -> ApiError | None:
        lengths = {value.strip() for name, value in scope["headers"] if name == b"content-length"}
        if not lengths:
            return None
        length = lengths.pop()
        if lengths or not length.isdigit() or _header(scope, b"transfer-encoding") is not None:
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


class ErrorGuard:
    """Answers what nobody else has answered. Here, inside CORS, so that a page may read it.

    Further out Starlette would answer as well, but raise the exception again, for uvicorn to log with all that it quotes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception as error:
            if started or scope["type"] != "http":
                raise  # uvicorn cuts the connection, so that the client sees that something is missing
            await error_response(error)(scope, receive, send)


async def _answer(refusal: ApiError, scope: Scope, receive: Receive, send: Send, linger_s: float = LINGER_S) -> None:
    """Refuse. What is still to come of the body is thrown away for a while, and then the connection is closed.

    Closing at once would be shorter, but then the system answers what is on its way with a reset, which makes many a client
    lose the answer as well.
    """
    response = error_response(refusal)
    lingers = _announces_body(scope)
    if lingers:
        response.headers["Connection"] = "close"
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": lingers})
    if lingers:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), linger_s)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


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


def _header(scope: Scope, name: bytes) -> bytes | None:
    value: bytes | None = next((value for key, value in scope["headers"] if key == name), None)
    return value


def _announces_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
        for name, value in scope["headers"]
    )
