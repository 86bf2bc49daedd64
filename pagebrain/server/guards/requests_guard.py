"""What a request must pass before the API sees it: the name it calls the server by, its key, its path, the kind of its body.

Plain ASGI middlewares: they cost microseconds and hold no stream up. What they refuse is answered in OpenAI's shape, and
neither the API nor the engine hears of it. Here are those that look at headers; ``body_guard.py`` reads bodies. What a body
means is the API's to judge.
"""

import hmac
import ipaddress
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagebrain.server.error_responses import ApiError, error_response
from pagebrain.server.guards.body_guard import BODY_TIMEOUT_S, BodyGuard, announces_body, header, refuse
from pagebrain.server.live.routes import ASSETS
from pagebrain.server.options import ServerOptions
from pagebrain.server.paths import PlainPaths, check_path

_OPEN_PATHS = frozenset({"/health", "/live", *(f"/live/{name}" for name in ASSETS)})
"""What everybody may GET. A list of what needs a key would have holes: a router can be generous about what it takes for
the same path."""


def add_guards(app: FastAPI, options: ServerOptions, body_timeout_s: float = BODY_TIMEOUT_S) -> None:
    """Put the guards around an app. Called once, before it serves.

    From the outside in: the spelling of the path; CORS, so that browsers may read errors too; unexpected errors; API key, or
    the server's name where there is no key to protect it; path; content type; body.
    """
    app.add_middleware(BodyGuard, max_bytes=options.max_body_bytes, timeout_s=body_timeout_s)
    app.add_middleware(HeaderGuard, check=check_content_type)
    app.add_middleware(HeaderGuard, check=check_path)
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
    app.add_middleware(PlainPaths)


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
            await refuse(refusal, scope, receive, send)
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
        scheme, _, token = (header(scope, b"authorization") or b"").partition(b" ")
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
    """Refuse a POST whose body does not say that it is JSON, or says that it is compressed.

    A page of any origin can make a browser post a form or plain text without being asked first ("simple" requests); for JSON
    the browser asks, and CORS says no. So this also keeps strange pages from using a server that listens on loopback.
    """
    if scope["type"] != "http" or scope["method"] != "POST" or not announces_body(scope):
        return None
    content_type = header(scope, b"content-type") or b""
    if content_type.partition(b";")[0].strip().lower() == b"application/json":
        return _check_encoding(scope)
    got = ascii(content_type.decode("latin-1"))[1:-1][:100] or "none"
    return ApiError(415, f"the body must have the content type application/json, got {got}")


def _check_encoding(scope: Scope) -> ApiError | None:
    encoding = (header(scope, b"content-encoding") or b"identity").strip()
    if encoding.lower() == b"identity":
        return None
    got = ascii(encoding.decode("latin-1"))[1:-1][:100]
    return ApiError(415, f"the body must not be compressed, got the content encoding {got}: send plain JSON without it")


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
