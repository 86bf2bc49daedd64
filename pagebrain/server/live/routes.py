"""The routes of PageBrain Live: the page that shows the blocks of the KV cache, its feed, and pause, step and stop.

The page's files lie in ``page`` and are served from memory, with a policy that forbids loading from other hosts. The feed is
a stream of server-sent events, ``hello`` and then ``update``, which come from :mod:`pagebrain.server.live.hub`. The guards
check API keys. Pause and step need ``--live-control``.
"""

import contextlib
import hashlib
from collections.abc import AsyncIterator
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from pagebrain.server.api.heavy import encode_json
from pagebrain.server.api.service import SECRET_HEADER, page_secret
from pagebrain.server.api.sse import while_there
from pagebrain.server.error_responses import ApiError
from pagebrain.server.link.messages import ControlAction
from pagebrain.server.live.hub import LiveEndedError, LiveHub, LiveSource, TooManyViewersError, Viewer, encode_event
from pagebrain.server.options import ServerOptions
from pagebrain.server.paths import num_slashes_at_end

HEARTBEAT_S = 15.0
"""Seconds without an event after which a comment is sent, so that no side and no proxy closes the connection as idle."""

ASSETS = {
    "live.css": "text/css",
    "icon.svg": "image/svg+xml",
    "theme.js": "text/javascript",
    "main.js": "text/javascript",
    "session.js": "text/javascript",
    "events.js": "text/javascript",
    "feed.js": "text/javascript",
    "model.js": "text/javascript",
    "palette.js": "text/javascript",
    "canvas.js": "text/javascript",
    "pool.js": "text/javascript",
    "pool_grid.js": "text/javascript",
    "table.js": "text/javascript",
    "queues.js": "text/javascript",
    "timeline.js": "text/javascript",
    "charts.js": "text/javascript",
    "controls.js": "text/javascript",
    "prompts.js": "text/javascript",
    "cards.js": "text/javascript",
    "uplot/uPlot.iife.min.js": "text/javascript",
    "uplot/uPlot.min.css": "text/css",
    "uplot/LICENSE": "text/plain",
}
"""The files below ``/live/`` and their content types. No other file in the folder is served."""

POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # cached, but validated each time: page and scripts always have the same version
}


class ControlRequest(BaseModel):
    """``POST /live/control``: pause, resume or step."""

    model_config = ConfigDict(extra="forbid")

    action: ControlAction


class StopRequest(BaseModel):
    """``POST /live/stop``: abort one of several prompts that the page sent together, with the same secret in the header."""

    model_config = ConfigDict(extra="forbid")

    request_id: str = Field(max_length=256)


def live_router(client: LiveSource, options: ServerOptions) -> APIRouter:
    """The routes of the live view. They are not a part of the API, and not in its OpenAPI schema."""
    router = APIRouter(include_in_schema=False)
    hub = LiveHub(client)
    page = _StaticFile("index.html", "text/html")
    assets = {name: _StaticFile(name, media_type) for name, media_type in ASSETS.items()}

    @router.get("/live")
    async def live_page(request: Request) -> Response:
        # The page's links are relative: with a slash at the end of its address they would lead to a wrong folder.
        if num_slashes := num_slashes_at_end(request.scope):
            return RedirectResponse("../" * num_slashes + "live", status_code=308)
        return page.response(request)

    @router.get("/live/feed")
    async def live_feed() -> Response:
        try:
            viewer = hub.join()
        except (TooManyViewersError, LiveEndedError) as error:
            raise ApiError(503, str(error), code="service_unavailable", headers={"Retry-After": "5"}) from error
        return FeedResponse(hub, viewer, _hello(client, options))

    @router.post("/live/control")
    async def live_control(body: ControlRequest) -> Response:
        if not options.live_control:
            message = "This server does not let viewers pause it: start it with --live-control."
            raise ApiError(403, message, code="live_control_is_off")
        return JSONResponse({"paused": await hub.control(body.action)})

    @router.post("/live/stop")
    async def live_stop(body: StopRequest, request: Request) -> Response:
        secret = page_secret(request)
        if secret is None:
            raise ApiError(400, f"The header {SECRET_HEADER} is missing: it must be that of the request to stop.")
        if not client.abort_request(body.request_id, secret):
            raise ApiError(404, f"No request {body.request_id!r} of this page is under way.")
        return JSONResponse({"stopped": body.request_id})

    @router.get("/live/{asset:path}")
    async def live_asset(asset: str, request: Request) -> Response:
        if asset not in assets or b"%" in request.scope["raw_path"]:  # no name of a file needs escapes
            raise ApiError(404, f"There is no {request.url.path}.")
        return assets[asset].response(request)

    return router


class _StaticFile:
    """A file of the page, in memory. Its ETag is a hash of its content."""

    def __init__(self, name: str, media_type: str) -> None:
        path = resources.files("pagebrain.server.live").joinpath("page").joinpath(*name.split("/"))
        self._content = path.read_bytes()
        self._media_type = media_type
        self._tag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'

    def response(self, request: Request) -> Response:
        """The file, or status 304 if the browser's copy is current."""
        headers = {**HEADERS, "ETag": self._tag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._tag in known:
            return Response(status_code=304, headers=headers)
        return Response(self._content, media_type=self._media_type, headers=headers)


def _hello(client: LiveSource, options: ServerOptions) -> bytes:
    """The feed's first event: the constants of the server, and whether the engine is paused."""
    config = client.config
    return encode_event(
        "hello",
        encode_json(
            {
                "model": options.served_model_name,
                "num_blocks": config.num_blocks,
                "block_size": config.block_size,
                "max_num_seqs": config.max_num_seqs,
                "max_model_len": config.max_model_len,
                "max_num_batched_tokens": config.max_num_batched_tokens,
                "control": options.live_control,
                "paused": client.paused,
            }
        ),
    )


class FeedResponse(Response):
    """Sends a viewer's events until the viewer disconnects or there are no more. The viewer then leaves the hub at once.

    A ``StreamingResponse`` would wait in ``send`` for a viewer that does not read, and its generator would be closed by the
    garbage collector. Here sending and the disconnection are waited for together.
    """

    media_type = "text/event-stream"

    def __init__(self, hub: LiveHub, viewer: Viewer, hello: bytes) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._hub = hub
        self._viewer = viewer
        self._hello = hello

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await while_there(self._send_all(send), receive)
        finally:
            self._hub.leave(self._viewer)

    async def _send_all(self, send: Send) -> None:
        with contextlib.suppress(OSError):  # from sending: the viewer has disconnected
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events():
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        yield self._hello
        try:
            while True:
                yield await self._viewer.next_update(HEARTBEAT_S) or b": still here\n\n"
        except LiveEndedError as error:
            yield encode_event("end", encode_json({"reason": str(error)}))
