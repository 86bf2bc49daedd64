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
from pagebrain.server.protocol import ChatRequest, StreamOptions
from pagebrain.server.responses import ChatChoice, ChatLogprobs, ChatResponse
from pagebrain.server.service import Heading, Service, StreamUsage, answer_size, usage
from pagebrain.server.sse import ClientGoneError, EventStream, read_all
from pagebrain.server.streams import RequestStream

quote = json.JSONEncoder().encode
_NOTHING_MORE = '"logprobs": null, "finish_reason": null}]'


def chat_routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", **documented(ChatResponse, 400, 404, 503, streams=True))
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation. With ``stream`` the answer comes as server-sent events."""
        service.check_model(body.model)
        options = body.checked_stream_options()
        params = body.sampling_params()
        prompt = await service.prompts.chat_prompt(body.messages)
        prompts = await service.prompts.token_ids([prompt], params, bool(body.add_special_tokens))
        heading = Heading.new("chatcmpl", service.model_name, body.request_id)
        [stream] = service.submit(prompts, params, heading.id, request, body.end_user)
        if body.stream:
            return EventStream([stream], ChatEvents(heading, stream, service.texts, options))
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

    def __init__(self, heading: Heading, stream: RequestStream, texts: TokenTexts, options: StreamOptions) -> None:
        self._texts = texts
        self._usage = StreamUsage([stream], options)
        self._wants_logprobs = stream.params.logprobs is not None
        self._start = heading.event_start("chat.completion.chunk")
        self._heads = [f'{self._start}[{{"index": {index}, "delta": ' for index in range(stream.params.n)]
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
                end = self._usage.end(0, delta.index)
                events.append(f'{head}{{"role": "assistant", "content": ""}}, {_NOTHING_MORE}{end}')
            if self._usage.is_continuous:
                self._usage.count(0, delta)
            end = self._usage.end(0, delta.index)
            if self._wants_logprobs and delta.token_ids:
                logprobs = json.dumps(_logprobs(self._texts, delta))
                events.append(
                    f'{head}{{"content": {quote(delta.text)}}}, "logprobs": {logprobs}, "finish_reason": null}}]{end}'
                )
            elif delta.text:
                events.append(f'{head}{{"content": {quote(delta.text)}}}, {_NOTHING_MORE}{end}')
            if delta.finish_reason is not None:
                events.append(f'{head}{{}}, "logprobs": null, "finish_reason": "{delta.finish_reason}"}}]{end}')
        return "".join(events)

    def ending(self) -> str:
        """The usage, if it was asked for, and the end."""
        return self._usage.ending(self._start)


def _logprobs(texts: TokenTexts, delta: OutputDelta) -> ChatLogprobs:
    return {"content": chat_logprobs(texts, delta.logprobs)}
