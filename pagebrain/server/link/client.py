"""The streams of the requests under way, and the admission of new requests.

An :class:`EngineClient` admits requests and puts the tokens of each request into its stream. It calls the engine through an
:class:`~pagebrain.server.link.handle.EngineHandle`. It belongs to the event loop and never waits for the engine. A read of a
:class:`RequestStream` returns everything since the last read, so a slow reader does not delay other readers.
"""

import asyncio
import hmac
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pagebrain.config import PageBrainConfig
from pagebrain.engine.detokenizer import Detokenizer
from pagebrain.engine.requests import NO_TOKENIZER, Prompt, checked_token_ids, encode_text, max_num_tokens
from pagebrain.engine.trace import EngineStats
from pagebrain.errors import InvalidRequestError
from pagebrain.models.loading import load_text
from pagebrain.outputs import OutputDelta
from pagebrain.sampling_params import BeamSearchParams, SamplingParams
from pagebrain.server.link.admission import Admission
from pagebrain.server.link.handle import EngineDeadError, EngineHandle
from pagebrain.server.link.messages import ControlAction, Submit
from pagebrain.server.link.observers import Observers
from pagebrain.server.link.streams import (
    Backlog,
    DrainingError,
    LiveSubscription,
    RequestFailedError,
    RequestStream,
)
from pagebrain.server.options import ServerOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EngineClient:
    """The streams of the requests under way, in front of an engine.

    Attributes:
        is_draining: new requests are refused.
        failure: why the engine has stopped; ``None`` while it runs.
        backlog: data that waits for the readers of streams.
        observers: metrics and the request log.
        on_failure: called once if the engine stops unexpectedly.
    """

    def __init__(self, handle: EngineHandle, options: ServerOptions) -> None:
        self.handle = handle
        self.options = options
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.detokenizer: Detokenizer | None = None
        self.admission = Admission(options.max_queued_requests, options.max_queued_tokens)
        self.backlog = Backlog(options.max_held_bytes)
        self.observers = Observers()
        self.is_draining = False
        self.failure: str | None = None
        self.on_failure: Callable[[], None] | None = None
        self._streams: dict[str, RequestStream] = {}
        self._subscriptions: list[LiveSubscription] = []
        self._aborted: set[str] = set()  # aborted requests that the engine may still compute
        self._busy_since_s = 0.0

    # Life -------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises what the handle's ``start`` raises."""
        starting = asyncio.ensure_future(self.handle.start(self))
        try:
            await asyncio.sleep(0)  # the engine begins to load
            self.tokenizer, self.detokenizer, _ = await asyncio.to_thread(load_text, self.config)
            await starting
        except BaseException:
            starting.cancel()
            await self.stop()
            await asyncio.gather(starting, return_exceptions=True)
            raise

    async def stop(self) -> None:
        """End the engine."""
        await self.handle.stop()

    @property
    def config(self) -> PageBrainConfig:
        """The engine's config; resolved once :meth:`start` has returned."""
        return self.handle.config

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its last step."""
        return self.handle.stats

    @property
    def paused(self) -> bool:
        """Whether the engine is stopped between two steps."""
        return self.handle.paused

    @property
    def is_alive(self) -> bool:
        """Whether the engine has not failed."""
        return self.failure is None

    @property
    def engine_pid(self) -> int | None:
        """Id of the engine's process; ``None`` before it starts."""
        return self.handle.pid

    @property
    def num_streams(self) -> int:
        """Requests under way, waiting ones included."""
        return len(self._streams)

    @property
    def silent_s(self) -> float:
        """Seconds since the last message of an engine that has requests and is not paused; otherwise 0."""
        if self.paused or not self._is_busy:
            return 0.0
        return time.monotonic() - max(self.handle.heard_s, self._busy_since_s)

    @property
    def _is_busy(self) -> bool:
        return bool(self._streams or self._aborted)

    def begin_drain(self) -> None:
        """Refuse new requests. Requests under way continue; a paused engine is resumed."""
        self.is_draining = True
        if self.is_alive:
            resumed = self.handle.control("resume")
            resumed.add_done_callback(lambda done: done.cancelled() or done.exception())  # the result is not used

    def abort_all(self) -> None:
        """End every request under way with the finish reason ``abort``."""
        for stream in list(self._streams.values()):
            self._abort(stream)

    def end_subscriptions(self) -> None:
        """End all live updates."""
        for subscription in list(self._subscriptions):
            subscription.end()

    # Requests ---------------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Slow for a long text; safe to call in a thread."""
        if self.tokenizer is None:
            raise InvalidRequestError(f"the prompt is text, and {NO_TOKENIZER}: give it as a list of token ids")
        return encode_text(self.tokenizer, text, add_special_tokens)

    def check(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """The prompt's token ids. Raises ``InvalidRequestError`` for a request that the engine would refuse."""
        token_ids = checked_token_ids(prompt, None if self.tokenizer is None else self.encode, params, self.config)
        params.check_vocabulary(self.config.vocab_size or 0)
        if params.stop and self.detokenizer is None:
            raise InvalidRequestError(f"stop strings are text, and {NO_TOKENIZER}: use stop_token_ids")
        max_num_tokens(len(token_ids), params, self.config)
        return token_ids

    def submit(self, prompt_token_ids: Iterable[int], params: SamplingParams, request_id: str) -> RequestStream:
        """Send a request to the engine. Close the stream when you stop reading it.

        Raises ``InvalidRequestError``, ``QueueFullError``, ``DrainingError`` or ``EngineDeadError``, before anything
        changed.
        """
        return self.submit_all([(prompt_token_ids, params, request_id)])[0]

    def submit_all(
        self,
        requests: list[tuple[Iterable[int], SamplingParams, str]],
        source: str | None = None,
        cache_salt: str | None = None,
        beam_params: BeamSearchParams | None = None,
    ) -> list[RequestStream]:
        """Send all of several requests to the engine, or none.

        With a ``source`` they wait for the turn of that client. Without one they are served in order of arrival. They share
        cached prefixes only with requests of the same ``cache_salt``. With ``beam_params`` they are answered by beam search.
        """
        self.handle.poll()  # the event loop may have been busy for long, and started requests leave the queue
        if self.failure is not None:
            raise EngineDeadError(f"the engine has stopped: {self.failure}")
        if self.is_draining:
            raise DrainingError("the server is shutting down and takes no new requests")
        streams = []
        for prompt_token_ids, params, request_id in requests:
            token_ids = self.check(tuple(prompt_token_ids), params)
            streams.append(RequestStream(request_id, token_ids, params, self._close, self.backlog))
        names = [stream.request_id for stream in streams]
        if len(set(names)) < len(names) or not self._aborted.union(self._streams).isdisjoint(names):
            raise InvalidRequestError(f"request ids must differ from each other and from those under way, got {names}")
        self.admission.check(len(streams), sum(_work(stream) for stream in streams), source)
        if not self._is_busy:
            self._busy_since_s = time.monotonic()
        for stream in streams:
            self.admission.wait(stream.request_id, _work(stream), source)
            self._streams[stream.request_id] = stream
            self.handle.submit(
                Submit(stream.request_id, stream.prompt_token_ids, stream.params, source, cache_salt, beam_params)
            )
        return streams

    def abort_request(self, request_id: str, secret: str) -> bool:
        """End one request with the finish reason ``abort``. False if none is under way with that id and secret."""
        stream = self._streams.get(request_id)
        if stream is None or stream.secret is None or not hmac.compare_digest(stream.secret.encode(), secret.encode()):
            return False
        self._abort(stream)
        return True

    def _abort(self, stream: RequestStream) -> None:
        stream.abort()
        self._give_up(stream, "abort")

    def _give_up(self, stream: RequestStream, outcome: str) -> None:
        """End a request that the engine may still compute."""
        self._aborted.add(stream.request_id)
        self.handle.abort(stream.request_id)
        self._over(stream, outcome)

    def _close(self, stream: RequestStream) -> None:
        """Called when the reader closes the stream."""
        if self._streams.get(stream.request_id) is stream:
            self._give_up(stream, "abort")

    def _over(self, stream: RequestStream, outcome: str) -> None:
        del self._streams[stream.request_id]
        self.admission.leave(stream.request_id)
        self.observers.tell(lambda observer: observer.on_finished(stream, outcome))

    # The live view ----------------------------------------------------------------------------------------------------

    def subscribe_live(self) -> LiveSubscription:
        """Updates of the live view. The engine makes them only while a subscription is open."""
        subscription = LiveSubscription(on_close=self._unsubscribe)
        self._subscriptions.append(subscription)
        if self.is_alive:
            self.handle.watch(True)  # a new subscription starts with the present state
        else:
            subscription.end()
        return subscription

    def _unsubscribe(self, subscription: LiveSubscription) -> None:
        self._subscriptions.remove(subscription)
        if not self._subscriptions and self.is_alive:
            self.handle.watch(False)

    async def control(self, action: ControlAction) -> bool:
        """Pause, resume or single-step the engine. Returns whether it is paused. Raises ``EngineDeadError``."""
        if self.failure is not None:
            raise EngineDeadError(f"the engine has stopped: {self.failure}")
        if self.is_draining:
            raise DrainingError("the server is shutting down and cannot be paused")
        return await self.handle.control(action)

    # Calls of the handle ----------------------------------------------------------------------------------------------

    def on_step(self, deltas: Sequence[OutputDelta], stats: EngineStats) -> None:
        """Put the deltas into their streams; see :class:`~pagebrain.server.link.handle.EngineListener`."""
        now_s = time.monotonic()
        num_tokens = 0
        gaps_s: list[float] = []
        for delta in deltas:
            num_tokens += len(delta.token_ids)
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue  # the reader has closed it
            if stream.first_token_s is None:
                self._see_first_token(stream, now_s)
            gap_s = stream.put(delta, now_s)
            if gap_s is not None:
                gaps_s.append(gap_s)
            if stream.is_finished:
                self._over(stream, str(delta.finish_reason))
            elif stream.is_broken:
                self._give_up(stream, "error")
        for stream in self.backlog.shed():
            if self._streams.get(stream.request_id) is stream:
                self._give_up(stream, "error")
        self.observers.tell(lambda observer: observer.on_step(stats))
        if num_tokens:
            self.observers.tell(lambda observer: observer.on_tokens(num_tokens, gaps_s))

    def _see_first_token(self, stream: RequestStream, now_s: float) -> None:
        self.admission.start(stream.request_id)
        self.observers.tell(lambda observer: observer.on_first_token(stream, now_s - stream.arrival_s))

    def on_refused(self, request_id: str, message: str, is_mistake: bool) -> None:
        """Fail a request; see :class:`~pagebrain.server.link.handle.EngineListener`."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.fail((InvalidRequestError if is_mistake else RequestFailedError)(message))
            self._over(stream, "error")

    def on_ended(self, request_id: str) -> None:
        """Let the id of an aborted request be used again; see :class:`~pagebrain.server.link.handle.EngineListener`."""
        self._aborted.discard(request_id)

    def on_live(self, update: dict[str, Any]) -> None:
        """Pass an update on; see :class:`~pagebrain.server.link.handle.EngineListener`."""
        for subscription in self._subscriptions:
            subscription.put(update)

    def on_dead(self, reason: str) -> None:
        """Fail all requests at once; see :class:`~pagebrain.server.link.handle.EngineListener`."""
        self.failure = reason
        error = EngineDeadError(f"the engine has stopped: {reason}")
        for stream in list(self._streams.values()):
            stream.fail(error)
            self._over(stream, "error")
        self.end_subscriptions()
        if self.on_failure is not None:
            self.on_failure()


def _work(stream: RequestStream) -> int:
    """Prompt tokens that the engine computes for a request."""
    return stream.num_prompt_tokens * stream.params.n
