"""What a request must pass before the API sees it: where its page comes from, its key, its content type, its size.

Plain ASGI middlewares: they cost microseconds and hold no stream up. What they refuse is answered in OpenAI's shape, and
neither the API nor the engine hears of it. What a body means is the API's to judge.
"""

import asyncio
import contextlib
import hmac
from collections.abc import Callable

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

_OPEN_PATHS = frozenset({"/health", "/live", *(f"/live/{name}" for name in ASSETS)})
"""What everybody may GET. A list of what needs a key would have holes: a router can be generous about what it takes for
the same path, and Starlette's ignores a newline at the end."""


def add_guards(app: FastAPI, options: ServerOptions, body_timeout_s: float = BODY_TIMEOUT_S) -> None:
    """Put the guards around an app. Called once, before it serves.

    From the outside in: CORS, so that browsers may read errors too; unexpected errors; API key; content type; body.
    """
    app.add_middleware(BodyGuard, max_bytes=options.max_body_bytes, timeout_s=body_timeout_s)
    app.add_middleware(HeaderGuard, check=check_content_type)
    if options.api_key is not None:
        app.add_middleware(HeaderGuard, check=KeyCheck(options.api_key))
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
    through the framework's own handling of bad bodies. The app needs the whole body before it can begin anyway.

    Args:
        max_bytes: longest body.
        timeout_s: seconds that a body may take.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"] in ("GET", "HEAD", "OPTIONS") and not _announces_body(scope)):
            await self.app(scope, receive, send)
            return
        body: bytes | ApiError | None = self._check_length(scope)
        if body is None:
            try:
                body = await asyncio.wait_for(self._read(receive), self.timeout_s)
            except asyncio.TimeoutError:
                message = f"the body did not arrive within {self.timeout_s:g} seconds"
                body = ApiError(408, message, code="request_timeout")
        if isinstance(body, ApiError):
            await _answer(
                body, scope, receive, send, linger_s=0.0 if body.status_code == 408 else LINGER_S
            )  # nothing is coming
        elif body is not None:  # otherwise the client is gone, and nobody is left to answer
            await self.app(scope, _replay(body, receive), send)

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

    async def _read(self, receive: Receive) -> bytes | ApiError | None:
        """The whole body; ``None`` if the client went away."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                return self._too_long()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_long(self) -> ApiError:
        message = f"the body is longer than {self.max_bytes} bytes: shorten it, or start the server with --max-body-bytes"
        return ApiError(413, message)


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
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _header(scope: Scope, name: bytes) -> bytes | None:
    value: bytes | None = next((value for key, value in scope["headers"] if key == name), None)
    return value


def _announces_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
        for name, value in scope["headers"]
    )
