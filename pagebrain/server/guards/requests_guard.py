"""Checks of a request's headers before the API sees it: host name, API key, path, content type.

These are plain ASGI middlewares: they cost microseconds and delay no stream. They answer a refused request in OpenAI's error
format, and it does not reach the API. Bodies are read in ``body_guard.py``.
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
"""Paths that need no key for ``GET``. All others need one: a list of the others would be unsafe, because a router may accept
several spellings of a path."""


def add_guards(app: FastAPI, options: ServerOptions, body_timeout_s: float = BODY_TIMEOUT_S) -> None:
    """Add the guards to an app. Called once, before it serves.

    Order, from the outermost: spelling of the path; CORS, so that pages can read errors too; unexpected errors; API key, or
    without a key the host name; path; content type; body.
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
    """Refuses a request for which ``check`` returns an error. ``check`` sees the headers; the body is not read."""

    def __init__(self, app: ASGIApp, check: Callable[[Scope], ApiError | None]) -> None:
        self.app = app
        self.check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None if scope["type"] == "lifespan" else self.check(scope)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await refuse(refusal, scope, receive, send)
        else:  # a websocket: not served today, but it must not bypass the check
            await send({"type": "websocket.close", "code": 1008})


class KeyCheck:
    """Accepts requests with ``Authorization: Bearer KEY``, and any ``GET`` of ``/health`` and the live page's files.

    The page must load before a user can type the key into it. Its feed and its controls need the key.
    """

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def __call__(self, scope: Scope) -> ApiError | None:
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] in _OPEN_PATHS:
            return None
        scheme, _, token = (header(scope, b"authorization") or b"").partition(b" ")
        # compare_digest takes constant time: the time of an ordinary comparison tells how many characters are right.
        # It compares bytes, because it accepts text only in ASCII.
        if hmac.compare_digest(token.strip(), self._key) and scheme.lower() == b"bearer":
            return None
        message = "this server needs its API key: send the header 'Authorization: Bearer KEY'"
        if token:
            message = "the API key is wrong: send the one that the server was started with"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def needs_host_check(options: ServerOptions) -> bool:
    """Whether the server has no key, and only its loopback address protects it."""
    return options.api_key is None and "*" not in options.cors_origins and _is_local(options.host)


class HostCheck:
    """Accepts requests whose ``Host`` is an IP address, a name of this machine, or the host of one of ``origins``.

    This prevents "DNS rebinding": a page is loaded, and then its own name is resolved to 127.0.0.1. For the browser the
    server then has the page's origin, so CORS and the content type do not protect it. But the browser sends the page's name
    in ``Host``, and the page cannot change that.
    """

    def __init__(self, origins: Iterable[str]) -> None:
        self._names = {urlsplit(origin).hostname for origin in origins}

    def __call__(self, scope: Scope) -> ApiError | None:
        for key, value in scope["headers"]:
            if key == b"host" and not self._is_own(value.decode("latin-1")):
                host = ascii(value.decode("latin-1"))[1:-1][:100]
                message = (
                    f"the host {host} is not a name of this machine: use localhost or 127.0.0.1, or start the server with "
                    f"--api-key, or with --cors-origin http://HOST to allow that name"
                )
                return ApiError(403, message, code="host_not_allowed")
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname  # without the port; in lower case
        except ValueError:  # brackets without an IPv6 address
            return False
        return name is not None and (name in self._names or _is_local(name) or _is_address(name))


def _is_local(name: str) -> bool:
    """Whether a name or an address always means this machine."""
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
    """Refuse a POST whose content type is not JSON, or whose body is compressed.

    This also protects a server on loopback from pages of other origins. Such a page can make a browser post a form or plain
    text without a preflight request ("simple requests"). JSON needs a preflight request, and CORS refuses it.
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
    """Answers unexpected exceptions. It lies inside CORS, so that a page can read the answer.

    Starlette's own handler lies outside CORS and raises the exception again; uvicorn would log its message, which may quote
    a prompt.
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
                raise  # the connection is closed, so that the client sees an incomplete answer
            await error_response(error)(scope, receive, send)
