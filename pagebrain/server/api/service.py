"""What the routes share: the engine's client, the model's name, and the submission of requests."""

import ipaddress
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request

from pagebrain.outputs import OutputDelta
from pagebrain.sampling_params import BeamSearchParams, SamplingParams
from pagebrain.server.api.heavy import encode_json
from pagebrain.server.api.held import HeldAnswers, Hold, JsonShape, held_bytes, json_bytes, mib
from pagebrain.server.api.logprob_json import TokenTexts
from pagebrain.server.api.prompts import PromptReader
from pagebrain.server.api.protocol import StreamOptions
from pagebrain.server.api.responses import Usage
from pagebrain.server.api.sse import DONE
from pagebrain.server.error_responses import ApiError, bad_request
from pagebrain.server.link.client import EngineClient
from pagebrain.server.link.streams import DrainingError, RequestStream
from pagebrain.server.options import ServerOptions

MAX_ITEMS = 2_000_000
"""Most tokens and log-probabilities that a request may ask for, streamed or not."""

MAX_SECRET_CHARACTERS = 128
SECRET_HEADER = "X-PageBrain-Page"
"""The live page sends a random secret with its prompts, and again to stop one of them. The secret is never logged."""


@dataclass
class Service:
    """The state that all routes use.

    Attributes:
        prompts: makes token ids of prompts.
        texts: the texts of single tokens.
        held: memory reserved for answers in one piece, from the request until the answer was sent.
        started: Unix time in seconds.
    """

    client: EngineClient
    options: ServerOptions
    prompts: PromptReader = field(init=False)
    texts: TokenTexts = field(init=False)
    held: HeldAnswers = field(init=False)
    started: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = PromptReader(self.client, self.options.chat_template)
        self.texts = TokenTexts(self.client.detokenizer)
        self.held = HeldAnswers(self.options.max_held_bytes)
        self.started = int(time.time())

    @property
    def model_name(self) -> str:
        """The model's name for clients."""
        return self.options.served_model_name

    def check_model(self, name: str | None) -> None:
        """Raise ``ApiError`` (404) if ``name`` is given and is not the served model's."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {name[:80]!r} does not exist: this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        answer_id: str,
        request: Request,
        user: str | None = None,
        cache_salt: str | None = None,
        beam_params: BeamSearchParams | None = None,
    ) -> list[RequestStream]:
        """Submit all prompts to the engine, or none.

        Raises ``ApiError`` (400) if too many tokens are requested, and what :meth:`EngineClient.submit_all` raises.

        Args:
            answer_id: id of the engine's request. Of several prompts each gets its index appended.
            request: the client's request. It has arrived when its body was complete.
            user: the end user's name, for the request log.
            cache_salt: the request shares cached prefixes only with requests of the same salt.
            beam_params: of a request for beam search, whose ``params`` say how large the answers can be.
        """
        secret = page_secret(request)
        self._check_size(prompts, params)
        ids = [answer_id] if len(prompts) == 1 else [f"{answer_id}-{index}" for index in range(len(prompts))]
        source = client_of(request) if self.options.fair_queue else None
        requests: list[tuple[Iterable[int], SamplingParams, str]] = [
            (prompt, params, name) for prompt, name in zip(prompts, ids)
        ]
        streams = self.client.submit_all(requests, source, cache_salt, beam_params)
        for stream in streams:
            stream.user, stream.secret, stream.arrival_s = user, secret, request.state.arrival_s
        return streams

    def submit_whole(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        answer_id: str,
        request: Request,
        user: str | None,
        cache_salt: str | None,
        shape: JsonShape,
        echo: bool = False,
        beam_params: BeamSearchParams | None = None,
    ) -> tuple[list[RequestStream], Hold]:
        """:meth:`submit` for an answer in one piece. Also returns the memory reserved for it; the caller closes it.

        Also raises ``ApiError``: 400 if the answer can become longer than the limit, 503 if too little memory is free.

        Args:
            shape: the JSON sizes of log-probabilities.
            echo: the answer begins with the prompt.
        """
        self._check_size(prompts, params)
        lengths = [(len(prompt), self._max_generated(prompt, params)) for prompt in prompts]
        longest = sum(json_bytes(params, *length, shape, echo) for length in lengths)
        if longest > self.options.max_answer_bytes:
            raise bad_request(
                f"the answer could have about {mib(longest)}, and an answer in one piece may have at most "
                f"{mib(self.options.max_answer_bytes)}: lower 'n', 'max_tokens' or 'logprobs' (or 'top_logprobs'), split "
                f"the request, or stream its answer",
                "n",
            )
        hold = self.held.hold(sum(held_bytes(params, *length) for length in lengths))
        try:
            hold.use(sum(held_bytes(params, num_tokens, 0) for num_tokens, _ in lengths))
            return self.submit(prompts, params, answer_id, request, user, cache_salt, beam_params), hold
        except BaseException:
            hold.close()
            raise

    def _max_generated(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Most generated tokens, all samples of a prompt together."""
        max_model_len = self.client.config.max_model_len
        assert max_model_len is not None
        room = max(0, max_model_len - len(prompt))
        limit = room if params.max_tokens is None else params.max_tokens
        return min(room, limit) * params.n

    def _check_size(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        items = sum(num_items(params, len(prompt), self._max_generated(prompt, params)) for prompt in prompts)
        if items > MAX_ITEMS:
            raise bad_request(
                f"'n', 'max_tokens', 'logprobs' (or 'top_logprobs') and the prompts together ask for up to {items} tokens "
                f"and log-probabilities, and a request gets at most {MAX_ITEMS}: lower one of them, or split the request",
                "n",
            )

    def check_complete(self, answers: list[list[OutputDelta]]) -> None:
        """Raise ``DrainingError`` or ``ApiError`` (503) if an answer was aborted."""
        if not any(delta.finish_reason == "abort" for deltas in answers for delta in deltas):
            return
        if self.client.is_draining:
            raise DrainingError("the server shut down before the answer was complete")
        raise ApiError(503, "the request was stopped before its answer was complete", code="request_stopped")


def client_of(request: Request) -> str:
    """The client that a request comes from: its IPv4 address, or the /64 network of its IPv6 address.

    All clients share one API key, so the key does not tell them apart. A name that the client sends is not used: a client
    with a new name for each request would get every turn of the queue.
    """
    host = "" if request.client is None else request.client.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket, or a name from a proxy
        return host
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))


def page_secret(request: Request) -> str | None:
    """The live page's secret, which stops the request; ``None`` without the header. Raises ``ApiError`` (400)."""
    secret = request.headers.get(SECRET_HEADER)
    if secret is not None and not 0 < len(secret) <= MAX_SECRET_CHARACTERS:
        raise bad_request(f"the header {SECRET_HEADER} must have 1 to {MAX_SECRET_CHARACTERS} characters, got {len(secret)}")
    return secret


def num_items(params: SamplingParams, num_prompt_tokens: int, num_generated: int) -> int:
    """Tokens and log-probabilities in the answers to one prompt. Each sample repeats the prompt's log-probabilities."""
    items = num_generated * (1 + (params.logprobs or 0))
    if params.prompt_logprobs is not None:
        items += params.n * num_prompt_tokens * (1 + params.prompt_logprobs)
    return items


@dataclass(frozen=True)
class Heading:
    """The first fields of an answer, and of every event of a streamed answer."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str, request_id: str | None = None) -> "Heading":
        """The heading of a new answer. Its id holds ``request_id``, or a random one."""
        return cls(f"{prefix}-{request_id or uuid.uuid4().hex}", int(time.time()), model)

    def answer_start(self, kind: str) -> str:
        """The JSON of an answer in one piece, up to its first choice."""
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return f'{encode_json(fields)[:-1]},"choices":['

    def event_start(self, kind: str) -> str:
        """An event up to the value of ``choices``. Made once for a stream."""
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return f"data: {json.dumps(fields)[:-1]}, " + '"choices": '


def usage(streams: Sequence[RequestStream]) -> Usage:
    """The tokens of a request's prompts and answers."""
    counted = _usage(sum(stream.num_prompt_tokens for stream in streams), sum(stream.num_generated for stream in streams))
    found = [stream.metrics.num_cached_tokens or 0 for stream in streams if stream.metrics is not None]
    counted["prompt_tokens_details"] = {"cached_tokens": sum(found)}
    return counted


def _usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class StreamUsage:
    """The field ``usage`` in the events of a stream.

    With ``include_usage`` a last event has the sum over all answers, and ``usage`` is ``null`` in the events before it. With
    ``continuous_usage_stats`` each event before it counts its answer: the prompt, and the tokens sent so far.
    """

    def __init__(self, streams: Sequence[RequestStream], options: StreamOptions) -> None:
        self._streams = streams
        self._has_last = bool(options.include_usage)
        self.is_continuous = bool(options.continuous_usage_stats)
        self._num_generated: Counter[tuple[int, int]] = Counter()
        self.plain_end = ', "usage": null}\n\n' if self._has_last else "}\n\n"

    def count(self, prompt_index: int, delta: OutputDelta) -> None:
        """Count the delta's tokens."""
        self._num_generated[prompt_index, delta.index] += len(delta.token_ids)

    def end(self, prompt_index: int, sample_index: int) -> str:
        """The end of an event, after its choices."""
        if not self.is_continuous:
            return self.plain_end
        prompt_tokens = self._streams[prompt_index].num_prompt_tokens
        counted = _usage(prompt_tokens, self._num_generated[prompt_index, sample_index])
        return f', "usage": {json.dumps(counted)}}}\n\n'

    def ending(self, event_start: str) -> str:
        """The event with the usage, if requested, and the end of the stream."""
        return (f'{event_start}[], "usage": {json.dumps(usage(self._streams))}}}\n\n' if self._has_last else "") + DONE
