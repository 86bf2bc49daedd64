"""``POST /v1/completions``: one or many prompts, each continued ``n`` times.

An answer is written from what the engine says by :class:`ChoiceWriter`, the same way whether it comes in one piece or is
streamed: as pieces of JSON, for an answer with log-probabilities may be long. Most streams want neither ``echo`` nor
``logprobs``; for them an event is three strings put together.
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
        if body.stream:
            streams = service.submit(prompts, params, heading.id, request, body.end_user)
            writers = make_writers(service, body, streams)
            return EventStream(streams, CompletionEvents(heading, streams, writers, options))
        streams, hold = service.submit_whole(
            prompts, params, heading.id, request, body.end_user, shape=COMPLETION, echo=bool(body.echo)
        )

        def write(answers: Answers) -> Iterator[str]:
            service.check_complete(answers)
            return whole_pieces(heading, streams, make_writers(service, body, streams), answers)

        return WholeAnswer(streams, hold, write)

    return router


class ChoiceWriter:
    """One answer: what each piece of news adds to it, the prompt's echo first.

    Args:
        index: of the answer among all of the request's.
        prompt: its prompt's scores, shared with the other samples.
        echo: the prompt's text, if the answer is to begin with it.
        scorer: makes the logprobs, if they are wanted.
    """

    def __init__(self, index: int, prompt: ScoredPrompt, echo: str | None, scorer: CompletionScorer | None) -> None:
        self.index = index
        self.prompt = prompt
        self._echo = echo
        self._scorer = scorer

    @property
    def is_plain(self) -> bool:
        """Whether a piece of the answer is the piece of text that was generated, and nothing more."""
        return self._echo is None and self._scorer is None

    def pieces(self, delta: OutputDelta, space: str = "") -> Iterator[str]:
        """What the delta adds, as a choice in JSON; the scores of the prompt, which must be there, go with the first.

        ``space`` stands after colons and commas, as in the other events of a stream.
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
    """A writer for each answer: those of the first prompt first."""
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
    """The JSON of a :class:`~pagebrain.server.api.responses.CompletionResponse`. What was written is dropped."""
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

    def opening(self) -> str:
        """Nothing: the first event comes with the first token."""
        return ""

    def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str | Iterator[str]:
        """An event for each answer that has grown."""
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
        """The usage, if it was asked for, and the end."""
        return self._usage.ending(self._start)

    def _with_held(self, prompt_index: int, deltas: list[OutputDelta]) -> list[OutputDelta]:
        """The samples share their prompt, whose scores come with the first: the others' tokens may come before them."""
        held = self._held[prompt_index]
        held.extend(deltas)
        scores = next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None)
        if scores is not None:
            self._writers[prompt_index * self._num_samples].prompt.scores = scores
        elif not any(delta.finish_reason == "abort" for delta in deltas):
            return []
        del self._held[prompt_index]
        return held
