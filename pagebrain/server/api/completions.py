"""``POST /v1/completions``: one or many prompts, each continued ``n`` times.

:class:`ChoiceWriter` turns the engine's deltas into pieces of JSON, for streams and for answers in one piece: an answer with
log-probabilities may be long. Fast path: without ``echo`` and ``logprobs`` an event is three strings put together.
"""

import json
from collections.abc import Iterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagebrain.outputs import OutputDelta
from pagebrain.server.api.body import JsonRoute
from pagebrain.server.api.documented import documented
from pagebrain.server.api.heavy import encode_json, string_pieces
from pagebrain.server.api.held import COMPLETION
from pagebrain.server.api.logprob_json import CompletionScorer, ScoredPrompt, answer_parts, completion_pieces
from pagebrain.server.api.protocol import CompletionRequest, StreamOptions
from pagebrain.server.api.responses import CompletionResponse
from pagebrain.server.api.service import Heading, Service, StreamUsage, usage
from pagebrain.server.api.sse import EventStream
from pagebrain.server.api.whole import Answers, WholeAnswer
from pagebrain.server.link.streams import RequestStream

quote = json.JSONEncoder().encode


def completion_routes(service: Service) -> APIRouter:
    """A router with the route."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", **documented(CompletionResponse, 400, 404, 503, streams=True))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt, or several. With ``stream`` the answer comes as server-sent events."""
        service.check_model(body.model)
        options = body.checked_stream_options()
        params = body.sampling_params()
        beam_params = body.beam_search_params(params)
        prompts = await service.prompts.token_ids(body.prompts, params, body.add_special_tokens is not False)
        heading = Heading.new("cmpl", service.model_name, body.request_id)
        if body.stream:
            streams = service.submit(prompts, params, heading.id, request, body.end_user, body.cache_salt)
            writers = make_writers(service, body, streams)
            return EventStream(streams, CompletionEvents(heading, streams, writers, options))
        streams, hold = service.submit_whole(
            prompts,
            params,
            heading.id,
            request,
            body.end_user,
            body.cache_salt,
            COMPLETION,
            echo=bool(body.echo),
            beam_params=beam_params,
        )

        def write(answers: Answers) -> Iterator[str]:
            service.check_complete(answers)
            return whole_pieces(heading, streams, make_writers(service, body, streams), answers)

        return WholeAnswer(streams, hold, write)

    return router


class ChoiceWriter:
    """Writes one answer of a request as JSON, a delta at a time. The echo of the prompt comes first.

    Args:
        index: the answer's number in the request.
        prompt: the prompt's scores, shared by all samples of the prompt.
        echo: the prompt's text, if the answer begins with it.
        scorer: makes the logprobs, if they are requested.
    """

    def __init__(self, index: int, prompt: ScoredPrompt, echo: str | None, scorer: CompletionScorer | None) -> None:
        self.index = index
        self.prompt = prompt
        self._echo = echo
        self._scorer = scorer

    @property
    def is_plain(self) -> bool:
        """Whether the answer holds only generated text: no echo, no log-probabilities."""
        return self._echo is None and self._scorer is None

    def pieces(self, delta: OutputDelta, space: str = "") -> Iterator[str]:
        """The delta as a choice in JSON. The first one includes the scores of the prompt, which must be set before.

        ``space`` is written after colons and commas, as in the other events of a stream.
        """
        echo, self._echo = self._echo, None
        yield f'{{"index":{space}{self.index},{space}"text":{space}'
        yield from string_pieces((echo or "") + delta.text)
        yield f',{space}"logprobs":{space}'
        if self._scorer is None:
            yield "null"
        else:
            with_prompt = echo is not None and self.prompt.scores is not None
            yield from completion_pieces(self._parts(self._scorer, delta, with_prompt))
        yield f',{space}"finish_reason":{space}{encode_json(delta.finish_reason)}}}'

    def _parts(self, scorer: CompletionScorer, delta: OutputDelta, with_prompt: bool) -> Iterator[dict[str, str]]:
        if with_prompt:
            yield from self.prompt.parts(scorer)
        yield from answer_parts(scorer, delta.token_ids, delta.logprobs)


def make_writers(service: Service, body: CompletionRequest, streams: list[RequestStream]) -> list[ChoiceWriter]:
    """A writer for each answer, in order of prompts and samples."""
    writers: list[ChoiceWriter] = []
    for prompt, stream in zip(body.prompts, streams):
        echo, added = None, frozenset[int]()
        if body.echo and body.logprobs is not None and isinstance(prompt, str) and body.add_special_tokens is not False:
            added = service.prompts.added_tokens(prompt)
        if body.echo:
            echo = prompt if isinstance(prompt, str) else service.texts.decode(stream.prompt_token_ids)
        shared = ScoredPrompt(stream.prompt_token_ids, stream.params.n)
        for _ in range(stream.params.n):
            skip = stream.params.skip_special_tokens
            scorer = None if body.logprobs is None else CompletionScorer(service.texts, skip, added)
            writers.append(ChoiceWriter(len(writers), shared, echo, scorer))
    return writers


def whole_pieces(
    heading: Heading, streams: list[RequestStream], writers: list[ChoiceWriter], answers: Answers
) -> Iterator[str]:
    """The JSON of a :class:`~pagebrain.server.api.responses.CompletionResponse`. Removes each sample when it is written."""
    yield heading.answer_start("text_completion")
    num_written = 0
    while answers:
        samples = answers.pop(0)
        writers[num_written].prompt.scores = samples[0].prompt_logprobs
        while samples:
            if num_written:
                yield ","
            yield from writers[num_written].pieces(samples.pop(0))
            num_written += 1
    yield f'],"usage":{encode_json(usage(streams))}}}'


class CompletionEvents:
    """The answers of a request as server-sent events."""

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
        self._held: dict[int, list[OutputDelta]] = {}  # prompt -> deltas that wait for the prompt's scores
        if streams[0].params.prompt_logprobs is not None:
            self._held = {index: [] for index in range(len(streams))}

    def opening(self) -> str:
        """Empty: the first event is sent with the first token."""
        return ""

    def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str | Iterator[str]:
        """An event for each of ``deltas``."""
        first = prompt_index * self._num_samples
        if self._is_plain:
            heads, tails = self._heads, self._tails
            return "".join(
                [f"{heads[first + delta.index]}{quote(delta.text)}{tails[delta.finish_reason]}" for delta in deltas]
            )
        if prompt_index in self._held:
            deltas = self._with_held(prompt_index, deltas)
        return self._events(prompt_index, deltas) if deltas else ""

    def _events(self, prompt_index: int, deltas: list[OutputDelta]) -> Iterator[str]:
        first = prompt_index * self._num_samples
        for delta in deltas:
            self._usage.count(prompt_index, delta)
            yield f"{self._start}["
            yield from self._writers[first + delta.index].pieces(delta, space=" ")
            yield f"]{self._usage.end(prompt_index, delta.index)}"

    def ending(self) -> str:
        """The event with the usage, if requested, and the end of the stream."""
        return self._usage.ending(self._start)

    def _with_held(self, prompt_index: int, deltas: list[OutputDelta]) -> list[OutputDelta]:
        """The deltas to write now. All are held until one brings the prompt's scores; other samples may be ahead of it."""
        held = self._held[prompt_index]
        held.extend(deltas)
        scores = next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None)
        if scores is not None:
            self._writers[prompt_index * self._num_samples].prompt.scores = scores
        elif not any(delta.finish_reason == "abort" for delta in deltas):
            return []
        del self._held[prompt_index]
        return held
