"""One spelling of each path, so that the guards and the router see the same path; and ``HEAD``, answered as ``GET``.

Some clients send an extra slash, or are configured with a base address that ends in one. A redirect is no solution, because
many clients lose the body of a POST in a redirect.
"""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagebrain.server.error_responses import ApiError

_SLASHES = re.compile("/+")
_CONTROL = re.compile("[\x00-\x1f\x7f]")


def plain_path(path: str) -> str:
    """The path without repeated slashes and without a slash at its end."""
    return _SLASHES.sub("/", path).rstrip("/") or "/"


def num_slashes_at_end(scope: Scope) -> int:
    """Number of slashes at the end of the path as it was sent."""
    raw_path: bytes = scope.get("raw_path", b"")
    return len(raw_path) - len(raw_path.rstrip(b"/"))


def check_path(scope: Scope) -> ApiError | None:
    """Refuse a path with a control character: the router ignores a newline at the end."""
    if _CONTROL.search(scope["path"]):
        return ApiError(404, f"there is no {ascii(scope['path'])[1:-1][:200]} here")
    return None


class PlainPaths:
    """The middleware that normalizes paths, and answers ``HEAD`` as ``GET`` without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            is_head = scope["method"] == "HEAD"
            scope = {**scope, "path": plain_path(scope["path"]), "method": "GET" if is_head else scope["method"]}
            send = _without_body(send) if is_head else send
        await self.app(scope, receive, send)


def _without_body(send: Send) -> Send:
    """A ``send`` that ends the answer after its headers. A stream then stops as if its client had disconnected."""
    is_over = False

    async def send_head(message: Message) -> None:
        nonlocal is_over
        if message["type"] == "http.response.start":
            await send(message)
        elif not is_over:
            is_over = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return send_head
