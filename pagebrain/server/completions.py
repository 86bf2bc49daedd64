"""``POST /v1/completions``: one or many prompts, each continued ``n`` times.

An answer is put together from what the engine says by :class:`ChoiceWriter`, the same way whether it comes in one piece or
is streamed. Most streams want neither ``echo`` nor ``logprobs``; for them an event is three strings put together.
"""

import json

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagebrain.outputs import OutputDelta, TokenLogprobs
from pagebrain.server.body import JsonRoute
from pagebrain.server.documented import documented
from pagebrain.server.heavy import json_answer
from pagebrain.server.logprobs import CompletionScorer, joined
from pagebrain.server.protocol import CompletionRequest, StreamOptions
from pagebrain.server.responses import CompletionChoice, CompletionResponse
from pagebrain.server.service import Heading, Service, StreamUsage, answer_size, usage
from pagebrain.server.sse import ClientGoneError, EventStream, read_all
from pagebrain.server.streams import RequestStream

quote = json.JSONEncoder().encode


def completion_routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", **documented(CompletionResponse, 400, 404, 503, streams=True))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt, or several. With ``stream`` the answer comes as server-sent events."""
        service.check_model(body.model)
        options = body.checked_stream_options()
        params = body.sampling_params()
        prompts = await service.prompts.token_ids(body.prompts, params, body.add_special_tokens is not False)
        heading = Heading.new("cmpl", service.model_name, body.request_id)
        streams = service.submit(prompts, params, heading.id, request, body.end_user)
        writers = make_writers(service, body, streams)
        if body.stream:
            return EventStream(streams, CompletionEvents(heading, streams, writers, options))
        try:
            answers = await read_all(streams, request.receive)
        except ClientGoneError:
            return Response(status_code=499)
        service.check_complete(answers)
        return await json_answer(lambda: completion(heading, streams, writers, answers), answer_size(streams))

    return router


class ChoiceWriter:
    """One answer: what each piece of news adds to it, the prompt's echo first.

    Args:
        index: of the answer among all of the request's.
        prompt_token_ids: of its prompt.
        echo: the prompt's text, if the answer is to begin with it.
        scorer: makes the logprobs, if they are wanted.
    """

    def __init__(
        self, index: int, prompt_token_ids: tuple[int, ...], echo: str | None, scorer: CompletionScorer | None
    ) -> None:
        self.index = index
        self._prompt_token_ids = prompt_token_ids
        self._echo = echo
        self._scorer = scorer

    @property
    def is_plain(self) -> bool:
        """Whether a piece of the answer is the piece of text that was generated, and nothing more."""
        return self._echo is None and self._scorer is None

    def add(self, delta: OutputDelta, prompt_scores: tuple[TokenLogprobs | None, ...] | None) -> CompletionChoice:
        """The next piece; the scores of the prompt go with the first."""
        logprobs = None
        if self._scorer is not None and self._echo is not None and prompt_scores is not None:
            logprobs = self._scorer.prompt(self._prompt_token_ids, prompt_scores)
        if self._scorer is not None:
            new = self._scorer.answer(delta.token_ids, delta.logprobs)
            logprobs = new if logprobs is None else joined(logprobs, new)
        text, self._echo = (self._echo or "") + delta.text, None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}


def make_writers(service: Service, body: CompletionRequest, streams: list[RequestStream]) -> list[ChoiceWriter]:
    """A writer for each answer: those of the first prompt first."""
    writers: list[ChoiceWriter] = []
    for prompt, stream in zip(body.prompts, streams):
        echo, added = None, frozenset[int]()
        if body.echo and body.logprobs is not None and isinstance(prompt, str) and body.add_special_tokens is not False:
            added = service.prompts.added_tokens(prompt)
        if body.echo:
            echo = prompt if isinstance(prompt, str) else service.texts.decode(stream.prompt_token_ids)
        for _ in range(stream.params.n):
            skip = stream.params.skip_special_tokens
            scorer = None if body.logprobs is None else CompletionScorer(service.texts, skip, added)
            writers.append(ChoiceWriter(len(writers), stream.prompt_token_ids, echo, scorer))
    return writers


def completion(
    heading: Heading, streams: list[RequestStream], writers: list[ChoiceWriter], answers: list[list[OutputDelta]]
) -> CompletionResponse:
    """The whole answer."""
    choices: list[CompletionChoice] = []
    for deltas in answers:
        for delta in deltas:
            writer = writers[len(choices)]
            choices.append(writer.add(delta, deltas[0].prompt_logprobs))
    return {
        "id": heading.id,
        "object": "text_completion",
        "created": heading.created,
        "model": heading.model,
        "choices": choices,
        "usage": usage(streams),
    }


class CompletionEvents:
    """The same as server-sent events."""

    def __init__(
        self, heading: Heading, streams: list[RequestStream], writers: list[ChoiceWriter], options: StreamOptions
    ) -> None:
        self._writers = writers
        self._usage = StreamUsage(streams, options)
        self._start = heading.event_start("text_completion")
        self._heads = [f'{self._start}[{{"index": {writer.index}, "text": ' for writer in writers]
        self._tails = {
            reason: f', "logprobs": null, "finish_reason": {json.dumps(reason)}}}]{self._usage.plain_end}'
            for reason in (None, "stop", "length", "abort")
        }
        self._num_samples = streams[0].params.n
        self._is_plain = writers[0].is_plain and not self._usage.is_continuous
        self._held: dict[int, list[OutputDelta]] = {}  # by prompt, until its scores are there
        if streams[0].params.prompt_logprobs is not None:
            self._held = {index: [] for index in range(len(streams))}
        self._prompt_scores: dict[int, tuple[TokenLogprobs | None, ...]] = {}

    def opening(self) -> str:
        """Nothing: the first event comes with the first token."""
        return ""

    def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str:
        """An event for each answer that has grown."""
        first = prompt_index * self._num_samples
        if self._is_plain:
            heads, tails = self._heads, self._tails
            return "".join(
                [f"{heads[first + delta.index]}{quote(delta.text)}{tails[delta.finish_reason]}" for delta in deltas]
            )
        if prompt_index in self._held:
            deltas = self._with_held(prompt_index, deltas)
        scores = self._prompt_scores.get(prompt_index)
        events = []
        for delta in deltas:
            self._usage.count(prompt_index, delta)
            choice = self._writers[first + delta.index].add(delta, scores)
            events.append(f"{self._start}[{json.dumps(choice)}]{self._usage.end(prompt_index, delta.index)}")
        return "".join(events)

    def ending(self) -> str:
        """The usage, if it was asked for, and the end."""
        return self._usage.ending(self._start)

    def _with_held(self, prompt_index: int, deltas: list[OutputDelta]) -> list[OutputDelta]:
        """The samples share their prompt, whose scores come with the first: the others' tokens may come before them."""
        held = self._held[prompt_index]
        held.extend(deltas)
        scores = next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None)
        if scores is not None:
            self._prompt_scores[prompt_index] = scores
        elif not any(delta.finish_reason == "abort" for delta in deltas):
            return []
        del self._held[prompt_index]
        return held
