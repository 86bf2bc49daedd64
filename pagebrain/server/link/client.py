"""The server's side of the engine: requests go in, each one's tokens come out of a stream of its own.

An :class:`EngineClient` starts the engine's process and belongs to the event loop, as everything here does. It never waits
for the engine: what has come is delivered in a callback, and whoever reads a :class:`RequestStream` gets all that came
meanwhile in one piece, so a slow reader holds up nobody.
"""

import asyncio
import hmac
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pagebrain import errors
from pagebrain.config import PageBrainConfig
from pagebrain.engine.detokenizer import Detokenizer
from pagebrain.engine.requests import NO_TOKENIZER, Prompt, checked_token_ids, encode_text, max_num_tokens
from pagebrain.engine.trace import EngineStats
from pagebrain.errors import InvalidRequestError
from pagebrain.models.loading import load_text
from pagebrain.sampling_params import SamplingParams
from pagebrain.server.api.templates import own_template
from pagebrain.server.link.admission import Admission
from pagebrain.server.link.messages import (
    Abort,
    Control,
    ControlAction,
    Delta,
    Ended,
    Failed,
    LiveUpdate,
    Paused,
    Ready,
    Refused,
    Stepped,
    Submit,
    Watch,
)
from pagebrain.server.link.observers import Observers
from pagebrain.server.link.process import EngineProcess
from pagebrain.server.link.streams import (
    Backlog,
    DrainingError,
    EngineDeadError,
    LiveSubscription,
    RequestFailedError,
    RequestStream,
)
from pagebrain.server.options import ServerOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class EngineClient:
    """The engine, seen from the server's process.

    Attributes:
        config: as it was given; resolved once :meth:`start` has returned.
        stats: how the engine stood when it last spoke.
        is_draining: no new requests are taken.
        paused: the engine is stopped between two steps.
        failure: why the engine is gone, if it is.
        backlog: what waits for readers of streams.
        observers: told of what happens.
        on_dead: called once if the engine's process ends without having been told to.
    """

    def __init__(self, config: PageBrainConfig, options: ServerOptions) -> None:
        self.config = config
        self.options = options
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.detokenizer: Detokenizer | None = None
        self.notices: tuple[str, ...] = ()
        self.stats = EngineStats()
        self.admission = Admission(options.max_queued_requests, options.max_queued_tokens)
        self.backlog = Backlog(options.max_held_bytes)
        self.observers = Observers()
        self.is_draining = False
        self.paused = False
        self.failure: str | None = None
        self.on_dead: Callable[[], None] | None = None
        self._engine: EngineProcess | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._stopping = False
        self._streams: dict[str, RequestStream] = {}
        self._subscriptions: list[LiveSubscription] = []
        self._aborted: set[str] = set()  # requests that the engine has not let go of yet
        self._paused_waiters: list[asyncio.Future[bool]] = []
        self._heard_s = time.monotonic()
        self._unread: deque[list[Any]] = deque()  # what the engine has said and was not acted on yet

    # Life -------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine's process and wait until it is ready.

        Raises what building the engine raised (``ConfigError``, ``ModelLoadError``, ``PartError``), or ``EngineDeadError``.
        """
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._engine = EngineProcess(self.config, self.options.log_level, self._receive, lambda: self._call(self._on_end))
        try:
            self.tokenizer, self.detokenizer, _ = await asyncio.to_thread(load_text, self.config)
            ready = await self._ready
        except BaseException:
            self._ready.cancel()  # whatever it would say, nobody asks any more
            await self.stop()
            raise
        self.config, self.notices = ready.config, ready.notices
        _, why_no_chats = own_template(self.tokenizer)
        if why_no_chats is not None and self.options.chat_template is None:
            self.notices += (f"chats are refused: {why_no_chats}; name a template with --chat-template",)

    async def stop(self) -> None:
        """End the engine's process; one that is still loading, at once."""
        self._stopping = True
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop(at_once=self._ready is None or not self._ready.done() or self._ready.cancelled())

    def _send(self, message: Any) -> None:
        if self._engine is not None:
            self._engine.send(message)

    @property
    def is_alive(self) -> bool:
        """Whether the engine can serve."""
        return self.failure is None

    @property
    def engine_pid(self) -> int | None:
        """The engine's process, if it was started."""
        return None if self._engine is None else self._engine.pid

    @property
    def num_streams(self) -> int:
        """Requests under way, waiting ones included."""
        return len(self._streams)

    @property
    def silent_s(self) -> float:
        """For how long the engine has said nothing although it should: requests are under way, and it is not paused."""
        return time.monotonic() - self._heard_s if self._is_busy and not self.paused else 0.0

    @property
    def _is_busy(self) -> bool:
        return bool(self._streams or self._aborted)

    def begin_drain(self) -> None:
        """Take no new requests. Those under way go on, also if the engine was paused."""
        self.is_draining = True
        if self.is_alive:
            self._send(Control("resume"))

    def abort_all(self) -> None:
        """End every request under way; whoever reads it sees the finish reason ``abort``."""
        for stream in list(self._streams.values()):
            self._abort(stream)

    def end_subscriptions(self) -> None:
        """Nobody gets live updates any more."""
        for subscription in list(self._subscriptions):
            subscription.end()

    # Requests ---------------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; slow for a long one, and safe to call in a thread."""
        if self.tokenizer is None:
            raise InvalidRequestError(f"the prompt is text, and {NO_TOKENIZER}: give it as a list of token ids")
        return encode_text(self.tokenizer, text, add_special_tokens)

    def check(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """The prompt's token ids. Raises ``InvalidRequestError`` for what can never be served, as the engine would."""
        token_ids = checked_token_ids(prompt, None if self.tokenizer is None else self.encode, params, self.config)
        params.check_vocabulary(self.config.vocab_size or 0)
        if params.stop and self.detokenizer is None:
            raise InvalidRequestError(f"stop strings are text, and {NO_TOKENIZER}: use stop_token_ids")
        max_num_tokens(len(token_ids), params, self.config)
        return token_ids

    def submit(self, prompt_token_ids: Iterable[int], params: SamplingParams, request_id: str) -> RequestStream:
        """Hand a request to the engine. Close the stream when nobody reads it any more.

        Raises ``InvalidRequestError``, ``QueueFullError``, ``DrainingError`` or ``EngineDeadError``, before anything has
        changed.
        """
        return self.submit_all([(prompt_token_ids, params, request_id)])[0]

    def submit_all(
        self, requests: list[tuple[Iterable[int], SamplingParams, str]], source: str | None = None
    ) -> list[RequestStream]:
        """The same for several requests, of which all are taken or none.

        With a ``source`` they wait for the turn of that client; without one they are served in order of arrival.
        """
        self._act_on_unread()  # the event loop may be busy with requests for long; those that started by now have made room
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
            self._heard_s = time.monotonic()  # until now there was nothing to say
        for stream in streams:
            self.admission.wait(stream.request_id, _work(stream), source)
            self._streams[stream.request_id] = stream
            self._send(Submit(stream.request_id, stream.prompt_token_ids, stream.params, source))
        return streams

    def abort_request(self, request_id: str, secret: str) -> bool:
        """End one request on behalf of whoever made it; its reader sees the finish reason ``abort``.

        False if there is none under way with that id and secret.
        """
        stream = self._streams.get(request_id)
        if stream is None or stream.secret is None or not hmac.compare_digest(stream.secret.encode(), secret.encode()):
            return False
        self._abort(stream)
        return True

    def _abort(self, stream: RequestStream) -> None:
        stream.abort()
        self._give_up(stream, "abort")

    def _give_up(self, stream: RequestStream, outcome: str) -> None:
        """End a request that the engine is still at."""
        self._aborted.add(stream.request_id)
        self._send(Abort(stream.request_id))
        self._over(stream, outcome)

    def _close(self, stream: RequestStream) -> None:
        """Nobody reads the stream any more."""
        if self._streams.get(stream.request_id) is stream:
            self._give_up(stream, "abort")

    def _over(self, stream: RequestStream, outcome: str) -> None:
        del self._streams[stream.request_id]
        self.admission.leave(stream.request_id)
        self.observers.tell(lambda observer: observer.on_finished(stream, outcome))

    # The live view ----------------------------------------------------------------------------------------------------

    def subscribe_live(self) -> LiveSubscription:
        """Updates of the live view, for as long as the subscription is open; the engine makes them only while one is."""
        subscription = LiveSubscription(on_close=self._unsubscribe)
        self._subscriptions.append(subscription)
        if self.is_alive:
            self._send(Watch(True))  # a new one starts with how things stand
        else:
            subscription.end()
        return subscription

    def _unsubscribe(self, subscription: LiveSubscription) -> None:
        self._subscriptions.remove(subscription)
        if not self._subscriptions and self.is_alive:
            self._send(Watch(False))

    async def control(self, action: ControlAction) -> bool:
        """Pause, resume or single-step the engine; returns whether it is paused now. Raises ``EngineDeadError``."""
        if self.failure is not None:
            raise EngineDeadError(f"the engine has stopped: {self.failure}")
        if self.is_draining:
            raise DrainingError("the server is shutting down and cannot be paused")
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._paused_waiters.append(waiter)
        self._send(Control(action))
        return await waiter

    # What the engine says ---------------------------------------------------------------------------------------------

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """Call on the event loop, from another thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            logger.debug("the event loop is closed")

    def _receive(self, messages: list[Any]) -> None:
        self._unread.append(messages)
        self._call(self._act_on_unread)

    def _act_on_unread(self) -> None:
        while self._unread:
            self._act_on_all(self._unread.popleft())

    def _act_on_all(self, messages: list[Any]) -> None:
        for message in messages:
            try:
                self._act_on(message)
            except Exception as error:  # what it said is lost: better no engine than requests that wait for ever
                logger.exception("a message of the engine's could not be handled")
                self._die(f"the server failed over one of its messages ({type(error).__name__})")
                if self._engine is not None:
                    self._engine.kill()

    def _act_on(self, message: Any) -> None:
        self._heard_s = time.monotonic()
        if isinstance(message, Stepped):
            self._deliver(message)
        elif isinstance(message, LiveUpdate):
            for subscription in self._subscriptions:
                subscription.put(message.update)
        elif isinstance(message, Paused):
            self._see_paused(message.paused)
        elif isinstance(message, Refused):
            self._see_refused(message)
        elif isinstance(message, Ended):
            self._aborted.discard(message.request_id)
        elif isinstance(message, Ready):
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(message)
        elif isinstance(message, Failed):
            self._see_failed(message)

    def _deliver(self, message: Stepped) -> None:
        now_s = time.monotonic()
        self.stats = message.stats
        num_tokens = 0
        gaps_s: list[float] = []
        for packed in message.deltas:
            delta = Delta._make(packed)
            num_tokens += len(delta.token_ids)
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue  # closed meanwhile
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
        self.observers.tell(lambda observer: observer.on_step(message.stats))
        if num_tokens:
            self.observers.tell(lambda observer: observer.on_tokens(num_tokens, gaps_s))

    def _see_first_token(self, stream: RequestStream, now_s: float) -> None:
        self.admission.start(stream.request_id)
        self.observers.tell(lambda observer: observer.on_first_token(stream, now_s - stream.arrival_s))

    def _see_paused(self, paused: bool) -> None:
        self.paused = paused
        if self._paused_waiters:
            waiter = self._paused_waiters.pop(0)
            if not waiter.done():
                waiter.set_result(paused)

    def _see_refused(self, refused: Refused) -> None:
        stream = self._streams.get(refused.request_id)
        if stream is not None:
            stream.fail((InvalidRequestError if refused.is_mistake else RequestFailedError)(refused.message))
            self._over(stream, "error")

    def _see_failed(self, failed: Failed) -> None:
        if self._ready is not None and not self._ready.done():
            kind = getattr(errors, failed.error, None) or EngineDeadError
            self._ready.set_exception(kind(failed.message))
        self._die(failed.message)

    def _on_end(self) -> None:
        self._die("its process ended unexpectedly")

    def _die(self, reason: str) -> None:
        """The engine is gone: everybody who waits for it is told, at once."""
        if self.failure is not None or self._stopping:
            return
        self.failure = reason
        error = EngineDeadError(f"the engine has stopped: {reason}")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
            return
        for stream in list(self._streams.values()):
            stream.fail(error)
            self._over(stream, "error")
        for waiter in self._paused_waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self.end_subscriptions()
        if self.on_dead is not None:
            self.on_dead()


def _work(stream: RequestStream) -> int:
    """Prompt tokens that the engine computes for a request."""
    return stream.num_prompt_tokens * stream.params.n
