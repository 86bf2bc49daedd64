"""``POST /generate``: the small API of the project that PageBrain grew from. One prompt, streamed as plain events."""

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
    """The route."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/generate", **documented(None, 400, 503, streams=True))
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue a prompt: events ``start``, ``token`` as often as tokens come, ``end``; then ``[DONE]``."""
        params = body.sampling_params()
        prompts = await service.prompts.token_ids([body.prompt], params)
        request_id = f"generate-{uuid.uuid4().hex}"
        return EventStream(service.submit(prompts, params, request_id, request), GenerateEvents(request_id))

    return router


class GenerateEvents:
    """The events, each with its name and the request's."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._finish_reason: str | None = None

    def opening(self) -> str:
        """The request was taken."""
        return self._event("start")

    def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str:
        """Tokens came; several at once if they were not fetched one by one."""
        events = []
        for delta in deltas:
            if delta.token_ids:
                events.append(self._event("token", text=delta.text, token_ids=delta.token_ids))
            self._finish_reason = delta.finish_reason
        return "".join(events)

    def ending(self) -> str:
        """Why it ended, and the end."""
        return self._event("end", finish_reason=self._finish_reason) + DONE

    def _event(self, name: str, **more: object) -> str:
        return f"data: {json.dumps({'event': name, 'request_id': self._request_id, **more})}\n\n"
