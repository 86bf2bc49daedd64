"""``POST /v1/chat/completions``: messages in, the model's next turn out.

The chat template makes one text of the messages; from there on a chat is a completion with other words around it.
"""

import json

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagebrain.outputs import OutputDelta
from pagebrain.server.body import JsonRoute
from pagebrain.server.documented import documented
from pagebrain.server.heavy import json_answer
from pagebrain.server.logprobs import TokenTexts, chat_logprobs
from pagebrain.server.protocol import ChatRequest
from pagebrain.server.responses import ChatChoice, ChatLogprobs, ChatResponse
from pagebrain.server.service import Heading, Service, answer_size, usage
from pagebrain.server.sse import DONE, ClientGoneError, EventStream, read_all
from pagebrain.server.streams import RequestStream

quote = json.JSONEncoder().encode


def chat_routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", **documented(ChatResponse, 400, 404, 503, streams=True))
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation. With ``stream`` the answer comes as server-sent events."""
        service.check_model(body.model)
        wants_usage = body.wants_usage
        params = body.sampling_params()
        prompt = await service.prompts.chat_prompt(body.messages)
        prompts = await service.prompts.token_ids([prompt], params)
        heading = Heading.new("chatcmpl", service.model_name)
        [stream] = service.submit(prompts, params, heading.id, request, body.user)
        if body.stream:
            return EventStream([stream], ChatEvents(heading, stream, service.texts, wants_usage))
        try:
            answers = await read_all([stream], request.receive)
        except ClientGoneError:
            return Response(status_code=499)
        service.check_complete(answers)
        return await json_answer(lambda: chat_completion(heading, stream, service.texts, answers[0]), answer_size([stream]))

    return router


def chat_completion(heading: Heading, stream: RequestStream, texts: TokenTexts, answers: list[OutputDelta]) -> ChatResponse:
    """The whole answer."""
    wants_logprobs = stream.params.logprobs is not None
    choices: list[ChatChoice] = [
        {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": _logprobs(texts, answer) if wants_logprobs else None,
            "finish_reason": str(answer.finish_reason),
        }
        for answer in answers
    ]
    return {
        "id": heading.id,
        "object": "chat.completion",
        "created": heading.created,
        "model": heading.model,
        "choices": choices,
        "usage": usage([stream]),
    }


class ChatEvents:
    """The same as server-sent events: who speaks, what is said bit by bit, why it ended."""

    def __init__(self, heading: Heading, stream: RequestStream, texts: TokenTexts, wants_usage: bool) -> None:
        self._stream = stream
        self._texts = texts
        self._wants_usage = wants_usage
        self._wants_logprobs = stream.params.logprobs is not None
        self._start = heading.event_start("chat.completion.chunk")
        self._end = ', "usage": null}\n\n' if wants_usage else "}\n\n"
        self._heads = [f'{self._start}[{{"index": {index}, "delta": ' for index in range(stream.params.n)]
        self._tail = f', "logprobs": null, "finish_reason": null}}]{self._end}'
        self._silent = set(range(stream.params.n))

    def opening(self) -> str:
        """Nothing: the first event comes with the first token."""
        return ""

    def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str:
        """The events of the answers that have grown."""
        events = []
        for delta in deltas:
            head = self._heads[delta.index]
            if delta.index in self._silent:
                self._silent.discard(delta.index)
                events.append(f'{head}{{"role": "assistant", "content": ""}}{self._tail}')
            if self._wants_logprobs and delta.token_ids:
                logprobs = json.dumps(_logprobs(self._texts, delta))
                tail = f', "logprobs": {logprobs}, "finish_reason": null}}]{self._end}'
                events.append(f'{head}{{"content": {quote(delta.text)}}}{tail}')
            elif delta.text:
                events.append(f'{head}{{"content": {quote(delta.text)}}}{self._tail}')
            if delta.finish_reason is not None:
                events.append(f'{head}{{}}, "logprobs": null, "finish_reason": "{delta.finish_reason}"}}]{self._end}')
        return "".join(events)

    def ending(self) -> str:
        """The usage, if it was asked for, and the end."""
        if not self._wants_usage:
            return DONE
        return f'{self._start}[], "usage": {json.dumps(usage([self._stream]))}}}\n\n{DONE}'


def _logprobs(texts: TokenTexts, delta: OutputDelta) -> ChatLogprobs:
    return {"content": chat_logprobs(texts, delta.logprobs)}
