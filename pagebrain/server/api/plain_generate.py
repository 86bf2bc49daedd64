"""``POST /generate``: the API of the project that PageBrain started from. One prompt, always streamed."""

import json
import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagebrain.outputs import OutputDelta
from pagebrain.server.api.body import JsonRoute
from pagebrain.server.api.documented import documented
from pagebrain.server.api.protocol import GenerateRequest
from pagebrain.server.api.service import Service
from pagebrain.server.api.sse import DONE, EventStream


def generate_routes(service: Service) -> APIRouter:
    """A router with the route."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/generate", **documented(None, 400, 503, streams=True))
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue a prompt. Events: ``start``, then ``token`` for new tokens, then ``end``, then ``[DONE]``."""
        params = body.sampling_params()
        prompts = await service.prompts.token_ids([body.prompt], params)
        request_id = f"generate-{uuid.uuid4().hex}"
        return EventStream(service.submit(prompts, params, request_id, request), GenerateEvents(request_id))

    return router


class GenerateEvents:
    """The events ``start``, ``token`` and ``end``, each with the request's id."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._finish_reason: str | None = None

    def opening(self) -> str:
        """The event ``start``: the request was accepted."""
        return self._event("start")

    def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str:
        """An event for each delta with tokens. A slow client gets several tokens in one event."""
        events = []
        for delta in deltas:
            if delta.token_ids:
                events.append(self._event("token", text=delta.text, token_ids=delta.token_ids))
            self._finish_reason = delta.finish_reason
        return "".join(events)

    def ending(self) -> str:
        """The event ``end`` with the finish reason, and the end of the stream."""
        return self._event("end", finish_reason=self._finish_reason) + DONE

    def _event(self, name: str, **more: object) -> str:
        return f"data: {json.dumps({'event': name, 'request_id': self._request_id, **more})}\n\n"
