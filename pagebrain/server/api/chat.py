"""``POST /v1/chat/completions``: messages in, the model's next message out.

The chat template turns the messages into one text. After that a chat is a completion with another JSON format.
"""

import json
from collections.abc import Iterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagebrain.outputs import OutputDelta
from pagebrain.server.api.body import JsonRoute
from pagebrain.server.api.documented import documented
from pagebrain.server.api.heavy import encode_json, string_pieces
from pagebrain.server.api.held import CHAT
from pagebrain.server.api.logprob_json import TokenTexts, chat_pieces
from pagebrain.server.api.protocol import ChatRequest, StreamOptions
from pagebrain.server.api.responses import ChatResponse
from pagebrain.server.api.service import Heading, Service, StreamUsage, usage
from pagebrain.server.api.sse import EventStream
from pagebrain.server.api.whole import Answers, WholeAnswer
from pagebrain.server.link.streams import RequestStream

quote = json.JSONEncoder().encode
_NOTHING_MORE = ', "logprobs": null, "finish_reason": null}]'


def chat_routes(service: Service) -> APIRouter:
    """A router with the route."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", **documented(ChatResponse, 400, 404, 503, streams=True))
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation. With ``stream`` the answer comes as server-sent events."""
        service.check_model(body.model)
        options = body.checked_stream_options()
        params = body.sampling_params()
        beam_params = body.beam_search_params(params)
        prompt = await service.prompts.chat_prompt(body.messages)
        prompts = await service.prompts.token_ids([prompt], params, bool(body.add_special_tokens))
        heading = Heading.new("chatcmpl", service.model_name, body.request_id)
        if body.stream:
            [stream] = service.submit(prompts, params, heading.id, request, body.end_user, body.cache_salt)
            return EventStream([stream], ChatEvents(heading, stream, service.texts, options))
        streams, hold = service.submit_whole(
            prompts, params, heading.id, request, body.end_user, body.cache_salt, CHAT, beam_params=beam_params
        )

        def write(answers: Answers) -> Iterator[str]:
            service.check_complete(answers)
            return whole_pieces(heading, streams[0], service.texts, answers[0])

        return WholeAnswer(streams, hold, write)

    return router


def whole_pieces(heading: Heading, stream: RequestStream, texts: TokenTexts, samples: list[OutputDelta]) -> Iterator[str]:
    """The JSON of a :class:`~pagebrain.server.api.responses.ChatResponse`. Removes each sample when it is written."""
    separator = heading.answer_start("chat.completion")
    while samples:
        sample = samples.pop(0)
        yield f'{separator}{{"index":{sample.index},"message":{{"role":"assistant","content":'
        yield from string_pieces(sample.text)
        yield '},"logprobs":'
        if stream.params.logprobs is None:
            yield "null"
        else:
            yield from chat_pieces(texts, sample.logprobs)
        yield f',"finish_reason":{encode_json(sample.finish_reason)}}}'
        separator = ","
    yield f'],"usage":{encode_json(usage([stream]))}}}'


class ChatEvents:
    """A chat answer as server-sent events: for each sample its role, then pieces of text, then the finish reason."""

    def __init__(self, heading: Heading, stream: RequestStream, texts: TokenTexts, options: StreamOptions) -> None:
        self._texts = texts
        self._usage = StreamUsage([stream], options)
        self._wants_logprobs = stream.params.logprobs is not None
        self._start = heading.event_start("chat.completion.chunk")
        self._heads = [f'{self._start}[{{"index": {index}, "delta": ' for index in range(stream.params.n)]
        self._silent = set(range(stream.params.n))

    def opening(self) -> str:
        """Empty: the first event is sent with the first token."""
        return ""

    def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str | Iterator[str]:
        """The events for ``deltas``."""
        events = self._events(deltas)
        return events if self._wants_logprobs else "".join(events)

    def _events(self, deltas: list[OutputDelta]) -> Iterator[str]:
        for delta in deltas:
            head = self._heads[delta.index]
            if delta.index in self._silent:
                self._silent.discard(delta.index)
                yield f'{head}{{"role": "assistant", "content": ""}}{_NOTHING_MORE}{self._usage.end(0, delta.index)}'
            if self._usage.is_continuous:
                self._usage.count(0, delta)
            end = self._usage.end(0, delta.index)
            if self._wants_logprobs and delta.token_ids:
                yield f'{head}{{"content": {quote(delta.text)}}}, "logprobs": '
                yield from chat_pieces(self._texts, delta.logprobs)
                yield f', "finish_reason": null}}]{end}'
            elif delta.text:
                yield f'{head}{{"content": {quote(delta.text)}}}{_NOTHING_MORE}{end}'
            if delta.finish_reason is not None:
                yield f'{head}{{}}, "logprobs": null, "finish_reason": "{delta.finish_reason}"}}]{end}'

    def ending(self) -> str:
        """The event with the usage, if requested, and the end of the stream."""
        return self._usage.ending(self._start)
