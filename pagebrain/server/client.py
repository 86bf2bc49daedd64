"""The server's side of the engine: requests go in, each one's tokens come out of a stream of its own.

An :class:`EngineClient` starts the engine's process and belongs to the event loop, as everything here does. It never waits
for the engine: what has come is delivered in a callback, and whoever reads a :class:`RequestStream` gets all that came
meanwhile in one piece, so a slow reader holds up nobody.
"""

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pagebrain import errors
from pagebrain.config import PageBrainConfig
from pagebrain.detokenizer import Detokenizer
from pagebrain.errors import InvalidRequestError, PageBrainError
from pagebrain.loading import load_tokenizer
from pagebrain.requests import Prompt, checked_token_ids, max_num_tokens
from pagebrain.sampling_params import SamplingParams
from pagebrain.server import worker
from pagebrain.server.admission import Admission
from pagebrain.server.messages import (
    Abort,
    Channel,
    Control,
    ControlAction,
    Failed,
    LiveUpdate,
    PackedDelta,
    Paused,
    Ready,
    Refused,
    Shutdown,
    Stepped,
    Submit,
    Watch,
)
from pagebrain.server.observers import Observers
from pagebrain.server.options import ServerOptions
from pagebrain.server.streams import DrainingError, EngineDeadError, LiveSubscription, RequestStream
from pagebrain.trace import EngineStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SHUTDOWN_S = 5.0
"""How long the engine's process may take to end before it is killed."""


class EngineClient:
    """The engine, seen from the server's process.

    Attributes:
        config: as it was given; resolved once :meth:`start` has returned.
        stats: how the engine stood when it last spoke.
        is_draining: no new requests are taken.
        paused: the engine is stopped between two steps.
        failure: why the engine is gone, if it is.
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
        self.observers = Observers()
        self.is_draining = False
        self.paused = False
        self.failure: str | None = None
        self.on_dead: Callable[[], None] | None = None
        self._streams: dict[str, RequestStream] = {}
        self._subscriptions: list[LiveSubscription] = []
        self._paused_waiters: list[asyncio.Future[bool]] = []
        self._stopping = False

    # Life -------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine's process and wait until it is ready.

        Raises what building the engine raised: ``ConfigError``, ``ModelLoadError``, ``PartError``.
        """
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.process = context.Process(
            target=worker.main, args=(theirs, self.config, self.options.log_level), name="pagebrain-engine", daemon=True
        )
        self.process.start()
        theirs.close()  # so that the engine's process alone holds it, and its death is seen here
        self._channel = Channel(ours, self._receive, lambda: self._call(self._on_end), name="pagebrain-server")
        self._channel.start()
        try:
            self.tokenizer = await asyncio.to_thread(load_tokenizer, self.config)
            self.detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer)
            ready = await self._ready
        except BaseException:
            await self.stop()
            raise
        self.config, self.notices = ready.config, ready.notices

    async def stop(self) -> None:
        """End the engine's process, whatever it is doing."""
        self._stopping = True
        self._channel.send(Shutdown())
        await asyncio.to_thread(self.process.join, SHUTDOWN_S)
        if self.process.is_alive():
            self.process.kill()
            await asyncio.to_thread(self.process.join)

    @property
    def is_alive(self) -> bool:
        """Whether the engine can serve."""
        return self.failure is None

    @property
    def num_streams(self) -> int:
        """Requests under way, waiting ones included."""
        return len(self._streams)

    def begin_drain(self) -> None:
        """Take no new requests. Those under way go on, also if the engine was paused."""
        self.is_draining = True
        if self.is_alive:
            self._channel.send(Control("resume"))

    def abort_all(self) -> None:
        """End every request under way; whoever reads it sees the finish reason ``abort``."""
        for stream in list(self._streams.values()):
            self._abort(stream)

    def end_subscriptions(self) -> None:
        """Nobody gets live updates any more."""
        for subscription in list(self._subscriptions):
            subscription.end()

    # Requests ---------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; slow for a long one, and safe to call in a thread."""
        if self.tokenizer is None:
            raise InvalidRequestError("the model has no tokenizer: give the prompt as a list of token ids")
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def check(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """The prompt's token ids. Raises ``InvalidRequestError`` for what can never be served, as the engine would."""
        token_ids = checked_token_ids(prompt, None if self.tokenizer is None else self.encode, self.config)
        params.check_vocabulary(self.config.vocab_size or 0)
        if params.stop and self.detokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer, and the model has none: use stop_token_ids")
        max_num_tokens(len(token_ids), params, self.config)
        return token_ids

    def submit(self, prompt_token_ids: Iterable[int], params: SamplingParams, request_id: str) -> RequestStream:
        """Hand a request to the engine. Close the stream when nobody reads it any more.

        Raises ``InvalidRequestError``, ``QueueFullError``, ``DrainingError`` or ``EngineDeadError``, before anything has
        changed.
        """
        return self.submit_all([(prompt_token_ids, params, request_id)])[0]

    def submit_all(self, requests: list[tuple[Iterable[int], SamplingParams, str]]) -> list[RequestStream]:
        """The same for several requests, of which all are taken or none."""
        if self.failure is not None:
            raise EngineDeadError(f"the engine has stopped: {self.failure}")
        if self.is_draining:
            raise DrainingError("the server is shutting down and takes no new requests")
        streams = []
        for prompt_token_ids, params, request_id in requests:
            token_ids = self.check(tuple(prompt_token_ids), params)
            streams.append(RequestStream(request_id, token_ids, params, on_close=self._close))
        names = [stream.request_id for stream in streams]
        if len(set(names)) < len(names) or not self._streams.keys().isdisjoint(names):
            raise InvalidRequestError(f"request ids must be new and different, got {names}")
        self.admission.check(len(streams), sum(_work(stream) for stream in streams))
        for stream in streams:
            self.admission.wait(stream.request_id, _work(stream))
            self._streams[stream.request_id] = stream
            self._channel.send(Submit(stream.request_id, stream.prompt_token_ids, stream.params))
        return streams

    def abort_request(self, request_id: str, user: str) -> bool:
        """End one request on behalf of the user who made it; its reader sees the finish reason ``abort``.

        False if there is none under way with that id and user.
        """
        stream = self._streams.get(request_id)
        if stream is None or stream.user is None or stream.user != user:
            return False
        self._abort(stream)
        return True

    def _abort(self, stream: RequestStream) -> None:
        self._channel.send(Abort(stream.request_id))
        stream.abort()
        self._over(stream, "abort")

    def _close(self, stream: RequestStream) -> None:
        """Nobody reads the stream any more."""
        if self._streams.get(stream.request_id) is stream:
            self._channel.send(Abort(stream.request_id))
            self._over(stream, "abort")

    def _over(self, stream: RequestStream, outcome: str) -> None:
        del self._streams[stream.request_id]
        self.admission.leave(stream.request_id)
        self.observers.tell("on_finished", stream, outcome)

    # The live view ----------------------------------------------------------------------------------------------------

    def subscribe_live(self) -> LiveSubscription:
        """Updates of the live view, for as long as the subscription is open; the engine makes them only while one is."""
        subscription = LiveSubscription(on_close=self._unsubscribe)
        self._subscriptions.append(subscription)
        if self.is_alive:
            self._channel.send(Watch(True))  # a new one starts with how things stand
        else:
            subscription.end()
        return subscription

    def _unsubscribe(self, subscription: LiveSubscription) -> None:
        self._subscriptions.remove(subscription)
        if not self._subscriptions and self.is_alive:
            self._channel.send(Watch(False))

    async def control(self, action: ControlAction) -> bool:
        """Pause, resume or single-step the engine; returns whether it is paused now. Raises ``EngineDeadError``."""
        if self.failure is not None:
            raise EngineDeadError(f"the engine has stopped: {self.failure}")
        if self.is_draining:
            raise DrainingError("the server is shutting down and cannot be paused")
        waiter: asyncio.Future[bool] = self._loop.create_future()
        self._paused_waiters.append(waiter)
        self._channel.send(Control(action))
        return await waiter

    # What the engine says ---------------------------------------------------------------------------------------------

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """Call on the event loop, from another thread."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            logger.debug("the event loop is closed")

    def _receive(self, messages: list[Any]) -> None:
        self._call(self._act_on_all, messages)

    def _act_on_all(self, messages: list[Any]) -> None:
        for message in messages:
            self._act_on(message)

    def _act_on(self, message: Any) -> None:
        if isinstance(message, Stepped):
            self._deliver(message)
        elif isinstance(message, LiveUpdate):
            for subscription in self._subscriptions:
                subscription.put(message.update)
        elif isinstance(message, Paused):
            self.paused = message.paused
            if self._paused_waiters:
                waiter = self._paused_waiters.pop(0)
                if not waiter.done():
                    waiter.set_result(message.paused)
        elif isinstance(message, Refused):
            stream = self._streams.get(message.request_id)
            if stream is not None:
                stream.fail(InvalidRequestError(message.message))
                self._over(stream, "error")
        elif isinstance(message, Ready):
            if not self._ready.done():
                self._ready.set_result(message)
        elif isinstance(message, Failed):
            self._fail(message)

    def _deliver(self, message: Stepped) -> None:
        now = time.monotonic()
        self.stats = message.stats
        num_tokens = 0
        gaps_s: list[float] = []
        for packed in message.deltas:
            num_tokens += len(packed[3])
            stream = self._streams.get(packed[0])
            if stream is None:
                continue  # closed meanwhile
            if stream.first_token_s is None:
                self.admission.start(stream.request_id)
                self.observers.tell("on_first_token", stream, now - stream.arrival_s)
            gap_s = stream.put(packed, now)
            if gap_s is not None:
                gaps_s.append(gap_s)
            self._see_end(stream, packed)
        self.observers.tell("on_step", message.stats)
        if num_tokens:
            self.observers.tell("on_tokens", num_tokens, gaps_s)

    def _see_end(self, stream: RequestStream, packed: PackedDelta) -> None:
        if stream.is_finished:
            self._over(stream, str(packed[5]))
        elif stream.is_broken:
            self._channel.send(Abort(stream.request_id))
            self._over(stream, "error")

    def _fail(self, failed: Failed) -> None:
        if not self._ready.done():
            kind = getattr(errors, failed.error, PageBrainError)
            self._ready.set_exception(kind(failed.message))
        self._die(failed.message)

    def _on_end(self) -> None:
        self._die("its process ended unexpectedly")

    def _die(self, reason: str) -> None:
        """The engine is gone: everybody who waits for it is told, at once."""
        if self.failure is not None or self._stopping:
            return
        self.failure = reason
        if not self._ready.done():
            self._ready.set_exception(PageBrainError(f"the engine's process ended before it was ready: {reason}"))
            return
        error = EngineDeadError(f"the engine has stopped: {reason}")
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
