"""The engine's process: builds the engine, takes requests from the server's process, and steps.

Nothing here knows of HTTP, and nothing of HTTP can delay a step. The main thread alone touches the engine; between two steps
it reads what has come. When the server's process is gone, however it went, this one ends at once.
"""

import dataclasses
import logging
import os
import queue
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

from pagebrain.build import BuiltEngine, build_engine
from pagebrain.config import PageBrainConfig
from pagebrain.engine.engine import Engine
from pagebrain.errors import InvalidRequestError, PageBrainError, StepError, is_out_of_memory, place
from pagebrain.quiet import quiet
from pagebrain.server.link.fair_queue import FairQueue
from pagebrain.server.link.messages import (
    Abort,
    Channel,
    Control,
    Ended,
    Failed,
    LiveUpdate,
    Paused,
    Ready,
    Refused,
    Shutdown,
    Stepped,
    Submit,
    Watch,
    pack_delta,
    settle_memory,
)
from pagebrain.server.live.feed import LiveFeed
from pagebrain.server.logs import configure_logging
from pagebrain.standard_streams import drain_output, queue_output

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Steps that may fail in a row before the engine gives up. A failed step is rolled back, so trying again is safe."""

FLUSH_S = 5.0


def main(connection: Connection, config: PageBrainConfig, log_level: str) -> None:
    """Run the engine until the server's process says so or is gone; this is the whole life of the engine's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # both reach the whole process group; the server's process decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive(messages: list[Any]) -> None:
        for message in messages:
            inbox.put(message)

    queue_output()
    channel = Channel(connection, receive, on_end=lambda: _exit(1), name="pagebrain-engine")
    channel.start()
    try:
        configure_logging(log_level)
        with quiet():
            built = build_engine(config)
            settle_memory()
            channel.send(Ready(_picklable(built), built.notices))
            _run(EngineLoop(built.engine, channel, inbox))
    except EngineFailure as failure:
        channel.send(Failed(type(failure).__name__, str(failure)))
    except PageBrainError as error:  # the engine could not be built: there are no prompts yet that this might quote
        channel.send(Failed(type(error).__name__, " ".join(str(error).split())))
    except Exception as error:
        logger.exception("the engine's process ends")
        channel.send(Failed(type(error).__name__, kind_and_place(error)))
    finally:
        channel.flush(FLUSH_S)
    _exit(0)


def _exit(status: int) -> None:
    """End the process, whatever threads of the libraries underneath are left; its last lines still come out."""
    drain_output()
    os._exit(status)


class EngineFailure(Exception):
    """The engine cannot go on. The message says what happened and where, and quotes nothing."""


def _run(loop: "EngineLoop") -> None:
    try:
        loop.run()
    except Exception as error:
        logger.exception("the engine cannot go on")
        raise EngineFailure(kind_and_place(error)) from error


def kind_and_place(error: BaseException) -> str:
    """What kind of exception is at the root of ``error``, and where it came from. Not its message: it may quote a prompt."""
    what = "out of memory: " if is_out_of_memory(error) else ""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{what}{type(error).__name__}{place(error)}"


def _picklable(built: BuiltEngine) -> PageBrainConfig:
    """The config without parts that are objects: they stay in this process."""
    names = {part: named for part, named in built.config.parts.items() if isinstance(named, str)}
    return dataclasses.replace(built.config, parts=names)


class EngineLoop:
    """The loop around an engine.

    Args:
        engine: touched by nobody else.
        channel: to the server's process.
        inbox: what has come from there.
    """

    def __init__(self, engine: Engine, channel: Channel, inbox: "queue.SimpleQueue[Any]") -> None:
        self.engine = engine
        self.channel = channel
        self.inbox = inbox
        self.queue = FairQueue(engine.config.seed)
        self.feed: LiveFeed | None = None
        self.paused = False
        self.single_steps = 0
        self.stopping = False
        self._num_failures = 0
        self._last_stats = engine.stats()

    def run(self) -> None:
        """Serve until told to stop. Raises what a step raised when it keeps failing."""
        while True:
            self._read_messages()
            if self.stopping:
                return
            if self._may_step:
                self._step()
            self._send_live()

    @property
    def _may_step(self) -> bool:
        return self.engine.has_unfinished_requests and (not self.paused or self.single_steps > 0)

    def _read_messages(self) -> None:
        """Act on all that has come; with nothing else to do, wait for more."""
        while not self.stopping:
            try:
                if self._may_step:
                    message = self.inbox.get_nowait()
                else:
                    message = self.inbox.get(timeout=None if self.feed is None else self.feed.wait_s(time.monotonic()))
            except queue.Empty:
                return
            self._act_on(message)

    def _act_on(self, message: Any) -> None:
        if isinstance(message, Submit):
            if message.source is None:
                self._submit(message)
            else:
                self.queue.put(message, message.source)
        elif isinstance(message, Abort):
            self.queue.remove(message.request_id)
            self.engine.abort(message.request_id)
            self.channel.send(Ended(message.request_id))
        elif isinstance(message, Watch):
            self._watch(message.on)
        elif isinstance(message, Control):
            self.paused = message.action != "resume"
            self.single_steps += message.action == "step" and self.engine.has_unfinished_requests
            self.channel.send(Paused(self.paused))
        elif isinstance(message, Shutdown):
            self.stopping = True
        self._take_turns()
        if not self._may_step:  # no step will tell how things stand now
            self._send_stats()
            if self.feed is not None:
                self.feed(self.engine.snapshot())

    def _take_turns(self) -> None:
        """Give the engine those queued requests that its next step can start. Called whenever room may have come."""
        while (message := self.queue.take(self.engine)) is not None:
            self._submit(message)

    def _submit(self, message: Submit) -> None:
        try:
            self.engine.add_request(message.prompt_token_ids, message.params, message.request_id, keeps_logprobs=False)
        except InvalidRequestError as error:  # the server has checked it already
            self.channel.send(Refused(message.request_id, str(error), is_mistake=True))
        except Exception as error:  # a scheduler that is somebody's own: the others need not suffer
            logger.warning("a request could not be added: %s", kind_and_place(error))
            logger.debug("what it said", exc_info=True)
            self.engine.abort(message.request_id)
            text = f"the engine failed over this request: {kind_and_place(error)}"
            self.channel.send(Refused(message.request_id, text, is_mistake=False))

    def _step(self) -> None:
        self.single_steps = max(0, self.single_steps - 1)
        try:
            deltas = self.engine.step()
        except StepError as error:
            self._num_failures += 1
            logger.warning("a step failed, %d of %d in a row: %s", self._num_failures, MAX_FAILURES, kind_and_place(error))
            logger.debug("what it said", exc_info=True)
            if self._num_failures == MAX_FAILURES:
                raise
            return
        self._num_failures = 0
        self._take_turns()
        self._send_stats(tuple(pack_delta(delta) for delta in deltas))
        if not self.engine.has_unfinished_requests:
            self.single_steps = 0
            if self.feed is not None:
                self.feed(self.engine.snapshot())

    def _send_stats(self, deltas: tuple[Any, ...] = ()) -> None:
        stats = self.engine.stats()
        launched = stats.num_tokens - self._last_stats.num_tokens
        self._last_stats = stats
        num_waiting = stats.num_waiting + self.queue.num_sequences
        stats = dataclasses.replace(stats, num_waiting=num_waiting, last_step_tokens=(launched,) if launched else ())
        self.channel.send(Stepped(deltas, stats))

    def _watch(self, on: bool) -> None:
        if not on:
            self.engine.observers = [observer for observer in self.engine.observers if observer is not self.feed]
            self.feed = None
            return
        if self.feed is None:
            self.feed = LiveFeed()
            self.engine.observers.append(self.feed)
        self.feed(self.engine.snapshot())  # whoever has just come sees how things stand

    def _send_live(self) -> None:
        now = time.monotonic()
        if self.feed is not None and self.feed.wait_s(now) == 0.0:
            self.channel.send(LiveUpdate(self.feed.update(now, self.engine.stats(), self.paused)))
