"""PageBrain Live: the page that shows the blocks of the KV cache as they change hands, its feed, and its pause button.

The page is plain files in ``page``, served from memory under a policy that lets it load nothing from elsewhere. The
feed is a stream of server-sent events, ``hello`` and then ``update``; :mod:`pagebrain.server.live.hub` decides who gets what
and when. Who may read it is the guards' affair, and whether anybody may pause the engine that of ``--live-control``.
"""

import contextlib
import hashlib
from collections.abc import AsyncIterator
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from pagebrain.server.api.service import SECRET_HEADER, page_secret
from pagebrain.server.api.sse import while_there
from pagebrain.server.error_responses import ApiError
from pagebrain.server.link.messages import ControlAction
from pagebrain.server.live.hub import (
    LiveEndedError,
    LiveHub,
    LiveSource,
    TooManyViewersError,
    Viewer,
    encode_event,
    encode_json,
)
from pagebrain.server.options import ServerOptions
from pagebrain.server.paths import num_slashes_at_end

HEARTBEAT_S = 15.0
"""Seconds of silence after which a comment is sent, so that neither side nor anything between takes the other for gone."""

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
"""What ``/live/...`` serves, and as what. Nothing else in the folder is reachable."""

POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked about each time: a page and a script of two versions never meet
}


class ControlRequest(BaseModel):
    """What the page asks of the engine."""

    model_config = ConfigDict(extra="forbid")

    action: ControlAction


class StopRequest(BaseModel):
    """The page gives up one of several prompts that it sent together, with the same secret in its header."""

    model_config = ConfigDict(extra="forbid")

    request_id: str = Field(max_length=256)


def live_router(client: LiveSource, options: ServerOptions) -> APIRouter:
    """The routes of the live view. Left out of the OpenAPI schema: they are the page's own, not part of the API."""
    router = APIRouter(include_in_schema=False)
    hub = LiveHub(client)
    page = _StaticFile("index.html", "text/html")
    assets = {name: _StaticFile(name, media_type) for name, media_type in ASSETS.items()}

    @router.get("/live")
    async def live_page(request: Request) -> Response:
        if num_slashes := num_slashes_at_end(
            request.scope
        ):  # the page's files would be looked for in a folder that there is not
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
        if asset not in assets or b"%" in request.scope["raw_path"]:  # no name needs escapes
            raise ApiError(404, f"There is no {request.url.path}.")
        return assets[asset].response(request)

    return router


class _StaticFile:
    """A file of the page, in memory; its tag is a hash of what it holds."""

    def __init__(self, name: str, media_type: str) -> None:
        path = resources.files("pagebrain.server.live").joinpath("page").joinpath(*name.split("/"))
        self._content = path.read_bytes()
        self._media_type = media_type
        self._tag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'

    def response(self, request: Request) -> Response:
        """The file, or word that the browser's copy is still good."""
        headers = {**HEADERS, "ETag": self._tag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._tag in known:
            return Response(status_code=304, headers=headers)
        return Response(self._content, media_type=self._media_type, headers=headers)


def _hello(client: LiveSource, options: ServerOptions) -> bytes:
    """What does not change while a viewer watches, and whether the engine is paused now."""
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


class FeedResponse(StreamingResponse):
    """Sends a viewer's events until the viewer goes or there are no more; the viewer's place is free at that moment.

    A plain streaming response would wait in ``send`` for a viewer that does not read, and leave cleaning up to the garbage
    collector. Here what is being sent and the word that the viewer has gone are waited for side by side.
    """

    def __init__(self, hub: LiveHub, viewer: Viewer, hello: bytes) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
        super().__init__(_nothing(), media_type="text/event-stream", headers=headers)
        self._hub = hub
        self._viewer = viewer
        self._hello = hello

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application that is this response."""
        try:
            await while_there(self._send_all(send), receive)
        finally:
            self._hub.leave(self._viewer)

    async def _send_all(self, send: Send) -> None:
        with contextlib.suppress(OSError):  # gone in the middle of an event
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


async def _nothing() -> AsyncIterator[bytes]:
    """The content that the base class asks for."""
    return
    yield
